"""Attentions and MLPs that no adapter knows: found by structure, proved by cutting, or left alone with a reason."""

import copy
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xprune
from xprune.result import found_tables, render
from xprune.testing import assert_untouched, check_adapter, check_exact, perturb, random_plan, snapshot

DIM, TOKENS = 16, 5
DOCS = Path(__file__).parents[1] / "docs" / "adapters.md"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """(batch, heads, tokens, width) each; (batch, tokens, heads * width)."""
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class Base(nn.Module):
    """heads * width need not be the width of the model."""

    def __init__(self, heads=4, width=6, kv=None):
        super().__init__()
        self.heads, self.inner = heads, heads * width
        self.build(heads, width, kv or heads)

    def split(self, x, heads=None):
        return x.unflatten(-1, (heads or self.heads, -1)).transpose(1, 2)


class Fused(Base):
    """As in vit-pytorch: a norm inside, q, k and v in one layer, the projection in a Sequential."""

    def build(self, heads, width, _):
        self.norm, self.to_qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * heads * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * width, DIM), nn.Dropout(0.1))

    def forward(self, x):
        return self.to_out(attend(*(self.split(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))))


class HeadFirst(Base):
    """Rows of a head stand together: (heads, 3, width)."""

    def build(self, heads, width, _):
        self.qkv, self.proj = nn.Linear(DIM, 3 * heads * width), nn.Linear(heads * width, DIM)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.proj(attend(q, k, v))


class Pair(Base):
    """A q and a kv."""

    def build(self, heads, width, _):
        self.q, self.kv = nn.Linear(DIM, heads * width), nn.Linear(DIM, 2 * heads * width)
        self.proj = nn.Linear(heads * width, DIM)

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        return self.proj(attend(self.split(self.q(x)), self.split(k), self.split(v)))


class Apart(Base):
    """As in x-transformers: layers apart, heads that do not fill the model; their width is in an attribute."""

    def build(self, heads, width, kv):
        self.kv_heads, self.inner_dim = kv, heads * width
        self.to_q, self.to_out = nn.Linear(DIM, heads * width), nn.Linear(heads * width, DIM, bias=False)
        self.to_k, self.to_v = nn.Linear(DIM, kv * width), nn.Linear(DIM, kv * width)

    def forward(self, x):
        rows, tokens, _ = x.shape
        q = self.split(self.to_q(x))
        k, v = (self.split(layer(x), self.kv_heads) for layer in (self.to_k, self.to_v))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        return self.to_out(attend(q, k, v).reshape(rows, tokens, self.inner_dim))


class Shared(Base):
    """One key and one value for all heads."""

    def build(self, heads, width, _):
        self.q, self.kv = nn.Linear(DIM, heads * width), nn.Linear(DIM, 2 * width)
        self.proj = nn.Linear(heads * width, DIM)

    def forward(self, x):
        k, v = (t[:, None].expand(-1, self.heads, -1, -1) for t in self.kv(x).chunk(2, -1))
        return self.proj(attend(self.split(self.q(x)), k, v))


class Biased(Base):
    """A position bias and a temperature for each head, and an input scaled by the dense width."""

    def build(self, heads, width, _):
        self.qkv, self.proj = nn.Linear(DIM, 3 * heads * width), nn.Linear(heads * width, DIM)
        self.bias = nn.Parameter(torch.zeros(TOKENS, TOKENS, heads))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q_norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = (self.split(t) for t in (self.qkv(x) * self.inner**-0.5).chunk(3, -1))
        return self.proj(attend(self.q_norm(q) * self.temperature, k, v, self.bias.permute(2, 0, 1)))


class Telling(Fused):
    """Gives its weights too, as many Hugging Face attentions do."""

    def forward(self, x):
        q, k, v = (self.split(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2)), weights


class Residual(Fused):
    """Adds its input itself, so that its bias is not what stays when all heads go."""

    def forward(self, x):
        return x + super().forward(x)


