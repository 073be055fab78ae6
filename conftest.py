"""What the examples of docstrings run in: an empty folder, and torch's random numbers from a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _alone(request, tmp_path, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    else:
        yield
