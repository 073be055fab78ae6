"""Measures the speed of each stage of pruning, on a DeiT-Ti and a DeiT-S.

    make bench
    make bench ARGS="--benchmark-autosave --benchmark-compare"      compares with the last saved measurement

The stages are: finding sites, measuring costs, scoring with each criterion, each selection, removing units, proving
the result, saving and loading. pytest-benchmark prints the table. Nothing is written to docs/results.
"""

import pytest
import timm
import torch

import xprune
from xprune.adapters import ADAPTERS
from xprune.costs.measure import measure_costs
from xprune.modules.copies import shared_copy
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify


@pytest.fixture(scope="module", params=["deit_tiny_patch16_224", "deit_small_patch16_224"])
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 224, 224)


@pytest.fixture(scope="module")
def sites(model, x):
    return xprune.find_sites(model, x)


@pytest.fixture(scope="module")
def plan(model, sites, x):
    return xprune.select(model, xprune.score(model, sites, criterion="magnitude"), xprune.Budget(0.5), example_inputs=x)


def test_find_sites(benchmark, model, x):
    benchmark(xprune.find_sites, model, x)


def test_measure_costs(benchmark, model, sites, x):
    benchmark(measure_costs, model, sites, x)


@pytest.mark.parametrize("selection", xprune.SELECTIONS)
def test_select(benchmark, model, sites, x, selection):
    scores = xprune.score(model, sites, criterion="random")
    benchmark(xprune.select, model, scores, xprune.Budget(macs=0.5), selection, example_inputs=x)


@pytest.mark.parametrize("criterion", xprune.CRITERIA)
def test_score(benchmark, model, sites, x, criterion):
    loader = [(x, torch.tensor([0, 1]))]
    # Learned criteria take seconds, so the number of rounds is fixed.
    benchmark.pedantic(xprune.score, (model, sites, loader, criterion), rounds=3, warmup_rounds=1)


def test_remove_units(benchmark, model, plan):
    benchmark(lambda: remove_units(shared_copy(model), plan, ADAPTERS))


def test_verify(benchmark, model, plan, x):
    benchmark(verify, model, remove_units(shared_copy(model), plan, ADAPTERS), plan, x)


def test_save_and_load(benchmark, model, plan, x, tmp_path):
    pruned = xprune.apply(model, plan, x)
    benchmark(lambda: xprune.load(xprune.save(pruned, tmp_path / "artefact")))
