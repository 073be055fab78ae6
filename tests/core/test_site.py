"""Tests which slices of a tensor belong to a unit, and sites as plain data."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xprune

SITE = xprune.Site(
    "blocks.0.attn",
    "head",
    3,
    8,
    ("blocks.0.attn.proj",),
    cuts=(xprune.Cut("blocks.0.attn.qkv.weight", 0, 3, 8), xprune.Cut("blocks.0.attn.proj.weight", 1, 1, 8)),
    module="blocks.0.attn",
    adapter="timm-attention",
    norms=("blocks.0.attn.norm",),
    attributes=("blocks.0.attn.num_heads",),
)


@given(groups=st.integers(1, 4), size=st.integers(1, 6), width=st.integers(1, 4), chance=st.randoms())
def test_a_cut_keeps_the_entries_of_kept_units_in_order(groups, size, width, chance):
    keep = sorted(chance.sample(range(size), chance.randint(0, size)))
    slow = [(g * size + u) * width + w for g in range(groups) for u in range(size) if u in keep for w in range(width)]
    assert xprune.Cut("a", 0, groups, width).index(keep, size).tolist() == slow


def test_keeping_every_unit_keeps_every_entry():
    assert torch.equal(xprune.Cut("a", 0, 3, 2).index(range(5), 5), torch.arange(30))


@pytest.mark.parametrize(
    "site",
    [
        SITE,
        replace(SITE, consumers=("a", "b"), axes=(1, -1), batch=1),
        replace(SITE, kind="channel", module="", adapter="", layout="width-major"),
    ],
)
def test_a_site_survives_json(site):
    assert xprune.Site.from_json(json.loads(json.dumps(site.to_json()))) == site


def test_files_keep_their_keys():
    data = replace(SITE, consumers=("a", "b"), axes=(1, -1)).to_json()
    assert (data["layer"], data["axis"]) == ("a", 1)
    assert (data["feeds"], data["axes"]) == (("a", "b"), (1, -1))
    assert data["counts"] == ("blocks.0.attn.num_heads",)
    assert not {"consumers", "attributes"} & set(data)


def test_a_site_needs_consumers_and_an_axis_for_each():
    assert replace(SITE, consumers=("a", "b"), axes=()).axes == (-1, -1)
    for wrong in ((), "blocks.0.attn.proj"):
        with pytest.raises(xprune.PlanError, match="Give a tuple of the paths"):
            replace(SITE, consumers=wrong, axes=())


def test_a_site_of_an_older_file_is_read():
    data = SITE.to_json()
    for name in ("norms", "axes", "feeds", "batch"):
        del data[name]
    assert xprune.Site.from_json({**data, "norm": "blocks.0.attn.norm"}) == SITE
    assert xprune.Site.from_json({**data, "norm": ""}).norms == ()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kind": "expert"}, "unknown kind of unit 'expert'; known: head, neuron, channel"),
        ({"kind": 3}, "wanted str"),
        ({"size": "3"}, "wanted int"),
        ({"size": True}, "wanted int"),
        ({"size": 0}, "at least 1"),
        ({"layout": "diagonal"}, "unit-major, width-major"),
        ({"axes": (1, 1)}, "2 axes for 1 consumers"),
        ({"cuts": [{"tensor": "a"}]}, "not a site"),
        ({"cuts": None}, "not a site"),
        ({"colour": "red"}, "not a site"),
    ],
)
def test_data_that_is_no_site_is_refused(changed, says):
    with pytest.raises(xprune.PlanError, match=says):
        xprune.Site.from_json({**SITE.to_json(), **changed})


@pytest.mark.parametrize("data", [None, 3, "site", [], {}])
def test_what_is_no_data_of_a_site_at_all_is_refused(data):
    with pytest.raises(xprune.PlanError, match="not a site"):
        xprune.Site.from_json(data)


def test_the_modules_whose_cost_depends_on_the_units():
    assert SITE.modules == ("blocks.0.attn",)
    beside = replace(SITE, cuts=(*SITE.cuts, xprune.Cut("bias.table", 1)))
    assert beside.modules == ("blocks.0.attn", "bias")
    assert replace(SITE, module="", adapter="").modules == ("blocks.0.attn.qkv", "blocks.0.attn.proj")


def test_sites_say_what_was_left():
    sites = xprune.Sites([SITE], {"blocks.1.attn": "it has one head"})
    assert sites == (SITE,) and sites.left == {"blocks.1.attn": "it has one head"} and xprune.Sites().left == {}
