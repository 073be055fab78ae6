"""Tests that metrics with times are read from JSON as they were written, also those of older releases."""

import json

import pytest

import xprune
from xprune.core.target import Target
from xprune.core.times import Ratio

TIMED = xprune.Metrics(
    0.9, 0.3, 100, macs=50, params=5, latency_ms=5.0, latency_rows=8, speedup=Ratio(1.6, 1.5, 1.7), dense_ms=8.0,
    target=Target("cuda:1", "bfloat16", 8, True, 2),
)  # fmt: skip


def through_json(metrics):
    return xprune.Metrics(**json.loads(json.dumps(metrics.to_json())))


@pytest.mark.parametrize("metrics", [TIMED, xprune.Metrics(0.9, 0.3, 100)])
def test_metrics_come_back_from_json(metrics):
    assert through_json(metrics) == metrics


def test_metrics_of_an_older_release_have_no_gain():
    old = {"metric": 0.9, "loss": 0.3, "samples": 100, "macs": 50, "params": 5, "latency_ms": 5.0, "latency_rows": 8}
    found = xprune.Metrics(**old)
    assert found.speedup is None and found.target is None and found.gain(TIMED) is None


def test_half_of_the_macs_at_twice_the_speed_is_a_gain_of_one():
    dense = xprune.Metrics(0.9, 0.3, 100, macs=100)
    assert xprune.Metrics(0.9, 0.3, 100, macs=50, speedup=Ratio(2, 2, 2)).gain(dense) == 1
    assert TIMED.gain(dense) == pytest.approx(0.8)
    assert TIMED.gain(xprune.Metrics(0.9, 0.3, 100)) is None, "the MACs of the dense model are not known"


@pytest.mark.parametrize(
    "wrong", [{"speedup": {"median": 1.0}}, {"speedup": {"median": "fast", "low": 1, "high": 1}}, {"target": {"a": 1}}]
)
def test_damaged_times_are_an_error_that_loading_knows(wrong):
    with pytest.raises((TypeError, ValueError, xprune.XPruneError)):
        xprune.Metrics(**{**TIMED.to_json(), **wrong})
