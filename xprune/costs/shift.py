"""Finds the shift of logits at which masks have a wanted cost, with few calls and without waiting for the device.

`UnitCosts.settle` uses it. It is a file of its own because it is only numbers: it knows nothing about budgets.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MARGIN = 20.0
"""How far beyond the smallest and the largest logit the shift may lie. There, all masks are 1 or 0, up to 2e-9."""

_TINY = 1e-9
"""The smallest distance between two costs that is not treated as 0. Costs are fractions of the dense model's cost."""


def points_and_rounds(device: torch.device) -> tuple[int, int]:
    """Returns at how many shifts the cost is evaluated at once, and how often, on a device.

    Both choices find the shift about equally well. A CPU computes for as long as there are evaluations, so it takes the
    choice with fewer of them. An accelerator often waits for Python, so it takes the choice with fewer calls.
    """
    return (4, 7) if device.type == "cpu" else (32, 3)


@torch.no_grad()
def solve_shift(
    logits: Tensor,
    cost: Callable[[Tensor], Tensor],
    allowed: Tensor,
    least: Tensor,
    most: Tensor,
    points: int,
    rounds: int,
) -> Tensor:
    """Finds, for each row, the shift x at which the cost of the masks sigmoid(logits - x) is the allowed cost.

    Each cost falls if x grows. So there is one such shift for each limit, and the largest of them meets all limits.

    **Method.** An interval that contains the shift is divided by equally distant points. The cost is computed at all
    points at once, and the part that contains the shift is the next interval. In the last round, a straight line is
    drawn between the two points around the shift. The line is not drawn for the cost, but for log(u / v), where u is
    the cost above the smallest possible cost, and v is the cost that is missing to the largest possible cost. If all
    logits are equal, this function of the shift is a straight line itself. If they differ, it is almost one between two
    points that are close together.

    The number of calls is fixed, and no number is read from the device. The result depends on nothing but the
    arguments. So a resumed run finds the same shift as a run that was not killed.

    Args:
        logits: The logits, divided by the temperature, (rows, units). Infinity for a unit that always stays.
        cost: A function of masks (rows, points, units) that returns the costs, (rows, points, limits).
        allowed: The allowed cost, (rows, limits), or (1, limits) if it is the same for all rows.
        least: The cost if only those units stay that always stay, (rows, limits).
        most: The cost if all units stay, (limits,).
        points: The number of points in a round.
        rounds: The number of rounds.

    Returns:
        The shift, (rows, 1). It lies at most `MARGIN` beyond the logits. This limit matters only if a row may keep all
        its units or none.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 8.0]])
        >>> unit = torch.tensor([[0.5, 0.5]])  # each of the two units costs one half
        >>> def cost(masks):
        ...     return masks @ unit.T
        >>> allowed, least, most = torch.tensor([[0.5]]), torch.zeros(2, 1), torch.ones(1)
        >>> shift = solve_shift(logits, cost, allowed, least, most, points=4, rounds=7)
        >>> (shift.round(decimals=3) + 0.0).flatten().tolist()
        [0.0, 4.0]
    """
    # Units that always stay count as 0 in the two ends. This makes the interval longer at most.
    finite = logits.where(logits.isfinite(), 0.0)
    low, high = finite.amin(1, keepdim=True) - MARGIN, finite.amax(1, keepdim=True) + MARGIN
    wanted = ((allowed - least).clamp_min(_TINY).log() - (most - allowed).clamp_min(_TINY).log())[:, None]
    for number in range(rounds):
        # In the last round, the two ends are points too, since the line needs the costs there.
        last = number + 1 == rounds
        share = torch.linspace(0, 1, points if last else points + 2, device=logits.device, dtype=logits.dtype)
        ends = torch.lerp(low, high, share)  # (rows, points)
        inner = ends if last else ends[:, 1:-1]
        costs = cost((logits[:, None] - inner[:, :, None]).sigmoid_())
        if not last:
            # The costs fall from point to point. So the number of points that are too dear is the place of the last one
            # among `ends`.
            place = (costs > allowed[:, None]).any(2).sum(1, keepdim=True)
        else:
            used, left = (costs - least[:, None]).clamp_min(_TINY), (most - costs).clamp_min(_TINY)
            over = (used.log() - left.log() - wanted).amax(2)
            # If the shift lies at an end of the first interval, all points or none are too dear.
            place = (over > 0).sum(1, keepdim=True).sub(1).clamp(0, points - 2)
        low, high = ends.gather(1, place), ends.gather(1, place + 1)
    before, after = over.gather(1, place), over.gather(1, place + 1)
    part = (before / (before - after).clamp_min(_TINY)).clamp(0, 1)
    return torch.lerp(low, high, part)
