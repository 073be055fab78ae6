"""knapsack: chooses how many units each site keeps, so that the kept score is as large as the limits allow.

A site has several choices, which are the numbers of units that it may keep. Each choice has a value, the sum of the
scores of its units, and a cost in each limited resource. Exactly one choice is made at each site. This is the
multiple-choice knapsack problem.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from xprune.core.costs import Cost, LinearCost
from xprune.core.table_cost import TableCost
from xprune.costs.allocation import Allocation

_HALVINGS = 50
"""The number of steps of the bisection of one multiplier."""

_SWEEPS = 6
"""How often the multipliers of several limits, and the costs of streams, are adjusted to each other, at most."""


def knapsack(allocation: Allocation, values: Sequence[Tensor]) -> list[int]:
    """Finds the numbers of kept units with a large total value that meet the limits of a budget.

    Each limit has a multiplier, a price for one unit of cost. With given prices, each site makes the choice with the
    largest value minus price times cost. Bisection finds the smallest prices with which the limits are met (Lagrangian
    relaxation, Everett 1963). What the limits leave over is then spent on the single changes with the largest gain of
    value for their cost. With one limit, the result misses the best value by less than the value of one such change.

    A measured cost has steps and bends. Then a site keeps the number of units that is worth its time, which need not be
    the number above one common threshold.

    Args:
        allocation: The sites, the numbers of units that each may keep, and the limits.
        values: The value of each unit, (units,), for each site. Values are at least 0. The units of a site with the
            largest scores of the allocation are kept, so their values have to be the largest too.

    Returns:
        The number of units that each site keeps.
    """
    worth = [_worth(allocation, values, index) for index in range(len(values))]
    # With streams, the cost of a choice depends on the other sites. It is computed again for the sites as they became.
    changing = any(_has_streams(cost) for _, cost, _ in allocation.limits)
    kept = allocation.full
    for _ in range(_SWEEPS if changing else 1):
        prices = _costs_of_choices(allocation, kept)
        found = _choice(allocation, worth, prices, _multipliers(allocation, worth, prices))
        if found == kept:
            break
        kept = found
    if not allocation.fits(kept):
        kept = allocation.least
    return _spend_the_rest(allocation, worth, kept, None if changing else prices)


def _worth(allocation: Allocation, values: Sequence[Tensor], index: int) -> np.ndarray:
    """Returns the value of each choice of one site, (choices,)."""
    ordered = values[index][allocation.order(index)].double().numpy()
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    return sums[list(allocation.counts[index])]


def _has_streams(cost: Cost) -> bool:
    """Returns True if the cost of a site may depend on the counts of other sites, else False."""
    if isinstance(cost, LinearCost):
        return bool(cost.pairs)
    return not isinstance(cost, TableCost) or any(curve.factor for curve in cost.curves)


def _costs_of_choices(allocation: Allocation, kept: Sequence[int]) -> list[list[np.ndarray]]:
    """Returns, for each site and limit, the cost of each choice, (choices,), as a fraction of the allowed cost.

    It is the difference from the smallest choice, while the other sites keep `kept`.
    """
    found = []
    for index, counts in enumerate(allocation.counts):
        rows = []
        for _, cost, allowed in allocation.limits:
            steps = np.array([cost.step(kept, index, count) for count in counts])
            rows.append((steps - steps[0]) / allowed)
        found.append(rows)
    return found


def _choice(
    allocation: Allocation,
    worth: Sequence[np.ndarray],
    prices: Sequence[Sequence[np.ndarray]],
    multipliers: Sequence[float],
) -> list[int]:
    """Returns the count of each site with the largest value minus its price. Of equal choices, the smaller one."""
    kept = []
    for counts, value, costs in zip(allocation.counts, worth, prices, strict=True):
        net = value - sum(each * cost for each, cost in zip(multipliers, costs, strict=True))
        kept.append(counts[int(np.argmax(net))])
    return kept


def _multipliers(
    allocation: Allocation, worth: Sequence[np.ndarray], prices: Sequence[Sequence[np.ndarray]]
) -> list[float]:
    """Returns the smallest multiplier of each limit with which the limits are met."""
    multipliers = [0.0] * len(allocation.limits)
    for _ in range(_SWEEPS):
        before = list(multipliers)
        for limit, (_, cost, allowed) in enumerate(allocation.limits):

            def met(multiplier: float, limit: int = limit, cost: Cost = cost, allowed: float = allowed) -> bool:
                """Returns True if this limit is met with this multiplier, while the others stay."""
                tried = [*multipliers[:limit], multiplier, *multipliers[limit + 1 :]]
                return cost.total(_choice(allocation, worth, prices, tried)) <= allowed * (1 + 1e-9)

            multipliers[limit] = _smallest(met, _largest_price(worth, [costs[limit] for costs in prices]))
        if before == multipliers:
            break
    return multipliers


def _largest_price(worth: Sequence[np.ndarray], costs: Sequence[np.ndarray]) -> float:
    """Returns a multiplier with which every site makes its cheapest choice."""
    steps = [np.diff(cost) for cost in costs]
    least = min((float(step[step > 0].min()) for step in steps if (step > 0).any()), default=1.0)
    return 2 * max((float(value[-1]) for value in worth), default=1.0) / least + 1


def _smallest(met: Callable[[float], bool], largest: float) -> float:
    """Returns the smallest multiplier for which `met` is True, by bisection. 0 if the limit is met without a price."""
    if met(0.0):
        return 0.0
    low, high = 0.0, largest
    for _ in range(_HALVINGS):
        # Multipliers may differ by many orders of magnitude, so the middle is geometric as soon as it can be.
        middle = (low * high) ** 0.5 if low else high * 1e-3
        low, high = (low, middle) if met(middle) else (middle, high)
        if low and high / low < 1 + 1e-12:
            break
    return high


def _spend_the_rest(
    allocation: Allocation,
    worth: Sequence[np.ndarray],
    kept: Sequence[int],
    fixed: list[list[np.ndarray]] | None,
) -> list[int]:
    """Adds units while a larger choice of a site fits, always the change with the largest gain for its cost.

    Args:
        allocation: The sites and limits.
        worth: The value of each choice.
        kept: The numbers of units so far. They meet the limits.
        fixed: The costs of all choices. None if they change with the numbers of units.
    """
    kept = list(kept)
    at = [counts.index(count) for counts, count in zip(allocation.counts, kept, strict=True)]
    while True:
        best: tuple[float, int, int] | None = None
        left = [1 - cost.total(kept) / allowed for _, cost, allowed in allocation.limits]
        prices = _costs_of_choices(allocation, kept) if fixed is None else fixed
        for index, (value, costs) in enumerate(zip(worth, prices, strict=True)):
            gain = value[at[index] + 1 :] - value[at[index]]
            more = [cost[at[index] + 1 :] - cost[at[index]] for cost in costs]
            fits = np.all([each <= rest + 1e-9 for each, rest in zip(more, left, strict=True)], axis=0)
            if not len(gain) or not fits.any():
                continue
            # The change counts by the limit that it uses most of.
            spent = np.maximum(np.max(more, axis=0), 1e-12)
            ratio = np.where(fits & (gain > 0), gain / spent, -np.inf)
            choice = int(np.argmax(ratio))
            if np.isfinite(ratio[choice]) and (best is None or ratio[choice] > best[0]):
                best = (float(ratio[choice]), index, at[index] + 1 + choice)
        if best is None:
            return kept
        _, index, chosen = best
        at[index], kept[index] = chosen, allocation.counts[index][chosen]
