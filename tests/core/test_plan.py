"""Tests which kept units make a `Plan`, how plans are combined, and plans as plain data."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xprune

SITES = tuple(xprune.Site(name, "neuron", 6, 1, (name,), module=name) for name in "abc")
PLANS = st.tuples(*(st.sets(st.integers(0, 5)).map(lambda units: tuple(sorted(units))) for _ in SITES))


@given(keeps=PLANS)
def test_a_plan_survives_json_and_counts_its_units(keeps):
    plan = xprune.Plan(SITES, keeps, {"selection": "mine"})
    again = xprune.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.info == plan.info
    assert plan.counts == tuple(map(len, keeps)) and plan.removed + sum(plan.counts) == 18


@given(first=PLANS, chance=st.randoms())
def test_a_plan_after_a_plan_is_relative_to_the_first_model(first, chance):
    left = tuple(
        xprune.Site(s.name, s.kind, len(keep), 1, s.consumers, module=s.module)
        for s, keep in zip(SITES, first, strict=True)
        if keep
    )
    second = tuple(tuple(sorted(chance.sample(range(site.size), chance.randint(0, site.size)))) for site in left)
    both = xprune.Plan(SITES, first).then(xprune.Plan(left, second))
    kept = iter(second)
    slow = tuple(tuple(keep[i] for i in next(kept)) if keep else () for keep in first)
    assert both.sites == SITES and both.keeps == slow


def test_the_full_plan_changes_nothing_before_or_after():
    plan, full = xprune.Plan(SITES, ((0, 1), (2,), (5,))), xprune.Plan.full(SITES)
    assert full.then(plan) == plan and full.removed == 0
    other = xprune.Site("d", "head", 2, 4, ("d",))
    assert plan.then(xprune.Plan((other,), ((1,),))).sites == (*SITES, other)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ((1, 0), "sorted"),
        ((0, 0), "distinct"),
        ((0, 99), "0 to 5"),
        ((-1,), "0 to 5"),
        ((True,), "integers"),
        ((1.0,), "integers"),
    ],
)
def test_kept_units_that_are_none_are_refused(keep, says):
    with pytest.raises(xprune.PlanError, match=says):
        xprune.Plan(SITES, (keep, (), ()))


def test_lists_that_do_not_fit_the_sites_are_refused():
    with pytest.raises(xprune.PlanError, match="one list for each site"):
        xprune.Plan(SITES, ((), ()))
    with pytest.raises(xprune.PlanError, match="twice"):
        xprune.Plan((*SITES, SITES[0]), ((),) * 4)
    with pytest.raises(xprune.PlanError, match="at least one has to stay"):
        xprune.Plan((xprune.Site("a", "head", 2, 4, ("a",)),), ((),))
    plan = xprune.Plan(SITES, ((0,),) * 3)
    with pytest.raises(xprune.PlanError, match="1 units are left but the second plan was made for 6"):
        plan.then(plan)


@pytest.mark.parametrize("data", [None, 3, [], {}, {"sites": [], "keeps": 3}, {"sites": 3, "keeps": []}])
def test_data_that_is_no_plan_is_refused(data):
    with pytest.raises(xprune.PlanError, match="not a plan"):
        xprune.Plan.from_json(data)
