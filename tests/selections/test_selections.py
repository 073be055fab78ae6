"""Tests that every selection uses its budget, never exceeds it, and gives the same plan for the same seed."""

import random

import pytest
import torch

import xprune
from tests.support import reference
from tests.support.models import build, images, loader
from xprune.selections.global_threshold import Global
from xprune.testing import check_selection

CACHE = {}
QUICK = {"learned": xprune.LearnedThresholds(steps=3)}


def case(name, seed=0):
    """Returns a model, its sites and random scores. They are built once, since many tests ask for them."""
    if (name, seed) not in CACHE:
        model = build(name)
        sites = xprune.find_sites(model, images())
        CACHE[name, seed] = model, sites, xprune.score(model, sites, criterion="random", seed=seed)
    return CACHE[name, seed]


# Each selection on each model, under a budget that is drawn anew for each pair. A ViT, the quickest, has three.
@pytest.mark.parametrize("selection", sorted(xprune.SELECTIONS))
@pytest.mark.parametrize(("name", "draw"), [("vit", 0), ("vit", 1), ("vit", 2), ("swin", 3), ("swinv2", 4)])
def test_budgets_are_met_from_below(name, draw, selection):
    model, _, scores = case(name, draw)
    chosen, chance = QUICK.get(selection, selection), random.Random(f"{draw} {selection}")
    share, what = chance.uniform(0.2, 1.0), chance.choice(["macs", "params", "both"])
    min_units, round_to = chance.randint(0, 3), chance.choice([1, 4, 8])
    shares = {"macs": share if what != "params" else None, "params": share if what != "macs" else None}
    budget = xprune.Budget(**shares, min_units=min_units, round_to=round_to)
    try:
        check_selection(chosen, model, scores, loader(), budget)
    except xprune.BudgetError as error:
        least = float(str(error).split("the least is ")[1].split(". Ask")[0])
        assert least > share
        if what != "both":
            possible = xprune.Budget(**{what: least}, min_units=min_units, round_to=round_to)
            check_selection(chosen, model, scores, loader(), possible)


def test_uniform_keeps_the_largest_ratio_and_fills_by_score():
    model, sites, scores = case("vit")
    costs = xprune.measure_costs(model, sites, images())
    sizes, unit = [site.size for site in sites], [int(u) for u in costs.macs.unit]
    for share in (0.4, 0.5, 0.7):
        plan = xprune.select(model, scores, xprune.Budget(macs=share), "uniform", example_inputs=images())
        ratio = reference.best_uniform(sizes, unit, int(costs.macs.base), share * costs.macs.total(sizes))
        for site, count in zip(sites, plan.counts, strict=True):
            assert count >= max(1, int(ratio * site.size + 1e-9))
        left = share * costs.macs.total(sizes) - costs.macs.total(plan.counts)
        assert left < min(u for u, s, c in zip(unit, sizes, plan.counts, strict=True) if c < s)


def test_global_removes_the_worst_units_whatever_their_site():
    model, sites, scores = case("vit")
    plan = xprune.select(model, scores, xprune.Budget(macs=0.6), Global(normalise="none"), example_inputs=images())
    neurons = [
        (value, keep)
        for site, value, keep in zip(sites, scores.values, plan.keeps, strict=True)
        if site.kind == "neuron"
    ]
    lost = [float(v[i]) for v, keep in neurons for i in range(len(v)) if i not in keep]
    kept = [float(v[i]) for v, keep in neurons for i in keep]
    assert sum(a > min(kept) for a in lost) <= 1, "one threshold, but for the unit that did not fit"


def test_equal_scores_shrink_every_site():
    model, sites, _ = case("vit")
    flat = xprune.Scores(sites, tuple(torch.ones(site.size) for site in sites), "flat")
    plan = xprune.select(model, flat, xprune.Budget(macs=0.6), "global", example_inputs=images())
    assert all(1 <= count < site.size for site, count in zip(sites, plan.counts, strict=True))


def test_min_units_round_to_and_exclude():
    model, _, _ = case("vit")
    sites = xprune.find_sites(model, images(), exclude=["blocks.0.*"])
    assert {site.name for site in sites} == {"blocks.1.attn", "blocks.1.mlp"}
    assert {s.kind for s in xprune.find_sites(model, images(), units=["head"])} == {"head"}
    scores = xprune.score(model, sites, criterion="random")
    budget = xprune.Budget(macs=0.8, min_units=2, round_to=16)
    plan = xprune.select(model, scores, budget, example_inputs=images())
    assert all(
        count * site.width % 16 == 0 or count == site.size for site, count in zip(sites, plan.counts, strict=True)
    )
    assert all(count >= 2 for count in plan.counts)


def test_the_same_seed_gives_the_same_plan():
    model = build("swin")
    runs = [xprune.Pruner(model, "random", finetune=None, seed=seed).run(loader(8)).plan for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_budget_of_one_removes_nothing():
    model, _, scores = case("vit")
    assert xprune.select(model, scores, xprune.Budget(macs=1.0), example_inputs=images()).removed == 0
