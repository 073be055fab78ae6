"""Tests that attentions and MLPs without an adapter are found by their structure, or left alone with a reason."""

import copy
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import xprune
from tests.support.generic_models import (
    DIM,
    TOKENS,
    Apart,
    Biased,
    Bypass,
    CausalSelfAttention,
    Fused,
    HeadFirst,
    Model,
    Packed,
    Pair,
    Residual,
    Shared,
    Talking,
    Telling,
    Uneven,
    attend,
)
from xprune.report.text import found_tables, render
from xprune.testing import assert_untouched, check_adapter, check_exact, random_plan, snapshot

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"


def example():
    return torch.randn(2, TOKENS, 7, generator=torch.Generator().manual_seed(0))


FOUND = {
    "fused": (Fused, {}, 4),
    "heads as wide as there are heads": (Fused, {"heads": 4, "width": 4}, 4),
    "heads first": (HeadFirst, {}, 4),
    "heads first and square": (HeadFirst, {"heads": 3, "width": 3}, 3),
    "q and kv": (Pair, {}, 4),
    "apart": (Apart, {}, 4),
    "grouped queries": (Apart, {"kv": 2}, 2),
    "one key for all": (Shared, {}, 4),
    "one key for all, as wide as there are heads": (Shared, {"heads": 4, "width": 4}, 4),
    "tensors of each head": (Biased, {}, 4),
    "weights beside the output": (Telling, {}, 4),
    "residual inside": (Residual, {}, 4),
    "another layer after the output": (Uneven, {}, 4),
    "width of the input": (CausalSelfAttention, {}, 4),
}


@pytest.mark.parametrize("name", FOUND)
def test_attention_is_found_without_an_adapter(name):
    attention, kwargs, units = FOUND[name]
    model = Model(attention, **kwargs)
    sites = check_adapter(model, example(), seeds=range(2))
    heads = [site for site in sites if site.kind == "head"]
    adapter = "derived" if attention is CausalSelfAttention else ""
    assert [(site.size, site.adapter) for site in heads] == [(units, adapter)] * 2
    assert not sites.left
    whole = attention not in (Telling, Residual, Uneven)
    assert [site.module for site in heads] == ["attentions.0" if whole else "", "attentions.1" if whole else ""]


@pytest.mark.parametrize("mlp", [Packed, lambda: Packed(norm=False), lambda: Packed(interleaved=True)])
def test_packed_mlps_are_found(mlp):
    sites = check_adapter(Model(mlp=mlp), example(), seeds=range(2))
    assert [site.size for site in sites if site.kind == "neuron"] == [10, 10]
    assert {bool(site.norms) for site in sites if site.kind == "neuron"} == {isinstance(mlp().norm, nn.LayerNorm)}


class Cache:
    """The keys and values of earlier calls, as in language models."""

    def __init__(self):
        self.held = {}

    def update(self, layer, key, value):
        if layer in self.held:
            key, value = (torch.cat(pair, 2) for pair in zip(self.held[layer], (key, value), strict=True))
        self.held[layer] = key, value
        return key, value