class Packed(nn.Module):
    """Values and gates in one layer, a norm over the hidden neurons."""

    def __init__(self, hidden=10, norm=True, interleaved=False):
        super().__init__()
        self.w12, self.w3 = nn.Linear(DIM, 2 * hidden), nn.Linear(hidden, DIM)
        self.norm, self.interleaved = nn.LayerNorm(hidden) if norm else nn.Identity(), interleaved

    def forward(self, x):
        x = self.w12(x)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x.chunk(2, -1)
        return self.w3(self.norm(F.silu(a) * b))


class Model(nn.Module):
    """Two blocks of an attention and an MLP."""

    def __init__(self, attention=Fused, mlp=Packed, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(7, DIM), nn.Linear(DIM, 3)
        self.attentions = nn.ModuleList(attention(**kwargs) for _ in range(2))
        self.mlps = nn.ModuleList(mlp() for _ in range(2))
        perturb(self)

    def forward(self, x):
        x = self.stem(x)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            out = attention(x)
            x = x + (out[0] if isinstance(out, tuple) else out)
            x = x + mlp(x)
        return self.head(x.mean(1))


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
}


@pytest.mark.parametrize("name", FOUND)
def test_attention_is_found_without_an_adapter(name):
    attention, kwargs, units = FOUND[name]
    model = Model(attention, **kwargs)
    sites = check_adapter(model, example(), seeds=range(2))
    heads = [site for site in sites if site.kind == "head"]
    assert [(site.size, site.adapter) for site in heads] == [(units, "")] * 2
    assert not sites.left
    whole = attention not in (Telling, Residual)
    assert [site.module for site in heads] == ["attentions.0" if whole else "", "attentions.1" if whole else ""]


@pytest.mark.parametrize("mlp", [Packed, lambda: Packed(norm=False), lambda: Packed(interleaved=True)])
def test_packed_mlps_are_found(mlp):
    sites = check_adapter(Model(mlp=mlp), example(), seeds=range(2))
    assert [site.size for site in sites if site.kind == "neuron"] == [10, 10]
    assert {bool(site.norms) for site in sites if site.kind == "neuron"} == {isinstance(mlp().norm, nn.LayerNorm)}


def test_a_projection_that_starts_at_zero_is_found_too():
    model = Model()
    for attention in model.attentions:
        nn.init.zeros_(attention.to_out[0].weight)
    before = snapshot(model)
    sites = xprune.find_sites(model, example())
    assert sorted(site.kind for site in sites) == ["head", "head", "neuron", "neuron"]
    assert_untouched(model, before)


class Talking(Fused):
    """Heads are mixed before the softmax."""

    def build(self, *args):
        super().build(*args)
        self.mix = nn.Parameter(torch.randn(self.heads, self.heads))

    def forward(self, x):
        q, k, v = (self.split(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        weights = torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1), self.mix).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Bypass(HeadFirst):
    """Hands its weights to a function."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return F.linear(attend(q, k, v), self.proj.weight, self.proj.bias)


class Uneven(Fused):
    """The layer called last reads no heads."""

    def build(self, *args):
        super().build(*args)
        self.after = nn.Linear(DIM, 7)
        self.back = nn.Linear(7, DIM)

    def forward(self, x):
        return self.back(self.after(super().forward(x)))


class CausalSelfAttention(nn.Module):
    """nanoGPT's: its forward takes the heads to fill the model's width."""

    def __init__(self, n_head=4, n_embd=DIM):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


LEFT = {
    Talking: r"its heads cannot be cut out exactly, in none of \d+ ways tried",
    Bypass: "its forward calls 1 of its linear layers as modules.*gated class",
    Uneven: "back reads 7 features, no multiple of 4 heads",
    CausalSelfAttention: "its forward fails with .* left.*adapter with a `pruned` forward",
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
    with pytest.raises(xprune.ModelError, match=r"Left alone: attentions\.0, "):
        xprune.find_sites(model, example(), units=["head"])


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
    """The code blocks of docs/adapters.md by the file name in their first line."""
    found = re.findall(rf"```{language}\n# (\w+\.py)\n(.*?)```", DOCS.read_text(), re.S)
    return dict(found)


def test_the_adapter_in_the_documentation_runs(tmp_path, monkeypatch):
    files = blocks("python")
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
        sys.modules.pop("model", None)
