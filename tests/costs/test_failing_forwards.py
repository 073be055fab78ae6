"""Tests that measuring costs gives numbers or a clear error."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import build, images


class Rigid(nn.Module):
    """A module that runs only with all its hidden features."""

    def __init__(self, problem):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
        self.head, self.problem = nn.Linear(8, 3), problem

    def forward(self, x):
        if len(self.mlp[0].weight) != 6 and self.problem:
            raise self.problem
        return self.head(x + self.mlp(x))


PROBLEMS = {
    "of any kind": ZeroDivisionError("by nothing"),
    "without a message": AssertionError(),
    "of types": TypeError("no"),
    "as on the meta device": NotImplementedError("not here"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_cut_forward_that_fails_is_an_error_in_words(name):
    x = torch.randn(2, 8)
    sites = xprune.find_sites(Rigid(None), x)
    kind = type(PROBLEMS[name]).__name__
    with pytest.raises(xprune.ModelError, match=f"with units gone the forward fails: {kind}"):
        xprune.measure_costs(Rigid(PROBLEMS[name]), sites, x)


def test_a_forward_that_fails_is_an_error_in_words():
    model, x = Rigid(None), torch.randn(2, 8)
    sites = xprune.find_sites(model, x)
    for axis in (None, 0):
        with pytest.raises(xprune.ModelError, match="fails on the example inputs"):
            xprune.count_macs(model, torch.randn(2, 7), batch_axis=axis)
        with pytest.raises(xprune.ModelError, match="fails on the example inputs"):
            xprune.measure_costs(model, sites, torch.randn(2, 7), batch_axis=axis)


def test_sites_of_another_model_are_refused():
    sites = xprune.find_sites(build("vit"), images())
    with pytest.raises(xprune.PlanError, match="does not fit this model"):
        xprune.measure_costs(build("vit"), [replace(sites[0], module="x", consumers=("x",))], images())
