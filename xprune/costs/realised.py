"""realised: chooses a plan, measures the time of its model, and corrects the plan until the time fits the budget."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from xprune.errors import BudgetError

GOOD = (0.965, 0.995)
"""A plan is good enough if its measured time is between these fractions of the allowed time.

Two measurements of the same model differ by one or two percent. So a plan that seems to take just the allowed time may
take a little more.
"""

AIM = 0.98
"""The fraction of the allowed time that a corrected plan aims at: the middle of `GOOD`."""

TRIES = 8
"""The largest number of plans that are measured."""

Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class Tried(Generic[Chosen]):
    """A plan whose model was measured.

    Args:
        chosen: What `choose` has returned.
        share: The fraction of the dense model's time that the table was asked for.
        realised: The measured fraction.

    Example:
        >>> Tried("a plan", share=0.5, realised=0.54).realised
        0.54
    """

    chosen: Chosen
    share: float
    realised: float


def corrected(
    choose: Callable[[float], Chosen],
    measure: Callable[[Chosen], float],
    asked: float,
    least: float,
    counts: Callable[[Chosen], object],
) -> list[Tried[Chosen]]:
    """Finds a plan whose model takes the time that was asked for, or a little less.

    A latency table predicts the time of a model from the times of its modules alone. The model as a whole takes another
    time: caches are shared, and kernels of different modules overlap. So the fraction that the table is asked for is
    corrected by the measured fraction, with the straight line through the two last measurements, between the bounds
    that earlier measurements have set.

    Args:
        choose: A function that returns the plan for a fraction of the dense model's time, as the table predicts it.
        measure: A function that returns the measured fraction of a plan.
        asked: The fraction that the budget allows.
        least: The smallest fraction that the table can predict. `choose` is not called with less.
        counts: A function that returns what identifies a plan: the numbers of kept units.

    Returns:
        All plans that were measured. The last one is the best: it meets the budget.

    Raises:
        BudgetError: Even the smallest plan takes more time.

    Example:
        A table that predicts too little: each plan takes 0.05 more than predicted.

        >>> tried = corrected(lambda share: share, lambda plan: plan + 0.05, asked=0.5, least=0.1, counts=str)
        >>> [round(each.realised, 3) for each in tried]
        [0.54, 0.495]
    """
    if asked >= 1:
        # The dense model itself meets the budget, so nothing is removed for it.
        whole = choose(1.0)
        return [Tried(whole, 1.0, measure(whole))]
    tried: list[Tried[Chosen]] = []
    share = max(least, AIM * asked)
    while True:
        chosen = choose(share)
        known = next((each for each in tried if counts(each.chosen) == counts(chosen)), None)
        tried.append(Tried(chosen, share, known.realised if known else measure(chosen)))
        now = tried[-1]
        if GOOD[0] * asked <= now.realised <= GOOD[1] * asked:
            return tried
        if now.realised > asked and share <= least:
            raise _unreachable(asked, now.realised)
        if now.realised < asked and share >= 1:
            return tried
        share = _next(tried, asked, least)
        if len(tried) >= TRIES or any(abs(each.share - share) < 1e-4 for each in tried):
            break
    fitting = [each for each in tried if each.realised <= asked]
    if fitting:
        return [*tried, max(fitting, key=lambda each: each.realised)]
    # No plan has met the budget yet, so the time falls slowly with the fraction. The smallest model may meet it.
    return [*tried, *_smallest(choose, measure, asked, least, min(each.share for each in tried))]


def _next(tried: list[Tried[Chosen]], asked: float, least: float) -> float:
    """Returns the fraction to ask the table for next."""
    now = tried[-1]
    over = min((each.share for each in tried if each.realised > asked), default=1.0)
    under = max((each.share for each in tried if each.realised <= asked), default=least)
    slope = now.realised / now.share
    if len(tried) > 1 and tried[-2].share != now.share:
        between = (now.realised - tried[-2].realised) / (now.share - tried[-2].share)
        # Noise can make the line flat or falling. Then the ratio is used, as in the first step.
        slope = between if 0.3 < between < 3 else slope
    share = now.share + (AIM * asked - now.realised) / slope
    if not under < share < over:
        share = (under + over) / 2
    return min(1.0, max(least, share))


def _smallest(
    choose: Callable[[float], Chosen], measure: Callable[[Chosen], float], asked: float, least: float, share: float
) -> list[Tried[Chosen]]:
    """Lowers the fraction in steps, from `share` to `least`, until a plan meets the budget."""
    tried: list[Tried[Chosen]] = []
    for step in (0.75, 0.5, 0.25, 0.0):
        now = least + step * (share - least)
        chosen = choose(now)
        tried.append(Tried(chosen, now, measure(chosen)))
        if tried[-1].realised <= asked:
            return tried
    raise _unreachable(asked, tried[-1].realised)


def _unreachable(asked: float, realised: float) -> BudgetError:
    """Returns the error for a budget that even the smallest plan does not meet."""
    reach = math.ceil(realised * 1e3) / 1e3
    return BudgetError(
        f"latency={asked:.12g} cannot be reached: the smallest model takes {reach} of the dense model's time. Ask for "
        "a larger fraction, lower min_units, add unit kinds with units=, or give a larger batch in target=."
    )
