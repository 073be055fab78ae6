"""Tests every built-in criterion on three architectures, and compares equations with slow references."""

import pytest
import torch
from torch import nn

import xprune
from tests.support import reference
from tests.support.models import CLASSES, THREE, build, images, loader
from xprune.criteria.magnitude import Magnitude
from xprune.criteria.taylor import Taylor
from xprune.criteria.xpruner.criterion import XPruner
from xprune.testing import check_criterion

QUICK = {"xpruner": XPruner(steps=40)}
"""Fewer steps than by default: the contract is the same."""


@pytest.mark.parametrize("model", THREE)
@pytest.mark.parametrize("criterion", xprune.CRITERIA)
def test_contract(criterion, model):
    check_criterion(QUICK.get(criterion, criterion), build(model), loader())


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("kind", ["squared", "abs"])
def test_taylor_against_finite_differences(name, kind):
    model, batches = build(name), list(loader(8, 4))
    site = xprune.find_sites(model, images())[0 if kind == "abs" else 1]
    scores = xprune.score(model, [site], batches, Taylor(kind=kind))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    slow = reference.taylor(build(name), site, x, y)
    expected = slow.square().mean(0) if kind == "squared" else slow.mean(0).abs()
    torch.testing.assert_close(scores.values[0].double(), expected, rtol=2e-3, atol=1e-7)
    table = scores.classwise[0]
    assert table.shape == (CLASSES, site.size)
    for label in range(CLASSES):
        of_class = slow[y == label]
        expected = of_class.square().mean(0) if kind == "squared" else of_class.mean(0).abs()
        torch.testing.assert_close(table[label].double(), expected, rtol=2e-3, atol=1e-7)


def test_classes_that_were_not_seen_are_nan():
    x, y = images(4), torch.tensor([0, 0, 2, 2])
    model = build("vit")
    scores = xprune.score(model, xprune.find_sites(model, x), [(x, y)], "taylor")
    seen = [not bool(row.isnan().any()) for row in scores.classwise[0]]
    assert seen == [True, False, True, False, False, False, False]
    assert all(torch.isfinite(value).all() for value in scores.values)


def test_taylor_does_not_depend_on_the_batches():
    model = build("vit")
    sites = xprune.find_sites(model, images())
    one, many = (xprune.score(model, sites, loader(15, batch), "taylor") for batch in (15, 4))
    for a, b in zip(one.values, many.values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


class TwoHeads(nn.Module):
    """A model with a second classifier, which the loss does not use."""

    def __init__(self, used=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
        self.other, self.head = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)), nn.Linear(8, 3)
        self.used = used

    def forward(self, x):
        other = self.other(x)
        x = x + self.body(x) if self.used else (x + self.body(x)).detach()
        return {"logits": self.head(x), "other": other}


def test_a_site_that_does_not_feed_the_loss_has_scores_of_zero():
    torch.manual_seed(0)
    model, x, y = TwoHeads(), torch.randn(6, 8), torch.arange(6) % 3
    sites = xprune.find_sites(model, x)
    assert [site.name for site in sites] == ["body", "other"]
    scores = xprune.score(model, sites, [(x[:4], y[:4]), (x[4:], y[4:])], "taylor")
    assert scores.info["no gradient"] == ["other"]
    assert not scores.values[1].any() and not scores.classwise[1].any()
    alone = xprune.score(model, sites[:1], [(x[:4], y[:4]), (x[4:], y[4:])], "taylor")
    assert "no gradient" not in alone.info
    torch.testing.assert_close(scores.values[0], alone.values[0])


def test_a_loss_that_depends_on_no_site_is_refused():
    model, x = TwoHeads(), torch.randn(6, 8)
    sites = xprune.find_sites(model, x)
    with pytest.raises(xprune.TrainingError, match="does not depend on the units of any site"):
        xprune.score(TwoHeads(used=False), sites, [(x, torch.arange(6) % 3)], "taylor")


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_of_every_weight_that_leaves(name, p):
    model, inputs = build(name), images()
    for site in xprune.find_sites(model, inputs)[:2]:
        (values,) = xprune.score(model, [site], criterion=Magnitude(p=p)).values
        for unit in (0, site.size - 1):
            assert reference.magnitude(model, site, unit, inputs, p) == pytest.approx(float(values[unit]), rel=1e-4)


def test_chance_depends_on_the_seed_alone():
    model = build("vit")
    sites = xprune.find_sites(model, images())
    a, b, c = (xprune.score(model, sites, criterion="random", seed=seed).values[1] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_settings_out_of_range_are_refused():
    for bad in (lambda: Taylor(kind="third"), lambda: Taylor(batches=0), lambda: Magnitude(p=3)):
        with pytest.raises(xprune.PluginError, match=r"allowed|at least"):
            bad()
