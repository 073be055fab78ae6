"""Tests that masks settle at the cost that a slow bisection finds, and the gradients that hold the cost."""

import pytest
import torch

from xprune.core.budget import Budget
from xprune.core.costs import Costs, LinearCost
from xprune.core.site import Site
from xprune.costs.expected import TEMPERATURE, UnitCosts, hold_cost
from xprune.costs.shift import points_and_rounds, solve_shift
from xprune.criteria.xpruner.masks import SPARSITY

SIZES = (6, 40, 6, 32)


def random_costs(seed, *, limits=1, pairs=False, min_units=0):
    """Costs of four sites of 6 to 40 units, where a unit of one site costs up to 100 times as much as another's."""
    chance = torch.Generator().manual_seed(seed)

    def cost(spread):
        unit = (10 ** (spread * torch.rand(len(SIZES), generator=chance))).tolist()
        shared = ((0, 1, 0.5), (1, 2, 0.2), (0, 3, 0.4)) if pairs else ()
        return LinearCost(20.0, (3.0, 0.0, 2.0, 0.0), tuple(unit), shared)

    sites = tuple(Site(f"site {i}", "neuron", size, 1, (f"layer {i}",)) for i, size in enumerate(SIZES))
    costs = Costs(sites, {"macs": cost(2.0), "params": cost(1.0)})
    budget = Budget(macs=0.5, params=0.6 if limits == 2 else None, min_units=min_units)
    return UnitCosts.of(costs, budget, torch.device("cpu"))


LOGITS = {
    "all equal": lambda rows, chance: torch.zeros(rows, sum(SIZES)),
    "close": lambda rows, chance: 0.1 * torch.randn(rows, sum(SIZES), generator=chance),
    "learned": lambda rows, chance: 3 * torch.randn(rows, sum(SIZES), generator=chance),
    "far apart": lambda rows, chance: 30 * torch.randn(rows, sum(SIZES), generator=chance),
    "far away": lambda rows, chance: 100 + torch.randn(rows, sum(SIZES), generator=chance),
    "two groups": lambda rows, chance: 25.0 * torch.randint(0, 2, (rows, sum(SIZES)), generator=chance),
    "few are high": lambda rows, chance: 15.0 * (torch.rand(rows, sum(SIZES), generator=chance) < 0.02),
    "extreme": lambda rows, chance: 500.0 * torch.randint(0, 3, (rows, sum(SIZES)), generator=chance),
}


