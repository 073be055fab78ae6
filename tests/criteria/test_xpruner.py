"""Tests the masks of X-Pruner: how they keep to the budget, what they read, and what they learn."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import xprune
from tests.support.models import CLASSES, Killed, build, fused, images, loader
from xprune.core.scores import LowRank
from xprune.costs.expected import UnitCosts, hold_cost
from xprune.criteria.xpruner.criterion import XPruner
from xprune.criteria.xpruner.masks import LOWEST, SMOOTHNESS, SPARSITY, MaskTable, sampled, spread
from xprune.tasks.classification import Classification


def unit_costs(share=0.5, min_units=1, params=None):
    model = build("vit")
    sites = xprune.find_sites(model, images())
    costs = xprune.measure_costs(model, sites, images())
    budget = xprune.Budget(macs=share, params=params, min_units=min_units)
    return UnitCosts.of(costs, budget, torch.device("cpu")), costs


@pytest.mark.parametrize("progress", [0.1, 0.6, 1.0, 2.0])
@pytest.mark.parametrize(("share", "params", "min_units"), [(0.5, None, 1), (0.5, None, 2), (0.6, 0.4, 1)])
def test_settled_masks_cost_what_is_allowed(share, params, min_units, progress):
    units, costs = unit_costs(share, min_units, params)
    logits = 3 * torch.randn(5, units.unit.shape[1], generator=torch.Generator().manual_seed(0))
    masks, _ = units.settle(logits, progress)
    worst = units.excess(masks, progress).amax(1)
    torch.testing.assert_close(worst, torch.zeros(5), atol=1e-4, rtol=0)
    # By hand: the expected units of each site, where the fixed cost of the site is divided among its units.
    expected = [part.sum(1) for part in masks.split(units.sizes, 1)]
    full = costs.macs.total([site.size for site in costs.sites])
    total = costs.macs.base + sum(
        e * (u + f / n) for e, u, f, n in zip(expected, costs.macs.unit, costs.macs.fixed, units.sizes, strict=True)
    )
    torch.testing.assert_close(units.excess(masks, 2.0)[:, 0], total / full - share, atol=1e-4, rtol=0)
    for row in range(5):
        for part, whole in zip(masks[row].split(units.sizes), logits[row].split(units.sizes), strict=True):
            assert (part[whole.topk(min_units).indices] == 1).all(), "what has to stay is not masked"


def test_rows_that_are_taken_away_hold_their_share_and_the_plan_does_not_know(monkeypatch):
    units, _ = unit_costs(0.8)
    logits = torch.randn(2, units.unit.shape[1], generator=torch.Generator().manual_seed(0))
    # The second share is above the budget.
    shares = torch.tensor([0.3, 0.9])
    excess = units.excess(units.at(shares).settle(logits)[0])[:, 0] + units.allowed
    torch.testing.assert_close(excess, units.base + shares * (1 - units.base), atol=1e-4, rtol=0)
    none, _ = units.at(torch.zeros(2)).settle(logits)
    assert float(none.max()) < 0.01, "of a share of nothing, no site's best unit is held either"
    model, sites = build("vit"), xprune.find_sites(build("vit"), images())
    found = []
    for share in (0.2, 1.0):
        monkeypatch.setattr("xprune.criteria.xpruner.learner.TAKEN", share)
        found.append(xprune.score(model, sites, loader(), XPruner(steps=6), budget=xprune.Budget(macs=0.8)))
    assert all(torch.equal(a, b) for a, b in zip(*(scores.values for scores in found), strict=True))
    assert not torch.equal(found[0].classwise[0], found[1].classwise[0])


# The stride is that of the steps that train the masks of classes.
@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_shares_are_spread_evenly(stride):
    found = spread(torch.arange(0, 60 * stride, stride)).sort().values
    assert found.diff().max() < 0.06 and found.min() >= 0 and found.max() <= 1


def test_the_projected_gradient_leaves_the_cost_alone():
    units, _ = unit_costs()
    for name, term in SPARSITY.items():
        logits = torch.randn(3, units.unit.shape[1], requires_grad=True)
        masks, cost = units.settle(logits, 1.0)
        hold_cost(logits, masks, cost, term)
        (masks * torch.randn_like(masks)).sum().backward()
        free = logits.detach().requires_grad_()
        again, _ = units.settle(free, 1.0)
        slope = torch.autograd.grad((again * cost).sum(), free)[0]
        drift = (logits.grad * slope).sum(1) / (logits.grad.norm(dim=1) * slope.norm(dim=1))
        assert drift.abs().max() < 1e-4, name


def test_gates_are_drawn_with_the_masks_probability():
    torch.manual_seed(0)
    masks = torch.tensor([[0.1, 0.5, 0.9]]).expand(20_000, -1).clone().requires_grad_()
    gates = sampled(masks)
    assert set(gates.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(gates.detach().mean(0), masks.detach()[0], atol=0.02, rtol=0)
    (gates * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(masks.grad[0], torch.tensor([1.0, 2.0, 3.0]))


def test_regularisers_against_loops():
    masks, cost, shared = torch.rand(2, 4), torch.rand(2, 4), torch.rand(1, 4)
    rows = range(2)
    slow = {
        "cost": [sum(masks[r, u] * cost[r, u] for u in range(4)) for r in rows],
        "l1": [sum(masks[r, u] for u in range(4)) for r in rows],
        "l2": [sum(masks[r, u] ** 2 for u in range(4)) ** 0.5 for r in rows],
    }
    for name, term in SPARSITY.items():
        torch.testing.assert_close(term(masks, cost), torch.stack(slow[name]))
    apart = sum(abs(masks[r, u] - shared[0, u]) for r in rows for u in range(4)) / 8
    steps = sum(abs(masks[r, u + 1] - masks[r, u]) for r in rows for u in range(3)) / 6
    torch.testing.assert_close(SMOOTHNESS["classes"](masks, shared), apart)
    torch.testing.assert_close(SMOOTHNESS["units"](masks, shared), steps)


def test_one_vs_rest_against_the_formula():
    outputs, own = torch.randn(6, CLASSES, dtype=torch.float64), torch.arange(6) % CLASSES
    drawn = torch.tensor([0, 1, 5, 3, 0, 1])
    p = outputs.softmax(-1)
    each = [-(p[i, c].log() if c == own[i] else (1 - p[i, c]).log()) for i, c in enumerate(drawn.tolist())]
    found = Classification().one_vs_rest(outputs, own, drawn)
    torch.testing.assert_close(found, torch.stack(each).mean().float(), rtol=1e-5, atol=1e-6)
    gone = [-((1 - p[i, c]).log() if c == own[i] else p[i, own[i]].log()) for i, c in enumerate(drawn.tolist())]
    found = Classification().one_vs_rest(outputs, own, drawn, gone=True)
    torch.testing.assert_close(found, torch.stack(gone).mean().float(), rtol=1e-5, atol=1e-6)
    sure = Classification().one_vs_rest(torch.tensor([[100.0, 0.0]]), torch.tensor([1]), torch.tensor([0]))
    assert sure == pytest.approx(100.0), "1 - p is computed where p rounds to 1"


@pytest.mark.parametrize("alone", [False, True])
def test_a_table_of_factors_reads_and_aggregates_like_the_table_they_stand_for(alone):
    torch.manual_seed(0)
    low, full = MaskTable(9, 30, rank=4, alone=alone), MaskTable(9, 30, alone=alone)
    for parameter in (low.deviations.weight, low.shared):
        torch.nn.init.normal_(parameter)
    full.shared.data = low.shared.data
    full.deviations.weight.data = low.deviations.weight.data @ low.basis.data
    classes = torch.tensor([3, 3, 8])
    torch.testing.assert_close(low(classes), full(classes))
    own = full.deviations.weight[classes]
    torch.testing.assert_close(full(classes), own if alone else own + full.shared)
    for how in ("shared", "mean", "max"):
        torch.testing.assert_close(low.aggregate(how, [2]), full.aggregate(how, [2]))
    full(classes).sum().backward()
    assert full.shared.grad is None, "a class's row does not move the row that all share"


def test_the_row_of_a_class_holds_the_units_that_it_would_miss():
    """Only neuron c of a layer gives class c. The other neurons give no class."""
    mlp = nn.Sequential(nn.Linear(CLASSES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    model = nn.Sequential(nn.Flatten(), mlp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for layer in (mlp[0], mlp[2]):
            layer.weight[range(CLASSES), range(CLASSES)] = 3.0
    labels = torch.arange(70) % CLASSES
    data = [(F.one_hot(labels, CLASSES).float()[:, None], labels)] * 4
    sites = xprune.find_sites(model, data[0][0][:2])
    settings = XPruner(steps=120, shared=0.0, aggregate="mean")
    (table,) = xprune.score(model, sites, data, settings, budget=xprune.Budget(macs=0.9)).classwise
    assert table[:, :CLASSES].argmax(1).tolist() == list(range(CLASSES)), "of the units that say something"


SETTINGS = {
    "default": XPruner(steps=6),
    "one-vs-rest-kept": XPruner(steps=6, objective="one-vs-rest-kept"),
    "label": XPruner(steps=6, objective="label", shared=0.0, aggregate="mean"),
    "random-row": XPruner(steps=6, objective="random-row", aggregate="max"),
    "lambda": XPruner(steps=6, sparsity="l2", lambda_sparse=0.1, lambda_smooth=0.1),
    "rank": XPruner(steps=6, rank=3, smoothness="units", lambda_smooth=0.1),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_learns_and_can_be_repeated(settings):
    model = build("vit")
    sites = xprune.find_sites(model, images())
    one, two = (xprune.score(model, sites, loader(), settings, budget=xprune.Budget(macs=0.4)) for _ in range(2))
    for a, b, site in zip(one.values, two.values, sites, strict=True):
        assert torch.equal(a, b) and a.std() > 0, site.name
    assert not one.unseen or settings.objective != "label"
    table = one.classwise[0]
    assert table.shape == (CLASSES, sites[0].size) and isinstance(table, LowRank) == (settings.rank is not None)


@pytest.mark.parametrize("objective", ["one-vs-rest", "one-vs-rest-kept", "random-row"])
def test_smoothness_across_classes_makes_their_rows_alike_and_leaves_the_plan_alone(objective):
    model = build("vit")
    sites = xprune.find_sites(model, images())
    free, tied = (
        xprune.score(model, sites, loader(), XPruner(steps=30, objective=objective, lambda_smooth=weight))
        for weight in (0.0, 100.0)
    )
    for a, b in zip(free.values, tied.values, strict=True):
        assert torch.equal(a, b)
    apart = [sum(float((rows - rows.mean(0)).abs().sum()) for rows in found.classwise) for found in (free, tied)]
    assert apart[1] < 0.8 * apart[0]


def test_sparse_gradients_reach_the_rows_drawn_alone():
    model, data = build("vit"), [(images(4), torch.tensor([0, 0, 2, 2]))]
    sites = xprune.find_sites(model, images())
    for sparse in (True, False):
        settings = XPruner(steps=4, objective="label", shared=0.0, aggregate="mean", sparse=sparse)
        scores = xprune.score(model, sites, data, settings)
        gone = [bool(row.isnan().all()) for row in scores.classwise[0]]
        assert gone == [False, True, False, True, True, True, True]
        assert scores.unseen == (1, 3, 4, 5, 6)


def test_a_killed_run_goes_on_to_the_same_masks(tmp_path):
    model, settings = build("swin"), XPruner(steps=10)
    every = xprune.Checkpoint(tmp_path, steps=4)
    sites = xprune.find_sites(model, images())
    whole = xprune.score(model, sites, fused(4), settings, seed=2)
    with pytest.raises(Killed):
        xprune.score(model, sites, fused(4, after=4 + 16 + 9), settings, seed=2, checkpoint_dir=every)
    with pytest.raises(xprune.TrainingError, match="another run: allowed differ"):
        other = {"budget": xprune.Budget(macs=0.9), "seed": 2, "checkpoint_dir": tmp_path}
        xprune.score(model, sites, fused(4), settings, **other)
    resumed = xprune.score(model, sites, fused(4), settings, seed=2, checkpoint_dir=tmp_path)
    for a, b in zip((*whole.values, *whole.classwise), (*resumed.values, *resumed.classwise), strict=True):
        # A class that was never drawn has NaN scores.
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_masks_find_what_the_model_needs():
    """One unit in three has no effect in this model. A mask that keeps such units is not better than random."""
    model = build("vit")
    sites = xprune.find_sites(model, images())
    for site in sites:
        weight = model.get_submodule(site.consumers[0]).weight
        for unit in range(0, site.size, 3):
            weight.data[:, unit * site.width : (unit + 1) * site.width] = 0
    data = loader(28, 7, shuffle=True)
    model = xprune.finetune(model, data, xprune.Finetune(epochs=15, lr=3e-3, weight_decay=0.0))
    for site in sites:
        weight = model.get_submodule(site.consumers[0]).weight
        for unit in range(0, site.size, 3):
            weight.data[:, unit * site.width : (unit + 1) * site.width] = 0
    neurons = [site for site in sites if site.kind == "neuron"]
    scores = xprune.score(model, neurons, data, XPruner(steps=120), budget=xprune.Budget(macs=0.75))
    for values in scores.values:
        dead = torch.arange(len(values)) % 3 == 0
        assert values[dead].mean() < values[~dead].mean()


@pytest.mark.parametrize(
    "bad",
    [
        {"objective": "labels"},
        {"steps": 0},
        {"lr": 0.0},
        {"shared": 1.5},
        {"anneal": 0.0},
        {"sparsity": "l3"},
        {"lambda_sparse": -1.0},
        {"smoothness": "time"},
        {"rank": 0},
        {"aggregate": "sum"},
        # The plan would come from the shared mask, which no step trains.
        {"shared": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(xprune.PluginError, match=next(iter(bad))):
        XPruner(**bad)


def test_masks_for_any_budget_cost_what_was_drawn(monkeypatch):
    drawn = []
    settle = UnitCosts.settle

    def watched(self, logits, progress=1.0):
        masks, cost = settle(self, logits, progress)
        excess = self.excess(masks).detach()
        drawn.append((float(self.allowed[0, 0]), float(excess.abs().max())))
        return masks, cost

    monkeypatch.setattr(UnitCosts, "settle", watched)
    model, sites = build("vit"), xprune.find_sites(build("vit"), images())
    criterion = XPruner(steps=30, shared=1.0, budgets="any", anneal=0.3)
    xprune.score(model, sites, loader(), criterion, budget=xprune.Budget(macs=0.5))
    units, costs = unit_costs()
    base = float(units.base[0])
    shares = [(allowed - base) / (1 - base) for allowed, _ in drawn]
    # The smallest model keeps one unit at each site.
    least = costs.macs.total([1] * len(sites)) / costs.macs.total([site.size for site in sites])
    assert units.least_share == pytest.approx((least - base) / (1 - base), abs=0.02)
    assert len(shares) == 30 and max(error for _, error in drawn) < 1e-3
    # The range grows: the first budgets are near the dense cost, the later ones cover the whole range.
    assert shares[0] > 0.7 and min(shares) >= max(LOWEST, units.least_share) - 1e-6
    late = sorted(shares[9:])
    assert late[0] < units.least_share + 0.1 and late[-1] > 0.9 and max(b - a for a, b in pairwise(late)) < 0.12


def test_scores_for_any_budget_do_not_depend_on_the_fraction():
    model, sites = build("vit"), xprune.find_sites(build("vit"), images())
    criterion = XPruner(steps=4, budgets="any")
    asked = [xprune.Budget(macs=0.9), xprune.Budget(macs=0.4), None]
    found = [xprune.score(model, sites, loader(), criterion, budget=budget) for budget in asked]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].values, other.values, strict=True))
    keys = {criterion.budget_key(budget) for budget in asked[:2]}
    assert len(keys) == 1 and keys != {criterion.budget_key(xprune.Budget(params=0.4))}
    one = XPruner(steps=4)
    assert one.budget_key(asked[0]) != one.budget_key(asked[1])
    assert xprune.CRITERIA["taylor"]().budget_key(asked[0]) == ""


def test_masks_for_any_budget_refuse_a_fixed_penalty():
    with pytest.raises(xprune.PluginError, match="Leave lambda_sparse out"):
        XPruner(budgets="any", lambda_sparse=0.1)
    with pytest.raises(xprune.PluginError, match="allowed are one, any"):
        XPruner(budgets="some")
