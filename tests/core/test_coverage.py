"""Tests the share of the MACs that units cover, and the text about modules that were left alone."""

import json

import pytest
import torch
from torch import nn

import xprune
from tests.support.composite_models import towers
from tests.support.models import build, images
from xprune.core.coverage import percent, short_reason


@pytest.mark.parametrize("units", [("head", "neuron"), ("head",), ("neuron",), ("head", "neuron", "channel")])
def test_the_share_is_what_the_smallest_model_saves(units):
    model, x = build("vit"), images()
    sites = xprune.find_sites(model, x, units=units)
    costs = xprune.measure_costs(model, sites, x)
    coverage = xprune.Coverage.of(costs, sites.left)
    whole = costs.macs.total([site.size for site in sites])
    assert coverage.share == pytest.approx(1 - costs.macs.total([0] * len(sites)) / whole)
    if "channel" not in units:
        # With min_units=0, the model without heads and neurons can really be made.
        smallest = xprune.apply(model, xprune.Plan(tuple(sites), ((),) * len(sites)), x)
        assert coverage.share == pytest.approx(1 - xprune.count_macs(smallest, x) / whole, abs=1e-4)
    assert 0.3 < coverage.share <= 1 and coverage.part is None and coverage.sites == len(sites)


def test_more_units_cover_more():
    model, x = build("vit"), images()
    shares = []
    for units in (("head",), ("head", "neuron"), ("head", "neuron", "channel")):
        sites = xprune.find_sites(model, x, units=units)
        shares.append(xprune.Coverage.of(xprune.measure_costs(model, sites, x)).share)
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("inside", ["left.*", ["left.*", "right.*"], "right.blocks.1.*"])
def test_the_share_of_a_part_is_one_of_the_part(inside):
    model, x = towers()
    sites = xprune.find_sites(model, x, inside=inside)
    costs = xprune.measure_costs(model, sites, x)
    coverage = xprune.Coverage.of(costs, sites.left, sites.inside)
    smallest = xprune.apply(model, xprune.Plan(tuple(sites), ((),) * len(sites)), x)
    saved = xprune.count_macs(model, x) - xprune.count_macs(smallest, x)
    assert coverage.share * coverage.part == pytest.approx(saved / xprune.count_macs(model, x), rel=1e-3)
    assert f"the MACs inside {', '.join(sites.inside)}" in coverage.text
    assert f"This part has {percent(coverage.part)} of the model's MACs." in coverage.text


WHY = "it has a single head, which is the whole attention, so no head can be removed."


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (None, "(2 sites)."),
        ({}, "(2 sites). No module was left alone."),
        ({"pooler.attn": WHY}, f"(2 sites). Left alone: pooler.attn: {WHY}"),
        ({f"blocks.{i}.attn": f"blocks.{i}.attn has {i} heads. Write an adapter." for i in range(24)},
         "Left alone: 24 modules, for example blocks.0.attn: blocks.0.attn has 0 heads."),
        ({"a": "one.", "b": "two 0.5", "c": "two 1e-3"}, "3 modules for 2 reasons, for example b: two 0.5."),
        ({"a": "x" * 500}, "x" * 197 + "..."),
        ({"a": "first line\n  and second. Then more"}, "a: first line and second."),
    ],
)  # fmt: skip
def test_the_text_is_one_line_that_groups_reasons(left, says):
    text = xprune.Coverage(0.5, 2, left).text
    assert text.startswith("Units cover 50 % of the model's MACs (2 sites).") and text.endswith(says)
    assert "\n" not in text and len(text) < 400


def test_every_module_is_in_one_group():
    left = {f"b.{i}": f"reason {i % 3} {'x' * (i % 2)}" for i in range(9)} | {"c": "another"}
    reasons = xprune.Coverage(None, 1, left).reasons
    assert sorted(path for _, paths in reasons for path in paths) == sorted(left)
    assert all(left[paths[0]] == why for why, paths in reasons)
    assert [len(paths) for _, paths in reasons] == [5, 4, 1]


@pytest.mark.parametrize(
    "coverage",
    [
        xprune.Coverage(0.93, 24, {"a": WHY}),
        xprune.Coverage(None, 1),
        xprune.Coverage(1.0, 3, {}, ("vision.*", "text.*"), 0.4),
    ],
)
def test_json_gives_it_back(coverage):
    assert xprune.Coverage.from_json(json.loads(json.dumps(coverage.to_json()))) == coverage


GOOD = xprune.Coverage(0.5, 2, {"a": "b"}, ("c",), 0.5).to_json()


@pytest.mark.parametrize(
    "changes",
    [{"share": 1.5}, {"share": "0.5"}, {"sites": 2.0}, {"left": {"a": 1}}, {"left": ["a"]}, {"inside": "abc"},
     {"inside": [1]}, {"part": -1}, {"inside": None}],
)  # fmt: skip
def test_other_data_are_refused(changes):
    with pytest.raises(xprune.PlanError, match="not a coverage"):
        xprune.Coverage.from_json({**GOOD, **changes})
    for data in (None, [], "x", {}):
        with pytest.raises(xprune.PlanError, match="not a coverage"):
            xprune.Coverage.from_json(data)


def test_a_model_without_macs_has_no_share():
    sites = (xprune.Site("a", "neuron", 4, 1, ("a.fc2",), module="a"),)
    costs = xprune.Costs(sites, {"params": xprune.LinearCost(1.0, (0.0,), (2.0,))})
    found = xprune.Coverage.of(costs)
    assert found.share is None and "an unknown share" in found.text
    zero = xprune.Costs(sites, {"macs": xprune.LinearCost(0.0, (0.0,), (0.0,))})
    assert xprune.Coverage.of(zero).share is None


def test_an_abbreviation_ends_no_reason():
    assert short_reason("as in timm.layers.Mlp, vs. others. Then more") == "as in timm.layers.Mlp, vs. others."


def test_a_run_prints_it_once_and_keeps_it(capsys, tmp_path):
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
    data = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
    run = xprune.pipeline.Run(model, data, latency=False)
    pruner = xprune.Pruner(model, "magnitude", finetune=None, latency=False)
    first, second = pruner.carry_out(run), pruner.carry_out(run)
    assert capsys.readouterr().out.splitlines() == [first.coverage.text]
    assert first.coverage == second.coverage and first.coverage.text in first.summary()
    again = xprune.PruneResult.load(first.save(tmp_path / "saved"), lambda: model)
    assert again.coverage == first.coverage and again.summary() == first.summary()


def test_sites_of_the_caller_say_nothing_about_the_rest():
    model, x = towers()
    sites = xprune.find_sites(model, x)
    data = [(x, torch.tensor([0, 1, 2]))]
    known = xprune.pipeline.Run(model, data, sites=sites).coverage
    unknown = xprune.pipeline.Run(model, data, sites=list(sites)).coverage
    assert known.left == {} and unknown.left is None and known.share == unknown.share
