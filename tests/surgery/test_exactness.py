"""Tests that pruned models equal gated models, for every adapter and every way to remove units."""

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import MODELS, build, images
from tests.support.timm_models import TIMM_VIT
from xprune.adapters.timm.hybrid import TIMM_HYBRID
from xprune.core.plan import Plan
from xprune.modules.removed import Removed
from xprune.testing import assert_untouched, check_adapter, check_exact, random_plan, snapshot

ADAPTER = {
    "swin": "timm-swin",
    "swinv2": "timm-swinv2",
    "packed glu": "timm-glu",
    "class attention": "timm-class-attention",
}


@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_gated(name):
    sites = check_adapter(build(name), images(), adapter=ADAPTER.get(name, "timm-attention"), seeds=range(2))
    assert {site.kind for site in sites} == {"head", "neuron"}


def test_every_adapter_is_exercised():
    served = {ADAPTER.get(name, "timm-attention") for name in MODELS}
    served = served.union(*(adapters for _, adapters in TIMM_VIT.values())) - {None}
    served |= {adapter.name for adapter in TIMM_HYBRID}  # test_timm_hybrid.py
    served |= {"timm-scale", "timm-inception", "timm-factor", "timm-talking-heads"}  # have no units: test_channels*.py
    assert served == {name for name in xprune.ADAPTERS if name.startswith("timm-")}


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2"])
def test_every_block_has_heads_and_neurons(name):
    sites = xprune.find_sites(build(name), images())
    blocks = 2 if name == "vit" else 3
    assert [site.kind for site in sites] == ["head", "neuron"] * blocks


@pytest.mark.parametrize("name", ["vit", "no biases", "swin", "swinv2"])
def test_what_goes_whole_leaves_its_bias(name):
    model = build(name)
    sites = xprune.find_sites(model, images())
    pruned = xprune.apply(model, Plan(sites, tuple(() for _ in sites)), images())
    for site in sites:
        left, layer = pruned.get_submodule(site.module), model.get_submodule(site.consumers[0])
        assert isinstance(left, Removed)
        out = left(torch.randn(2, 5, 24 if name != "swin" else layer.out_features))
        expected = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        assert torch.equal(out, expected.expand(2, 5, -1))


def test_the_result_is_the_callers_alone():
    model, inputs = build("vit"), images()
    before = snapshot(model)
    sites = xprune.find_sites(model, inputs)
    pruned = xprune.apply(model, random_plan(sites, 0), inputs)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert_untouched(model, before)


def test_training_mode_and_frozen_weights_of_the_caller_survive():
    model = build("vit").train()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    before = snapshot(model)
    xprune.Pruner(model, "magnitude", finetune=None).run([(images(4), torch.arange(4))])
    assert_untouched(model, before)


def test_half_precision_is_checked_in_float32():
    model = build("vit").to(torch.bfloat16)
    inputs = images().to(torch.bfloat16)
    sites = xprune.find_sites(model, inputs)
    pruned = xprune.apply(model, random_plan(sites, 1), inputs)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert torch.isfinite(pruned(inputs).float()).all()


def test_tied_weights_stay_tied():
    model = build("vit")
    model.blocks[1].mlp = model.blocks[0].mlp
    sites = xprune.find_sites(model, images())
    assert [site.name for site in sites].count("blocks.0.mlp") == 1
    pruned = xprune.apply(model, random_plan(sites, 2, gone=0), images())
    assert pruned.blocks[1].mlp is pruned.blocks[0].mlp
    check_exact(model, random_plan(sites, 2, gone=0), images())


def test_two_sites_on_one_tensor_become_one():
    model = build("vit")
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    sites = xprune.find_sites(model, images())
    assert [site.name for site in sites] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"] and not sites.left
    assert sites[1].consumers == ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2")
    check_exact(model, random_plan(sites, 2), images())
    again = xprune.find_sites(model, images(), exclude=["blocks.1.mlp"])
    assert "blocks.0.mlp.fc1.weight is tied to blocks.1.mlp.fc1.weight" in again.left["blocks.0.mlp"]


class Odd(nn.Module):
    """An MLP whose neurons are mixed outside any layer, which the graph cannot see."""

    def __init__(self):
        super().__init__()
        self.stem, self.shift = nn.Linear(8, 8), 1
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 6), "fc2": nn.Linear(6, 8)})

    def forward(self, x):
        x = self.stem(x)
        hidden = self.mlp["fc1"](x)
        return x + self.mlp["fc2"](hidden.roll(self.shift, -1) if self.shift else hidden)


def test_surgery_that_is_not_exact_is_refused_and_names_the_site():
    model, inputs = Odd(), torch.randn(2, 8)
    model.shift = 0
    sites = xprune.find_sites(model, inputs)  # it refuses the other one
    model.shift = 1
    before = snapshot(model)
    with pytest.raises(xprune.SurgeryError, match=r"mlp.*untouched"):
        xprune.apply(model, Plan(sites, ((0, 2),)), inputs)
    assert_untouched(model, before)


def test_a_forward_that_looks_at_values():
    """It cannot run on the meta device, where the graph is traced first."""

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("vit")

        def forward(self, x):
            return self.inner(x) if float(x.abs().sum()) > 0 else x

    assert len(check_adapter(Looking(), images(), seeds=range(1))) == 4
