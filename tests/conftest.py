"""What several files of tests use: the result of a real run, new processes, and settings that are put back.

Fixtures import torch and xprune inside. With pytest-xdist the process that hands out the tests reads this file too,
before it starts the workers, and needs neither library.
"""

import pytest

from tests.support.new_process import Processes


@pytest.fixture(scope="session")
def result():
    """The result of one run of every stage."""
    import xprune
    from tests.support.models import build, loader

    criterion = xprune.CRITERIA["xpruner"](steps=6)
    selection = xprune.LearnedThresholds(steps=6)
    budget = xprune.Budget(macs=0.6)
    pruner = xprune.Pruner(build("vit"), criterion, budget, selection, xprune.Finetune(epochs=4))
    return pruner.run(loader(32), loader(32))


@pytest.fixture(scope="session")
def new_process():
    """Runs code in a new process: see `Processes.run`."""
    with Processes() as processes:
        yield processes.run


@pytest.fixture
def precision_settings():
    """Sets the precision in one of the ways of `WAYS`. Afterwards all settings are those that torch starts with."""
    from tests.support.precision import WAYS, reset

    yield lambda way: WAYS[way]()
    reset()
