"""Tests of derived forwards: they survive copies, files and a second pruning, and say what they cannot do."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

import xprune
from xprune.adapters.derived import derived_class, is_derived, rewrites_of
from xprune.testing import check_exact

DIM = 12


class Attention(nn.Module):
    """Takes the width of all heads from its input. `mode` changes how the line is written."""

    def __init__(self, mode="tuple", heads=3):
        super().__init__()
        self.qkv, self.proj, self.heads, self.mode = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), heads, mode

    def forward(self, x):
        return getattr(self, f"by_{self.mode}")(x)

    def attend(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def by_tuple(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(*qkv).reshape(B, N, C))

    def by_size(self, x):
        width = x.size(-1)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, width // self.heads)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(*qkv).reshape(*x.shape[:2], width))

    def by_stream(self, x):
        B, N, C = x.shape
        x = x.reshape(B * N, C).view(B, N, C)
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = self.attend(*qkv).reshape(B, N, C)
        y = self.proj(y)
        return y.reshape(B * N, C).view(B, N, C)


class Net(nn.Module):
    def __init__(self, mode="tuple"):
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(6, DIM), Attention(mode), nn.Linear(DIM, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attn(x))


def built(mode="tuple"):
    torch.manual_seed(0)
    return Net(mode).eval(), torch.randn(2, 5, 6)


@pytest.mark.parametrize("mode", ["tuple", "size", "stream"])
def test_widths_of_the_input_become_those_of_the_heads(mode):
    model, x = built(mode)
    (site,) = xprune.find_sites(model, x, units="head")
    assert (site.size, site.adapter) == (3, "derived") and site.rewrites
    assert xprune.Site.from_json(site.to_json()) == site
    for keep in ((0, 2), (1,), (0, 1, 2)):
        check_exact(model, xprune.Plan((site,), (keep,)), x)


def test_a_pruned_module_can_be_copied_saved_and_pruned_again(tmp_path):
    model, x = built()
    sites = xprune.find_sites(model, x, units="head")
    pruned = xprune.apply(model, xprune.Plan(sites, ((0, 2),)), x)
    assert is_derived(type(pruned.attn)) and isinstance(pruned.attn, Attention)
    assert xprune.classes_of_xprune(pruned) == {
        "attn": f"xprune.adapters.derived of {Attention.__module__}.{Attention.__qualname__}"
    }
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    for twin in (copy.deepcopy(pruned), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), pruned(x)) and type(twin.attn) is type(pruned.attn)
    again = xprune.find_sites(pruned, x, units="head")
    assert [site.size for site in again] == [2]
    less = xprune.apply(pruned, xprune.Plan(again, ((1,),)), x)
    direct = xprune.apply(model, xprune.Plan(sites, ((2,),)), x)
    assert torch.allclose(less(x), direct(x), atol=1e-6)
    with pytest.warns(UserWarning, match="model_fn"):
        xprune.save(less, tmp_path / "saved")
    assert torch.equal(xprune.load(tmp_path / "saved", lambda: Net())(x), less(x))


def test_a_class_that_has_changed_since_is_named():
    assert "by_tuple:C" in rewrites_of(Attention)
    with pytest.raises(xprune.PlanError, match="its method by_tuple has no line that reads D from a shape"):
        derived_class(Attention, ("by_tuple:D",))


@pytest.mark.parametrize(
    "change", ["@x:", "@x:one/two", "@x:1", "forward", "nothing:C", "by_tuple:C@1", "by_tuple:C@a-b"]
)
def test_a_damaged_rewrite_is_a_named_error(change):
    with pytest.raises(xprune.PlanError, match="the forward of Attention cannot be derived"):
        derived_class(Attention, (change,))


class Biased(nn.Module):
    """Adds a bias for each head that the model computes for all layers, as Bloom does."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x, bias):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class BiasedNet(nn.Module):
    def __init__(self, keyword=True):
        super().__init__()
        self.layers, self.keyword = nn.ModuleList(Biased() for _ in range(2)), keyword
        self.head = nn.Linear(DIM, 3)

    def forward(self, x):
        slopes = torch.tensor([0.5, 0.25, 0.125])
        distance = -(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
        bias = slopes[:, None, None] * distance
        for layer in self.layers:
            x = x + (layer(x, bias=bias[None]) if self.keyword else layer(x, bias[None]))
        return self.head(x)


@pytest.mark.parametrize("keyword", [True, False])
def test_an_argument_with_an_entry_for_each_head_is_picked_from(keyword):
    torch.manual_seed(0)
    model, x = BiasedNet(keyword).eval(), torch.randn(2, 5, DIM)
    sites = xprune.find_sites(model, x, units="head")
    assert [(site.size, site.adapter) for site in sites] == [(3, "derived")] * 2
    for keeps in (((0, 2), (1,)), ((2,), (0, 1, 2))):
        check_exact(model, xprune.Plan(sites, keeps), x)
    pruned = xprune.apply(model, xprune.Plan(sites, ((0, 2), (1, 2))), x)
    assert torch.equal(copy.deepcopy(pruned)(x), pruned(x))
