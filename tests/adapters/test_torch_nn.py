"""Tests pruning of nn.MultiheadAttention and the classes that replace it in the gated model."""

import itertools

import pytest
import torch
from torch import nn

import xprune
from xprune.adapters.torch_nn import HeadedAttention
from xprune.core.plan import Plan
from xprune.testing import check_adapter, perturb

KINDS = {
    "packed": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 10},
    "separate without bias": {"kdim": 6, "vdim": 10, "bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
}
BATCH, TARGETS, SOURCES, HEADS, WIDTH = 2, 3, 5, 2, 8


def attention(kind, batch_first=True, dropout=0.0):
    torch.manual_seed(0)
    return perturb(nn.MultiheadAttention(WIDTH, HEADS, dropout, batch_first=batch_first, **KINDS[kind]), scale=0.3)


def inputs_of(module, alone=False):
    """Returns query, key and value in the shape that the module takes."""
    widths = WIDTH, module.kdim, module.vdim
    made = [torch.randn(BATCH, n, w) for n, w in zip((TARGETS, SOURCES, SOURCES), widths, strict=True)]
    if alone:
        return [x[0] for x in made]
    return made if module.batch_first else [x.transpose(0, 1) for x in made]


def masks(kind, alone=False):
    """Returns an attn_mask and a key_padding_mask of this kind."""
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    padding = padding[0] if alone else padding
    attn = torch.ones(TARGETS, SOURCES).triu(2).bool()
    if kind == "float":
        return {"attn_mask": torch.randn(TARGETS, SOURCES), "key_padding_mask": -2.0 * padding.float()}
    each = attn.expand(HEADS if alone else BATCH * HEADS, -1, -1)
    return {
        "none": {},
        "attn": {"attn_mask": attn},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": attn, "key_padding_mask": padding},
        "each head": {"attn_mask": each},
        "each head and padding": {"attn_mask": each, "key_padding_mask": padding},
        "causal hint": {"attn_mask": torch.ones(TARGETS, SOURCES).triu(1).bool(), "is_causal": True},
    }[kind]


MASKS = ("none", "attn", "padding", "both", "float", "each head", "each head and padding", "causal hint")


def outputs(module, given, options, seed=0):
    torch.manual_seed(seed)
    return module(*given, **options)


def swapped(module, kind):
    module.__class__ = kind
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_class_in_its_place_gives_what_torch_gives(kind, mask):
    for batch_first, alone, weights, average in itertools.product((True, False), repeat=4):
        if not weights and average:
            continue
        module = attention(kind, batch_first, dropout=0.3)
        given = inputs_of(module, alone)
        options = {**masks(mask, alone), "need_weights": weights, "average_attn_weights": average}
        for training in (False, True):
            with torch.set_grad_enabled(training):
                expected = outputs(module.train(training), given, options)
                got = outputs(swapped(module, HeadedAttention), given, options)
                module.__class__ = nn.MultiheadAttention
            torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_torchs(kind):
    found = []
    for cls in (nn.MultiheadAttention, HeadedAttention):
        module = swapped(attention(kind), cls)
        torch.manual_seed(1)
        given = [x.requires_grad_() for x in inputs_of(module)]
        out, weights = module(*given, attn_mask=torch.randn(TARGETS, SOURCES))
        (out.square().sum() + weights.square().sum()).backward()
        found.append([t.grad for t in (*given, *module.parameters())])
    torch.testing.assert_close(found[1], found[0])


def test_self_attention_on_torchs_inference_path():
    module, x = attention("packed"), torch.randn(BATCH, SOURCES, WIDTH)
    with torch.no_grad():
        expected = module(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(swapped(module, HeadedAttention)(x, x, x, need_weights=False)[0], expected)


def test_a_mask_for_each_head_is_refused_once_heads_have_gone():
    plain, model = Cross("packed"), Cross("packed", mask="each head")
    sites = xprune.find_sites(plain, plain.example())
    with pytest.raises(xprune.ModelError, match=r"no sites .*: attn: .*a mask for each head, but 1 heads remain"):
        xprune.find_sites(model, model.example())
    with pytest.raises(xprune.SurgeryError, match="a mask for each head, but 1 heads remain"):
        xprune.apply(model, Plan(sites, ((0,),)), model.example())


class Cross(nn.Module):
    """A cross-attention with a mask. It asks for the attention weights and does not use them."""

    def __init__(self, kind, batch_first=True, weights=False, mask="none"):
        super().__init__()
        self.attn, self.head = attention(kind, batch_first), nn.Linear(WIDTH, 3)
        self.weights, self.mask = weights, mask

    def example(self):
        torch.manual_seed(2)
        return tuple(torch.randn(BATCH, n, w) for n, w in ((TARGETS, WIDTH), (SOURCES, self.attn.kdim + 1)))

    def forward(self, x, y):
        key, value = y[..., : self.attn.kdim], y[..., : self.attn.vdim]
        if self.attn.vdim > y.shape[-1]:
            value = nn.functional.pad(value, (0, self.attn.vdim - value.shape[-1]))
        given = x, key, value
        given = given if self.attn.batch_first else tuple(t.transpose(0, 1) for t in given)
        out = self.attn(*given, need_weights=self.weights, **masks(self.mask))[0]
        return self.head(out if self.attn.batch_first else out.transpose(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_pruned_exactly(kind):
    for batch_first, weights, mask in ((True, False, "both"), (False, True, "attn"), (True, True, "padding")):
        model = Cross(kind, batch_first, weights, mask)
        (site,) = check_adapter(model, model.example(), adapter="torch-attention")
        assert (site.kind, site.size, site.width) == ("head", HEADS, WIDTH // HEADS)


def test_a_subclass_with_its_own_forward_is_not_taken_for_torchs():
    class Loud(nn.MultiheadAttention):
        def forward(self, x):
            return 2 * super().forward(x, x, x)[0]

    mlp = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    model = perturb(nn.Sequential(nn.Linear(16, 16), Loud(16, 4), mlp))
    assert {site.adapter for site in xprune.find_sites(model, torch.randn(2, 5, 16))} == {""}
