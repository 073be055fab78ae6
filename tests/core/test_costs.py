"""Tests that the methods of `Cost` agree with each other, and which budgets can be met."""

from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xprune

SIZES = (3, 4, 5)
SITES = tuple(xprune.Site(name, "neuron", n, 1, (name,), module=name) for name, n in zip("abc", SIZES, strict=True))
NUMBERS = st.integers(0, 50).map(float)
TRIPLES = st.tuples(NUMBERS, NUMBERS, NUMBERS)
COUNTS = st.tuples(*(st.integers(0, n) for n in SIZES))
PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), NUMBERS), max_size=4).map(tuple)
LINEAR = st.builds(xprune.LinearCost, NUMBERS, TRIPLES, TRIPLES, PAIRS)


@dataclass(frozen=True)
class Tiles(xprune.Cost):
    """A cost that grows with every second unit, like that of a kernel that works on pairs of units."""

    each: tuple[float, ...]

    def total(self, counts):
        return 7 + sum(each * -(-count // 2) for each, count in zip(self.each, counts, strict=True))


COSTS = st.one_of(LINEAR, st.builds(Tiles, TRIPLES))


@given(cost=LINEAR, counts=COUNTS)
def test_a_linear_cost_is_the_sum_that_it_says(cost, counts):
    slow = cost.base + sum(f + u * k for f, u, k in zip(cost.fixed, cost.unit, counts, strict=True) if k)
    slow += sum(each * counts[i] * counts[j] for i, j, each in cost.pairs)
    assert cost.total(counts) == pytest.approx(slow)


@given(cost=COSTS, counts=COUNTS, site=st.integers(0, 2), data=st.data())
def test_a_step_is_the_difference_of_two_totals(cost, counts, site, data):
    count = data.draw(st.integers(0, SIZES[site]))
    changed = [count if i == site else n for i, n in enumerate(counts)]
    assert cost.step(counts, site, count) == pytest.approx(cost.total(changed) - cost.total(counts))


@given(cost=COSTS)
def test_the_linear_cost_of_any_cost_is_right_for_the_whole_model(cost):
    linear = cost.linear(SIZES)
    assert linear.total(SIZES) == pytest.approx(cost.total(SIZES))
    if not isinstance(cost, xprune.LinearCost):
        for site, size in enumerate(SIZES):
            one = [1 if i == site else n for i, n in enumerate(SIZES)]
            assert linear.total(one) == pytest.approx(cost.total(one)), size
    else:
        assert linear is cost


@given(cost=st.builds(Tiles, TRIPLES))
def test_a_unit_costs_what_its_removal_saves(cost):
    for site, unit in enumerate(cost.units(SIZES)):
        fewer = [n - (i == site) for i, n in enumerate(SIZES)]
        assert unit == pytest.approx(cost.total(SIZES) - cost.total(fewer))


def costs():
    """Returns the costs of three sites, with different MACs and parameters."""
    make = partial(xprune.LinearCost, fixed=(0.0, 0.0, 0.0))
    return xprune.Costs(SITES, {"macs": make(10, unit=(1, 2, 3)), "params": make(60, unit=(3, 2, 1))})


def test_a_mixed_budget_has_a_limit_for_each_resource():
    found = costs().limits(xprune.Budget(0.9, 0.95))
    assert [(name, allowed) for name, _, allowed in found] == [("macs", 0.9 * 36), ("params", 0.95 * 82)]
    assert costs().macs.unit == (1, 2, 3) and costs().params == costs().of("params")


@pytest.mark.parametrize("budget", [xprune.Budget(0.4), xprune.Budget(1.0, 0.75), xprune.Budget(0.95, min_units=9)])
def test_a_budget_below_the_least_states_the_least(budget):
    with pytest.raises(xprune.BudgetError, match=r"cannot be reached: .* the least is \d\.\d+") as error:
        costs().limits(budget)
    name, least = str(error.value).split("=")[0], float(str(error.value).split("the least is ")[1].split(". Ask")[0])
    asked = {"macs": 1.0, "params": 1.0} | {name: least}
    assert costs().limits(xprune.Budget(**asked, min_units=budget.min_units))
    with pytest.raises(xprune.BudgetError):
        costs().limits(xprune.Budget(**(asked | {name: least - 2e-4}), min_units=budget.min_units))


def test_a_resource_that_was_not_measured_is_named():
    with pytest.raises(
        xprune.BudgetError, match=r"of joules was not measured, only macs, params: .*resources=\['joules'\]"
    ):
        costs().of("joules")
    free = xprune.Costs(SITES, {"macs": xprune.LinearCost(0, (0.0,) * 3, (0.0,) * 3)})
    with pytest.raises(xprune.BudgetError, match="costs nothing in macs"):
        free.limits(xprune.Budget(macs=0.5))
