"""Tests that a model that takes tokens first gives the same results as its batch-first twin."""

from functools import cache

import pytest
import torch

import xprune
from tests.support.sequence_models import CLASSES, DIM, Classifier, turned
from xprune.testing import check_adapter


def data(rows, length):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, length, DIM, generator=generator)
    return x, torch.arange(rows) % CLASSES


@cache
def pruned(rows, length, batch_first, axis):
    """(sites, costs, scores, plan, MACs of the pruned model)."""
    x, y = data(rows, length)
    model, inputs = Classifier(batch_first), x if batch_first else turned(x)
    sites = xprune.find_sites(model, inputs, batch_axis=axis)
    costs = xprune.measure_costs(model, sites, inputs, batch_axis=axis)
    scores = xprune.score(model, sites, [(inputs, y)], "taylor")
    plan = xprune.select(model, scores, xprune.Budget(macs=0.6), example_inputs=inputs)
    macs = xprune.count_macs(xprune.apply(model, plan, inputs), inputs, batch_axis=axis)
    return sites, costs, scores, plan, macs


@pytest.mark.parametrize("batch_axis", [None, 1])
@pytest.mark.parametrize(("rows", "length"), [(4, 5), (4, 8), (4, 4)])
def test_a_model_of_tokens_first_gets_the_plan_of_its_twin(rows, length, batch_axis):
    sites, costs, scores, plan, macs = pruned(rows, length, True, None)
    sites_, costs_, scores_, plan_, macs_ = pruned(rows, length, False, batch_axis)
    assert [(s.name, s.size) for s in sites] == [(s.name, s.size) for s in sites_]
    assert plan.keeps == plan_.keeps and macs == macs_
    assert costs.macs.total(plan.counts) == pytest.approx(costs_.macs.total(plan.counts))
    for a, b in zip(scores.values, scores_.values, strict=True):
        torch.testing.assert_close(a, b)
    assert [s.batch for s in sites] == [0] * 4 and [s.batch for s in sites_] == [0, 1] * 2


@pytest.mark.parametrize("length", [5, 8])
def test_each_sample_has_gates_of_its_own(length):
    x, _ = data(4, length)
    model, inputs = Classifier(False), turned(x)
    sites = check_adapter(model, inputs, seeds=range(1))
    rows = [torch.rand(4, site.size) for site in sites]
    with xprune.Gates(sites, rows).attached(model), torch.no_grad():
        together = model(inputs)
    for index in range(4):
        with xprune.Gates(sites, [row[index] for row in rows]).attached(model), torch.no_grad():
            torch.testing.assert_close(together[index], model(inputs[:, index : index + 1])[0])


class Coupled(torch.nn.Module):
    """Mixes samples and tokens in the same way, so the sample axis cannot be found."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(DIM, 12), torch.nn.GELU(), torch.nn.Linear(12, DIM))
        self.head = torch.nn.Linear(DIM, CLASSES)

    def forward(self, x):
        return self.head(x + self.mlp(x) - x.mean((0, 1), keepdim=True))


def test_an_axis_that_cannot_be_told_has_to_be_given():
    model, (x, _) = Coupled(), data(4, 8)
    sites = xprune.find_sites(model, x)
    assert [site.batch for site in sites] == [-1]
    with xprune.Gates(sites, [torch.rand(4, 12)]).attached(model), pytest.raises(xprune.GateError, match="batch_axis="):
        model(x)
    for count in (lambda: xprune.count_macs(model, x), lambda: xprune.measure_costs(model, sites, x)):
        with pytest.raises(xprune.ModelError, match="give batch_axis="):
            count()
    for axis, samples in ((0, 4), (1, 8)):
        (site,) = xprune.find_sites(model, x, batch_axis=axis)
        assert site.batch == axis
        rows = torch.rand(samples, 12)
        with xprune.Gates([site], [rows]).attached(model):
            model(x)
    assert 2 * xprune.count_macs(model, x, batch_axis=1) == xprune.count_macs(model, x, batch_axis=0)


def test_an_axis_that_the_inputs_do_not_have_is_refused():
    with pytest.raises(xprune.ModelError, match="batch_axis=3: no tensor of the example inputs"):
        xprune.count_macs(Coupled(), data(4, 8)[0], batch_axis=3)
