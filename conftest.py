"""What the examples of docstrings run in: an empty folder, and torch's random numbers from a fixed seed."""

import pytest


@pytest.fixture(autouse=True)
def _alone(request):
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    # With pytest-xdist, the process that hands out the tests reads this file too, and needs no torch.
    import torch

    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
