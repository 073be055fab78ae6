"""Fixtures for several files of tests: the result of a run, new processes, and settings that are put back.

Fixtures import torch and xprune inside. With pytest-xdist the process that hands out the tests reads this file too,
before it starts the workers, and needs neither library.
"""

import gc
import os

import pytest

from tests.support.new_process import Processes

# Tiny operations on several threads slow each other down many times over. The workers inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Measured times are not kept in the folder of the user.
os.environ["XPRUNE_CACHE"] = ""


def pytest_collection_finish():
    """Keeps the garbage collector from looking, again and again, at a million objects of imported libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def short_latency():
    """Makes times be measured for 0.01 seconds instead of 0.5 or 1. Every run of a Pruner measures twice."""
    import xprune
    from xprune.costs.stopwatch import Stopwatch

    before = {}
    for function in (xprune.latency.__wrapped__, Stopwatch.alone, Stopwatch.compare):
        before[function], function.__defaults__ = function.__defaults__, (0.01, *function.__defaults__[1:])
    yield
    for function, defaults in before.items():
        function.__defaults__ = defaults


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