class Caching(Fused):
    """An attention that writes into the cache that it gets."""

    def forward(self, x, cache, layer):
        q, k, v = (self.split(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        return self.to_out(attend(q, *cache.update(layer, k, v), torch.ones(TOKENS, TOKENS).tril().log()))


class WithCache(Model):
    def forward(self, x):
        x, cache = self.stem(x), Cache()
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(x, cache, layer)
            x = x + mlp(x)
        return self.head(x.mean(1))


def test_a_cache_among_the_arguments_is_new_for_each_probe():
    sites = check_adapter(WithCache(Caching), example(), seeds=range(2))
    assert [site.kind for site in sites] == ["head", "head", "neuron", "neuron"] and not sites.left


def test_a_projection_that_starts_at_zero_is_found_too():
    model = Model()
    for attention in model.attentions:
        nn.init.zeros_(attention.to_out[0].weight)
    before = snapshot(model)
    sites = xprune.find_sites(model, example())
    assert sorted(site.kind for site in sites) == ["head", "head", "neuron", "neuron"]
    assert_untouched(model, before)


LEFT = {
    Talking: "its forward works only with all 4 heads: with one removed, it fails at `return x.unflatten",
    Bypass: "the forward uses the weight of that layer without a call.*gated class",
}


@pytest.mark.parametrize("attention", LEFT)
def test_what_is_left_alone_is_said_in_words(attention):
    model = Model(attention)
    before = snapshot(model)
    sites = xprune.find_sites(model, example())
    assert {site.kind for site in sites} == {"neuron"}
    assert set(sites.left) == {"attentions.0", "attentions.1"}
    shown = render(*found_tables(sites))
    assert (
        shown.count("left alone") == 1 and all(path in shown for path in sites.left) and shown.count("10 neurons") == 2
    )
    for why in sites.left.values():
        assert re.search(LEFT[attention], why), why
    assert_untouched(model, before)
    check_exact(model, random_plan(sites, 0), example())
    with pytest.raises(xprune.ModelError, match=r"^Model has no sites of units head: attentions\.0( and 1 more)?: "):
        xprune.find_sites(model, example(), units=["head"])


class Once(Fused):
    """A module that fails when it is called outside the model."""

    calls = (1,)

    def forward(self, x):
        assert not self.calls, "called twice"
        self.calls.append(1)
        return super().forward(x)


class OnceEach(Model):
    def forward(self, x):
        for attention in self.attentions:
            attention.calls = []
        return super().forward(x)


def test_a_module_that_fails_by_itself_is_left_alone_with_what_it_says():
    model = OnceEach(Once)
    sites = xprune.find_sites(model, example())
    assert {site.kind for site in sites} == {"neuron"}
    assert "fails outside of the model (AssertionError: called twice)" in sites.left["attentions.0"]


def test_what_is_found_is_plain_data(tmp_path):
    model = Model(Biased)
    sites = xprune.find_sites(model, example())
    pruned = xprune.apply(model, random_plan(sites, 1, gone=0), example())
    with pytest.warns(UserWarning, match="model_fn"):
        xprune.save(pruned, tmp_path / "saved")
    loaded = xprune.load(tmp_path / "saved", lambda: Model(Biased))
    assert torch.equal(loaded(example()), pruned(example()))
    again = xprune.find_sites(pruned, example())
    assert {site.name for site in again} <= {site.name for site in sites}


def test_sites_are_a_tuple_that_copies():
    sites = xprune.find_sites(Model(Talking), example())
    twin = copy.deepcopy(sites)
    assert isinstance(sites, tuple) and twin == sites == tuple(sites) and twin.left == sites.left


def test_a_wrong_forward_is_still_an_error_in_words():
    with pytest.raises(xprune.ModelError, match="fails on the example inputs"):
        xprune.find_sites(Model(), torch.randn(2, TOKENS, 6))


def blocks(language):
    """Returns the code blocks of docs/adapters.md, by the file name in their first line."""
    found = re.findall(rf"```{language}\n# (\w+\.py)\n(.*?)```", DOCS.read_text(), re.S)
    return dict(found)


OLD_FORM = """
xprune.ADAPTERS["nanogpt"] = xprune.Units(
    "nanogpt", ("model.CausalSelfAttention",), (("c_attn", 3),), writer="c_proj", count="n_head", pruned=AnyHeads
)
"""


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:Units:DeprecationWarning")
def test_the_adapter_in_the_documentation_runs(old, tmp_path, monkeypatch):
    files = {name: text for name, text in blocks("python").items() if name in ("model.py", "adapter.py", "check.py")}
    # The old form has the old keywords of `Units`.
    if old:
        files["adapter.py"] = files["adapter.py"].partition("CLASSES, FORWARDS")[0] + OLD_FORM
    lines = [line for line in files["adapter.py"].splitlines() if line.strip()]
    assert len(lines) <= 15
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    adapters = dict(xprune.ADAPTERS)
    try:
        theirs = runpy.run_path(str(tmp_path / "model.py"))["CausalSelfAttention"]
        assert set(xprune.find_sites(Model(theirs, n_head=4, n_embd=DIM), example()).left), "it needs no adapter"
        runpy.run_path(str(tmp_path / "adapter.py"))
        served = Model(sys.modules["model"].CausalSelfAttention, n_head=4, n_embd=DIM)
        runpy.run_path(str(tmp_path / "check.py"), {"model": served, "example_inputs": example()})
        sites = xprune.find_sites(served, example())
        assert [site.adapter for site in sites if site.kind == "head"] == ["nanogpt"] * 2 and not sites.left
    finally:
        xprune.ADAPTERS.clear()
        xprune.ADAPTERS.update(adapters)
        for name in ("model", "adapter", "check"):
            sys.modules.pop(name, None)
