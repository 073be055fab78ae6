"""Tests that timm's ViT families are pruned exactly, and that replaced forwards compute the same as timm's."""

import pytest
import torch
from timm.layers.diff_attention import DiffAttention

import xprune
from tests.support.timm_models import SIZE, SIZES, TIMM_VIT
from xprune.adapters.timm.vit_forwards import PrunedDiffAttention
from xprune.core.plan import Plan
from xprune.modules.copies import shared_copy
from xprune.testing import check_exact, perturb, random_plan

# timm's layers change from release to release, so these tests also run on its lowest allowed version.
pytestmark = pytest.mark.smoke


@pytest.fixture(params=TIMM_VIT)
def case(request):
    """Returns the model, images, and the names of the adapters that have to give its sites."""
    build, adapters = TIMM_VIT[request.param]
    torch.manual_seed(0)
    side = SIZES.get(request.param, SIZE)
    return perturb(build()), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)), adapters


def test_pruned_equals_gated(case):
    model, images, adapters = case
    sites = xprune.find_sites(model, images)
    assert set(adapters) <= {site.adapter for site in sites}
    assert {site.kind for site in sites} == {"head", "neuron"}
    check_exact(model, random_plan(sites, 0, gone=0.0), images)
    heads = tuple(site for site in sites if site.kind == "head" and site.size > 1)
    check_exact(model, Plan(heads, tuple((site.size - 1,) for site in heads)), images)
    check_exact(model, Plan(sites, tuple(() if site.module else (0,) for site in sites)), images)


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_replacement_forwards_compute_what_timm_computes(case, fused):
    model, images, adapters = case
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    expected, copy = model(images), shared_copy(model)
    swapped = 0
    for path, module in copy.named_modules():
        for name in adapters:
            adapter = xprune.ADAPTERS[name]
            site = adapter.site(path, module) if adapter.pruned is not None and adapter.serves(module) else None
            if site is not None:
                adapter.resize(module, site, range(site.size))
                swapped += 1
    assert swapped or all(xprune.ADAPTERS[name].pruned is None for name in adapters)
    torch.testing.assert_close(copy(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dual", [True, False])
def test_the_weight_of_the_second_map_is_timms(dual):
    layer = perturb(DiffAttention(8, 2, depth=3, dual_lambda=dual), scale=0.5)
    expected, x = layer.lambda_init, torch.randn(2, 5, 8)
    out = layer(x)
    layer.__class__ = PrunedDiffAttention
    assert abs(layer.subtracted() - expected) > 0.01  # else the learned part would not show
    torch.testing.assert_close(layer(x), out, rtol=1e-6, atol=1e-6)
