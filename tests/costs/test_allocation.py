"""Compares `Allocation` with a search through every plan, for linear and other costs."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import xprune
from tests.support.reference import every_plan
from xprune.costs.allocation import Allocation, normalise

SIZES = (2, 3, 4)
SITES = tuple(xprune.Site(name, "neuron", n, 1, (name,), module=name) for name, n in zip("abc", SIZES, strict=True))
POSITIVE = st.integers(1, 20).map(float)
TRIPLES = st.tuples(POSITIVE, POSITIVE, POSITIVE)
ZEROS = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Steps(xprune.Cost):
    """A cost that grows with the square of the number of units, so it is not linear."""

    each: tuple[float, ...]

    def total(self, counts):
        """Returns the sum of squares."""
        return 1 + sum(each * count**2 for each, count in zip(self.each, counts, strict=True))


LINEAR = st.builds(xprune.LinearCost, POSITIVE, st.just(ZEROS), TRIPLES)
PAIRED = st.builds(
    xprune.LinearCost, POSITIVE, st.just(ZEROS), TRIPLES, st.tuples(st.tuples(st.just(0), st.just(2), POSITIVE))
)
COSTS = st.one_of(LINEAR, PAIRED, st.builds(Steps, TRIPLES))
SCORES = st.tuples(*(st.lists(st.integers(0, 9), min_size=n, max_size=n) for n in SIZES))


def allocation(macs, params, share, scores):
    """Returns an allocation for two costs. An example whose budget cannot be met is skipped."""
    costs = xprune.Costs(SITES, {"macs": macs, "params": params})
    try:
        values = [torch.tensor(row, dtype=torch.float64) for row in scores]
        return Allocation.on(costs, xprune.Budget(share, min(1.0, share + 0.2)), values)
    except xprune.BudgetError:
        assume(False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(macs=COSTS, params=COSTS, share=st.floats(0.3, 1.0), scores=SCORES)
def test_what_fits_is_what_meets_every_limit(macs, params, share, scores):
    made = allocation(macs, params, share, scores)
    for counts in every_plan(list(SIZES)):
        slow = all(
            cost.total(counts) <= part * cost.total(SIZES) * (1 + 1e-9)
            for cost, part in ((macs, share), (params, min(1.0, share + 0.2)))
        )
        assert made.fits(counts) == slow


@settings(max_examples=60, deadline=None, derandomize=True)
@given(macs=COSTS, params=COSTS, share=st.floats(0.3, 1.0), scores=SCORES)
def test_a_filled_plan_fits_and_no_unit_more_does(macs, params, share, scores):
    made = allocation(macs, params, share, scores)
    kept = made.fill(made.one_threshold())
    assert tuple(kept) in every_plan(list(SIZES)) and made.fits(kept)
    for index, size in enumerate(SIZES):
        more = [count + (i == index) for i, count in enumerate(kept)]
        assert kept[index] == size or not made.fits(more), "the budget is wasted"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cost=COSTS, share=st.floats(0.3, 1.0), scores=SCORES)
def test_the_threshold_is_the_lowest_of_all_that_fit(cost, share, scores):
    made = allocation(cost, cost, share, scores)
    steps = sorted(
        ((value, i, a) for i in range(len(SIZES)) for value, a, _ in made.steps(i)),
        key=lambda step: (step[0], -step[2] / SIZES[step[1]], step[1]),
    )
    # Removes one more unit at a time, which is slow and simple.
    for gone in range(len(steps) + 1):
        kept = list(SIZES)
        for _, index, count in steps[:gone]:
            kept[index] = min(kept[index], count)
        if made.fits(kept):
            break
    assert made.one_threshold() == kept


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cost=COSTS, share=st.floats(0.3, 1.0), scores=SCORES)
def test_a_plan_keeps_the_best_units_of_each_site(cost, share, scores):
    made = allocation(cost, cost, share, scores)
    plan = made.plan(made.fill(made.least), "mine")
    for row, keep in zip(scores, plan.keeps, strict=True):
        gone = [value for i, value in enumerate(row) if i not in keep]
        assert not gone or max(gone) <= min(row[i] for i in keep)
    assert plan.info["predicted"]["macs"] == pytest.approx(cost.total(plan.counts) / cost.total(SIZES))


@pytest.mark.parametrize(
    ("budget", "first"),
    [(xprune.Budget(macs=0.5), "macs"), (xprune.Budget(params=0.5), "params"), (xprune.Budget(0.5, 0.5), "macs")],
)
def test_scores_are_weighed_by_the_first_resource_of_the_budget(budget, first):
    each = {"macs": (1.0, 2.0, 4.0), "params": (8.0, 4.0, 2.0)}
    costs = xprune.Costs(SITES, {name: xprune.LinearCost(5.0, ZEROS, unit) for name, unit in each.items()})
    scores = xprune.Scores(SITES, tuple(torch.ones(n) for n in SIZES), "mine", scale="loss")
    found = normalise(scores, costs, budget)
    assert [float(value[0]) for value in found] == [1 / unit for unit in each[first]]
