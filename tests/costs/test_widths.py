"""Tests of round_to="auto": multiples that depend on the device, and are never too large for a small site."""

import math

import pytest
from torch import nn

import xprune
from xprune import Budget, Costs, LinearCost, Site
from xprune.costs.widths import CHOICES, COSTS, rounded


def costs_of(*sites):
    unit = tuple(float(site.width) for site in sites)
    return Costs(tuple(sites), {"macs": LinearCost(1.0, (0.0,) * len(sites), unit)})


def neurons(name, size):
    return Site(name, "neuron", size, 1, (f"{name}.fc2",), module=name)


def heads(name, size, width):
    return Site(name, "head", size, width, (f"{name}.proj",), module=name)


def on(device, costs):
    budget = Budget(macs=0.5)
    return rounded(Budget(macs=0.5, round_to=budget.round_to), costs, nn.Linear(2, 2, device=device))


def test_on_a_cpu_every_width_is_allowed():
    budget = on("cpu", costs_of(neurons("mlp", 100)))
    assert budget.counts(neurons("mlp", 100)) == list(range(1, 101))


@pytest.mark.parametrize("size", [2, 5, 8, 30, 64, 100, 384, 3072])
@pytest.mark.parametrize("width", [1, 8, 24, 32, 64, 80])
def test_on_an_accelerator_widths_are_multiples_and_sites_can_move(size, width):
    site = neurons("one", size) if width == 1 else heads("one", size, width)
    costs = costs_of(site, *(neurons(f"mlp{i}", 3072) for i in range(12)))
    # The meta device stands for an accelerator: only its kind is looked at.
    budget = on("meta", costs)
    step = budget.step(site)
    assert step == 1 or len(budget.counts(site)) >= CHOICES
    # The features are a multiple of 8, unless this would leave too few choices.
    assert (step * width) % 8 == 0 or size < CHOICES * (8 // math.gcd(8, width))
    allowed = 0.5 * costs.macs.total([size] + [3072] * 12)
    assert step * costs.macs.unit[0] <= max(COSTS * allowed, 8 * width)


def test_large_mlps_get_the_largest_multiple():
    sites = [neurons(f"mlp{i}", 3072) for i in range(12)]
    budget = on("meta", costs_of(*sites))
    assert all(budget.step(site) == 64 for site in sites)


def test_a_number_is_used_as_it_is():
    costs = costs_of(neurons("mlp", 100))
    assert rounded(Budget(macs=0.5, round_to=8), costs, nn.Linear(2, 2, device="meta")).round_to == 8
    for wrong in ("best", 0, 1.5, True):
        with pytest.raises(xprune.BudgetError, match="round_to"):
            Budget(macs=0.5, round_to=wrong)