def bisected(units, logits, progress):
    """The masks of `settle`, from 60 halvings in float64."""
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for part, chosen, least in zip(logits.split(units.sizes, 1), kept.split(units.sizes, 1), units.least, strict=True):
        chosen.scatter_(1, part.topk(least, dim=1).indices, True)

    def masks(shift):
        return torch.sigmoid((logits.double() - shift) / TEMPERATURE).masked_fill(kept, 1.0)

    def excess(masks):
        each = [part.sum(1) for part in masks.split(units.sizes, 1)]
        cost = units.base + masks @ units.unit.double().T
        for i, first in enumerate(each):
            for j, second in enumerate(each):
                cost = cost + (first * second)[:, None] * units.pairs[:, i, j]
        return cost - (units.allowed + (1 - units.allowed) * max(1 - progress, 0) ** 3)

    low, high = logits.amin(1, keepdim=True).double() - 10, logits.amax(1, keepdim=True).double() + 10
    for _ in range(60):
        middle = (low + high) / 2
        over = excess(masks(middle)).amax(1, keepdim=True) > 0
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return masks(high), excess


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("choice", [(4, 7), (32, 3)], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("pairs", [False, True], ids=["", "pairs"])
@pytest.mark.parametrize(("limits", "min_units"), [(1, 0), (2, 3)])
def test_masks_settle_where_bisection_settles_them(name, choice, pairs, limits, min_units, monkeypatch):
    monkeypatch.setattr("xprune.costs.expected.points_and_rounds", lambda device: choice)
    units = random_costs(1, limits=limits, pairs=pairs, min_units=min_units)
    for progress in (0.05, 0.5, 1.0):
        logits = LOGITS[name](6, torch.Generator().manual_seed(2))
        # Of equal units, any may be the ones that stay. A little noise says which ones are.
        logits = logits + 1e-3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        masks, cost = units.settle(logits, progress)
        expected, excess = bisected(units, logits, progress)
        worst = (excess(masks.double()) - excess(expected)).amax(1)
        torch.testing.assert_close(worst, torch.zeros_like(worst), atol=1e-4, rtol=0)
        assert not (masks.min() < 0 or masks.max() > 1) and cost.shape == masks.shape
        kept = expected == 1
        assert (masks[kept] == 1).all()
        # The order of the units is the one of their logits.
        steepest = (masks - expected).abs().max()
        assert steepest < 5e-3, "each mask is the one of the bisection"


@pytest.mark.parametrize("name", ["all equal", "learned", "two groups"])
def test_rows_with_their_own_share_settle_too(name):
    units = random_costs(3, pairs=True, min_units=2)
    shares = torch.tensor([0.0, 0.01, 0.3, 0.7, 0.99, 1.0])
    logits = LOGITS[name](6, torch.Generator().manual_seed(4))
    own = units.at(shares)
    masks, _ = own.settle(logits)
    excess = own.excess(masks)[:, 0]
    torch.testing.assert_close(excess, torch.zeros(6), atol=1e-4, rtol=0)
    assert float(masks[0].max()) < 1e-3 and float(masks[-1].min()) > 1 - 1e-3


def test_of_equal_units_as_many_stay_as_have_to():
    units = random_costs(5, min_units=3)
    masks, _ = units.settle(torch.zeros(2, sum(SIZES)))
    for part in masks.split(units.sizes, 1):
        assert ((part == 1).sum(1) == 3).all() and (part < 1).any()


def test_the_shift_of_a_row_does_not_depend_on_the_other_rows():
    units = random_costs(5)
    logits = LOGITS["learned"](6, torch.Generator().manual_seed(6))
    together, _ = units.settle(logits)
    alone = torch.cat([units.settle(row[None])[0] for row in logits])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_default_choice_takes_few_evaluations():
    for device, most in (("cpu", 28), ("meta", 96)):
        points, rounds = points_and_rounds(torch.device(device))
        calls = []

        def cost(masks, calls=calls):
            calls.append(masks.shape[1])
            return masks.mean(2, keepdim=True)

        args = (torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1), points, rounds)
        solve_shift(torch.linspace(-3, 3, 50)[None], cost, *args)
        assert sum(calls) <= most and len(calls) == rounds


@pytest.mark.parametrize("pairs", [False, True])
def test_the_cost_of_one_more_is_the_slope_of_the_cost(pairs):
    units = random_costs(7, pairs=pairs, limits=2)
    logits = LOGITS["learned"](4, torch.Generator().manual_seed(8))
    masks, cost = units.settle(logits)
    leaf = masks.clone().requires_grad_()
    excess = units.excess(leaf)
    slope = torch.autograd.grad(excess.gather(1, excess.argmax(1, keepdim=True)).sum(), leaf)[0]
    torch.testing.assert_close(cost, slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SPARSITY)
def test_the_held_gradient_is_the_one_by_autograd(name):
    units, term = random_costs(9, min_units=1), SPARSITY[name]
    logits = LOGITS["learned"](3, torch.Generator().manual_seed(10)).requires_grad_()
    masks, cost = units.settle(logits)
    weights = torch.randn(masks.shape, generator=torch.Generator().manual_seed(11))
    g, a, r = (
        torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]
        for value in (masks * weights, masks * cost, term(masks, cost))
    )
    expected = g - (g * a).sum(1, keepdim=True) / (r * a).sum(1, keepdim=True) * r
    hold_cost(logits, masks, cost, term)
    (masks * weights).sum().backward()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)
