"""Tests that `latency` returns a positive time and does not change the model."""

import torch
from torch import nn

import xprune
from xprune.testing import assert_untouched, snapshot


def test_a_forward_pass_takes_time_and_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    before = snapshot(model)
    assert xprune.latency(model, torch.randn(4, 8), seconds=0.01) > 0
    assert_untouched(model, before)
