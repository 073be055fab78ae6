"""Tests that every site is proved inside the model, and that modules that are left alone have a reason."""

import pytest
import torch
from torch import nn

import xprune
from tests.support.generic_models import TOKENS as TOKENS_THERE
from tests.support.generic_models import Fused, Model
from tests.support.tricky_models import (
    DIM,
    MIXES,
    PLAIN,
    TOKENS,
    TRICKY,
    HandedOn,
    MaskedHeads,
    Mixer,
    RawNorm,
    Surrounded,
    TiedHead,
    built,
    tokens,
)
from xprune.discovery import in_model
from xprune.testing import assert_untouched, check_adapter, check_exact, random_plan, snapshot


def exact(model, inputs, seeds=range(3)):
    """Checks that random plans are exact and that the model does not change. Returns the sites."""
    before = snapshot(model)
    sites = xprune.find_sites(model, inputs)
    for seed in seeds:
        check_exact(model, random_plan(sites, seed), inputs)
    assert_untouched(model, before)
    return sites


def below(names, path):
    return [name for name in names if name == path or name.startswith(f"{path}.")]


@pytest.mark.parametrize("mix", MIXES)
def test_hidden_features_that_are_mixed_are_no_neurons(mix):
    sites = exact(built(lambda: Surrounded(Mixer(MIXES[mix]))), tokens())
    assert [site.name for site in sites] == ["sound"]
    (reason,) = (sites.left[path] for path in below(sites.left, "part"))
    assert "units" in reason or "neurons" in reason


@pytest.mark.parametrize("mix", ["number of features", "positions of features", "index select", "interleave", "amax"])
def test_many_hidden_features_that_are_mixed_are_no_neurons(mix):
    """With many hidden features, the proof first removes most of them from both models."""
    sites = exact(built(lambda: Surrounded(Mixer(MIXES[mix], 600))), tokens(), seeds=range(1))
    assert [site.name for site in sites] == ["sound"] and below(sites.left, "part")


@pytest.mark.parametrize("operation", PLAIN)
def test_hidden_features_that_are_kept_apart_are_neurons(operation):
    sites = check_adapter(built(lambda: Surrounded(Mixer(PLAIN[operation]))), tokens(), seeds=range(2))
    assert [site.name for site in sites] == ["sound", "part"] and not sites.left


@pytest.mark.parametrize("name", TRICKY)
def test_what_is_wrong_in_the_model_is_left_alone_and_the_rest_goes_on(name):
    make, path = TRICKY[name]
    sites = exact(built(make), tokens())
    assert sites and not below([site.name for site in sites], path or "part")
    assert not path or below(sites.left, path)


NORMS = {"layer": lambda: nn.LayerNorm(DIM), "batch": lambda: nn.BatchNorm1d(DIM), "rms": lambda: nn.RMSNorm(DIM)}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_of_raw_inputs_has_no_units(norm):
    assert [site.name for site in exact(built(lambda: RawNorm(NORMS[norm]())), tokens())] == ["mlp"]
    with pytest.raises(xprune.ModelError, match=r"^RawNorm has no sites of units head, neuron: "):
        xprune.find_sites(built(lambda: RawNorm(NORMS[norm](), plain=True)), tokens())


def test_a_depthwise_convolution_of_raw_inputs_has_no_units():
    stem = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1))
    mlp = nn.Sequential(nn.Conv2d(8, 10, 1), nn.ReLU(), nn.Conv2d(10, 8, 1))
    model = nn.Sequential(stem, mlp, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    sites = exact(built(lambda: model), torch.randn(2, 6, 4, 4))
    assert [site.name for site in sites] == ["1"]


def test_heads_whose_values_are_handed_on_are_one_site_and_two_where_they_are_not():
    sites = exact(built(HandedOn), tokens())
    assert [(site.kind, len(site.consumers)) for site in sites] == [("head", 2), ("neuron", 1), ("neuron", 1)]
    alone = exact(built(lambda: HandedOn(handed=False)), tokens())
    assert [site.kind for site in alone] == ["head", "head", "neuron", "neuron"] and not alone.left


def test_a_head_tied_to_the_embedding_is_named():
    sites = exact(built(TiedHead), torch.arange(8).view(2, 4))
    assert [site.name for site in sites] == ["block"]
    assert sites.left["predictions.decoder"].startswith("predictions.decoder.weight is tied to embed.weight. ")


def test_masks_for_each_head_leave_the_heads_alone():
    mask = torch.randn(2 * 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))
    sites = exact(built(MaskedHeads), (tokens(), mask))
    assert [site.name for site in sites] == ["mlp"] and "a mask for each head" in sites.left["attention"]


