"""Tests which tensors `Scores` accepts for which sites, and classes without scores."""

import pytest
import torch

import xprune
from xprune.core.scores import LowRank

SITES = (xprune.Site("a", "head", 3, 4, ("a",)), xprune.Site("b", "neuron", 5, 1, ("b",)))
ONES = (torch.ones(3), torch.ones(5))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"values": ONES[:1]}, "1 score tensors for 2 sites"),
        ({"values": (torch.ones(5), torch.ones(3))}, "a has 3 units"),
        ({"values": (torch.ones(3, 1), torch.ones(5))}, "a has 3 units"),
        ({"values": (torch.tensor([1.0, torch.nan, 1.0]), ONES[1])}, "not finite"),
        ({"values": (torch.tensor([1.0, torch.inf, 1.0]), ONES[1])}, "not finite"),
        ({"scale": "world"}, "allowed are site, loss, plan"),
    ],
)
def test_scores_that_do_not_fit_are_refused(given, says):
    with pytest.raises(xprune.PluginError, match=says):
        xprune.Scores(**{"sites": SITES, "values": ONES, "criterion": "mine", **given})


def test_low_rank_rows_are_those_of_the_whole_table():
    left, right, offset = torch.randn(7, 2), torch.randn(2, 5), torch.randn(5)
    low, whole = LowRank(left, right, offset), offset + left @ right
    assert low.shape == (7, 5)
    for index in (3, torch.tensor([6, 0, 0]), torch.arange(7) % 2 == 0):
        torch.testing.assert_close(low[index], whole[index])


@pytest.mark.parametrize("low_rank", [False, True])
def test_classes_that_no_sample_told_of(low_rank):
    table = torch.randn(6, 3)
    table[[1, 4]] = torch.nan
    classwise = (LowRank(table, torch.randn(3, 3), torch.zeros(3)) if low_rank else table, torch.randn(6, 5))
    assert xprune.Scores(SITES, ONES, "mine", classwise).unseen == (1, 4)
    assert xprune.Scores(SITES, ONES, "mine").unseen == ()


@pytest.mark.parametrize(
    ("values", "tied", "says"),
    [
        ((torch.arange(3.0), torch.arange(5.0)), (), ""),
        ((torch.zeros(3), torch.arange(5.0)), ("a",), "gives all units of a the same score"),
        ((torch.zeros(3), torch.full((5,), -2.0)), ("a", "b"), "gives all units of every site the same score"),
    ],
)
def test_sites_whose_units_have_the_same_score(values, tied, says):
    scores = xprune.Scores(SITES, values, "mine")
    assert scores.tied == tied and says in scores.note and bool(scores.note) == bool(tied)


def test_a_site_with_one_unit_is_not_tied():
    site = xprune.Site("a", "head", 1, 4, ("a",))
    assert not xprune.Scores((site,), (torch.zeros(1),), "mine").note
