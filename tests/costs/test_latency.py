"""Tests that `latency` returns a positive time, measures on the target, and does not change the model."""

import pytest
import torch
from torch import nn

import xprune
from xprune.core.target import Target
from xprune.testing import assert_untouched, snapshot


def test_a_forward_pass_takes_time_and_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    before = snapshot(model)
    assert xprune.latency(model, torch.randn(4, 8), seconds=0.01) > 0
    assert_untouched(model, before)


def test_it_measures_on_the_target():
    seen = []
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].shape, args[0].dtype)))
    assert xprune.latency(model, torch.randn(4, 8), 0.01, Target(dtype="bfloat16", batch=6)) > 0
    # The search for the axis of the samples runs the model on other inputs first.
    assert seen[-1] == (False, (6, 8), torch.bfloat16)
    with pytest.raises(xprune.TargetError, match=r"device='xpu:9' cannot be used here"):
        xprune.latency(model, torch.randn(4, 8), target=Target(device="xpu:9"))


def test_the_caller_may_know_the_axis_of_the_samples():
    shapes = []
    model = nn.Linear(8, 8)
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    xprune.latency(model, torch.randn(4, 2, 8), 0.01, Target(batch=5), batch_axis=1)
    assert shapes[-1] == (4, 5, 8)
