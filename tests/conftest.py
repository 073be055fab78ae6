"""What several files of tests look at: a real run, taken once."""

import pytest

import xprune
from tests.support.models import build, loader


@pytest.fixture(scope="session")
def result():
    criterion = xprune.CRITERIA["xpruner"](steps=6)
    selection = xprune.LearnedThresholds(steps=6)
    budget = xprune.Budget(macs=0.6)
    pruner = xprune.Pruner(build("vit"), criterion, budget, selection, xprune.Finetune(epochs=4))
    return pruner.run(loader(32), loader(32))
