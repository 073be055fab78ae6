"""Tests which values a `Budget` takes, and which numbers of units it allows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import xprune

RANGE, WHOLE = "not in (0, 1]", "a whole number, at least"
WRONG = [None, "0.5", True, math.nan, math.inf, -math.inf, 0, -0.5, 1.2, [0.5], 1j]
"""What is no fraction. None is one only where it stands for no limit."""


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["macs", "params", "resources"])
def test_a_fraction_that_is_none_is_named(name, value):
    given = {name: value} if name != "resources" else {"resources": {"params": value}}
    with pytest.raises(xprune.BudgetError) as error:
        xprune.Budget(**given)
    assert RANGE in str(error.value) or value is None


@pytest.mark.parametrize(("name", "least"), [("min_units", 0), ("round_to", 1)])
@pytest.mark.parametrize("value", ["8", 2.5, 8.0, True, math.nan, None, -1])
def test_a_count_that_is_none_is_named(name, least, value):
    says = f"{name}={value!r} has to be {WHOLE} {least}"
    if name == "round_to" and isinstance(value, str):
        says = 'round_to=.8. is not known. Give a whole number of at least 1, or "auto"'
    with pytest.raises(xprune.BudgetError, match=says):
        xprune.Budget(0.5, **{name: value})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "needs macs=, params= or latency="),
        ({"resources": {}}, "needs macs=, params= or latency="),
        ({"resources": {"watts": 0.5}}, "unknown resource 'watts'; known: macs, params"),
        ({"resources": 0.5}, "not a mapping"),
        ({"resources": "macs"}, "not a mapping"),
        ({"macs": 0.5, "resources": {"macs": 0.4}}, "given twice: 0.5 and 0.4"),
        ({"macs": 0.5, "round_to": 0}, "at least 1"),
    ],
)
def test_a_budget_that_asks_for_nothing_known_is_refused(given, says):
    with pytest.raises(xprune.BudgetError) as error:
        xprune.Budget(**given)
    assert says in str(error.value)


@pytest.mark.parametrize("share", [0.5, 1, np.float64(0.5), np.float32(0.5)])
def test_any_real_number_in_range_is_a_fraction(share):
    assert xprune.Budget(share).macs == float(share) and type(xprune.Budget(share).macs) is float
    assert type(xprune.Budget(0.5, min_units=np.int64(2)).min_units) is int


def test_one_resource_may_be_said_in_two_ways():
    budget = xprune.Budget(0.5, 0.7, 2, 8)
    assert budget == xprune.Budget(resources={"params": 0.7, "macs": 0.5}, min_units=2, round_to=8)
    assert (budget.macs, budget.params, budget.resources) == (0.5, 0.7, ())
    assert hash(budget) == hash(xprune.Budget(macs=0.5, params=0.7, min_units=2, round_to=8))
    assert budget.shares == {"macs": 0.5, "params": 0.7}


def test_other_resources_are_kept_frozen(monkeypatch):
    monkeypatch.setitem(xprune.RESOURCES, "joules", xprune.RESOURCES["params"])
    asked = {"joules": 0.4}
    budget = xprune.Budget(macs=0.5, resources=asked)
    asked["joules"] = 0.9
    assert budget.shares == {"macs": 0.5, "joules": 0.4} and hash(budget)
    assert xprune.Budget(**vars(budget)) == budget, "a budget can be made from its fields"


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (xprune.Budget(macs=0.5), "macs 0.5"),
        (xprune.Budget(params=0.3), "params 0.3"),
        (xprune.Budget(0.5, 0.25, 0, 8), "macs 0.5, params 0.25, min_units 0, round_to 8"),
    ],
)
def test_a_budget_has_a_short_name(budget, name):
    assert budget.name == name


@given(
    size=st.integers(1, 24),
    width=st.integers(1, 12),
    round_to=st.integers(1, 16),
    min_units=st.integers(0, 30),
    whole=st.booleans(),
)
def test_allowed_counts_are_all_that_keep_to_the_budget(size, width, round_to, min_units, whole):
    site = xprune.Site("a", "head", size=size, width=width, consumers=("a",), module="a" if whole else "")
    counts = xprune.Budget(macs=0.5, round_to=round_to, min_units=min_units).counts(site)
    least = max(min_units, 0 if whole else 1)
    assert counts == [n for n in range(size + 1) if n == size or (n >= least and n * width % round_to == 0)]
