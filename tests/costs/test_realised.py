"""Tests that plans are corrected until the measured time fits, also if times are noisy and tables are wrong."""

import random

import pytest

from xprune.costs.realised import GOOD, TRIES, corrected
from xprune.errors import BudgetError

WRONG = {
    "right": lambda share: share,
    "too hopeful": lambda share: share + 0.15 * (1 - share),
    "too careful": lambda share: share - 0.2 * (1 - share),
    "bent": lambda share: share**0.5,
    "steps": lambda share: round(share * 12) / 12 * 0.97,
    "overhead": lambda share: max(0.35, share),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("asked", [0.8, 0.6, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_last_plan_meets_the_budget(wrong, asked, noise):
    chance = random.Random(0)
    measured = []

    def measure(share):
        measured.append(share)
        return WRONG[wrong](share) * (1 + chance.uniform(-noise, noise))

    tried = corrected(lambda share: round(share, 4), measure, asked, least=0.05, counts=lambda plan: plan)
    assert tried[-1].realised <= asked
    assert len(measured) <= TRIES + 4
    if wrong != "steps":
        assert tried[-1].realised >= GOOD[0] * asked - 2 * noise
    # No plan is measured twice.
    assert len(set(measured)) == len(measured)


def test_a_time_that_never_falls_is_an_error_that_names_the_least():
    with pytest.raises(BudgetError, match=r"latency=0.5 cannot be reached: the smallest model takes 0.7"):
        corrected(lambda share: share, lambda share: max(0.7, share), 0.5, least=0.1, counts=lambda plan: plan)


def test_another_limit_that_is_narrower_ends_the_search():
    tried = corrected(lambda share: min(share, 0.3), lambda plan: plan, 0.6, least=0.1, counts=lambda plan: plan)
    assert tried[-1].realised == 0.3