class OneFails(nn.Module):
    """Six equal blocks. The output of some is multiplied by their number of heads, outside the block."""

    def __init__(self, wrong):
        super().__init__()
        self.blocks, self.wrong = nn.ModuleList(Fused() for _ in range(6)), wrong

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            made = block(x)
            x = x + (made * block.heads if index in self.wrong else made)
        return x


@pytest.mark.parametrize("wrong", [(), (0,), (3,), (2, 5), (0, 1, 2, 3, 4, 5)])
def test_the_culprits_are_found_among_modules_that_are_alike(wrong):
    """Such a block can be pruned exactly outside the model, but not inside it."""
    model = built(lambda: nn.Sequential(OneFails(wrong), nn.Linear(DIM, DIM), nn.Linear(DIM, 3)))
    if len(wrong) == 6:
        with pytest.raises(xprune.ModelError, match=r"has no sites of units head: 0\.blocks\.0 and 5 more: "):
            xprune.find_sites(model, tokens(), units=["head"])
        return
    sites = xprune.find_sites(model, tokens(), units=["head"])
    assert [site.name for site in sites] == [f"0.blocks.{index}" for index in range(6) if index not in wrong]
    assert set(sites.left) >= {f"0.blocks.{index}" for index in wrong}
    assert all("is off by" in sites.left[f"0.blocks.{index}"] for index in wrong)


def test_excluded_sites_are_not_proved():
    sites = xprune.find_sites(built(TiedHead), torch.arange(8).view(2, 4), exclude=["predictions.*"])
    assert [site.name for site in sites] == ["block"] and not sites.left


def test_noise_that_breaks_a_model_is_not_held_against_its_sites():
    """With noise on one of its parameters, this model returns infinite numbers."""

    class Touchy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.zero = Model(), nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return self.inner(x) + (self.zero.abs().max() * -1e9).exp().log()

    model = Touchy().eval()
    inputs = torch.randn(2, TOKENS_THERE, 7, generator=torch.Generator().manual_seed(0))
    assert len(exact(model, inputs)) == 4


def test_one_comparison_is_enough_where_all_is_well(monkeypatch):
    calls = []
    real = in_model.exactness.problem

    def counted(*args, **options):
        # Proofs of single modules come before the proof in the model. They are not counted.
        if args[0].__class__.__name__ != "Alone":
            calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(in_model.exactness, "problem", counted)
    xprune.find_sites(Model(), torch.randn(2, TOKENS_THERE, 7))
    assert len(calls) == 1
    assert len(calls[0][3]) == 1, "one sample is enough"


def test_of_many_units_few_are_looked_at(monkeypatch):
    seen = []
    real = in_model.exactness.problem

    def watched(model, pruned, plan, inputs, **options):
        seen.append([site.size for site in plan.sites])
        return real(model, pruned, plan, inputs, **options)

    monkeypatch.setattr(in_model.exactness, "problem", watched)
    sites = xprune.find_sites(built(lambda: Surrounded(Mixer(PLAIN["gelu"], 1600))), tokens())
    assert [site.size for site in sites] == [12, 1600] and seen == [[12, 100]]


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_of_the_model_itself_have_neurons(layers):
    stack = [part for _ in range(layers) for part in (nn.Linear(8, 8), nn.GELU())]
    sites = exact(built(lambda: nn.Sequential(*stack, nn.Linear(8, 3))), torch.randn(2, 8))
    assert [(site.name, site.module) for site in sites] == [("2", ""), ("4", "")][:layers] and not sites.left


def test_what_cannot_be_traced_still_has_what_adapters_know():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.MultiheadAttention(DIM, 4, batch_first=True)

        def forward(self, x):
            return self.body(x, x, x, need_weights=False)[0].detach()

    sites = exact(built(Detached), tokens())
    assert [site.kind for site in sites] == ["head"] and "cannot be traced" in sites.left["Detached"]
