"""Tests that timm's families with attention and convolutions are pruned exactly, and that tracing them ends."""

import pytest
import torch

import xprune
from tests.support.timm_hybrid_models import TIMM_HYBRID_MODELS
from xprune.adapters.timm.hybrid import TIMM_HYBRID
from xprune.discovery.neurons import neuron_sites
from xprune.testing import check_adapter, perturb

# timm's layers change from release to release, so these tests also run on its lowest allowed version.
pytestmark = pytest.mark.smoke

NEURONLESS = {"lowformer"}
"""Models that are an attention alone."""


def build(name):
    torch.manual_seed(0)
    make, size, adapters = TIMM_HYBRID_MODELS[name]
    return perturb(make()), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)), adapters


@pytest.mark.parametrize("name", TIMM_HYBRID_MODELS)
def test_pruned_equals_gated(name):
    model, inputs, adapters = build(name)
    sites = check_adapter(model, inputs, seeds=range(1))
    assert {site.adapter for site in sites} - {""} == set(adapters)
    assert any(site.kind == "neuron" for site in sites) == (name not in NEURONLESS)


def test_every_adapter_is_exercised():
    assert {name for _, _, names in TIMM_HYBRID_MODELS.values() for name in names} >= {a.name for a in TIMM_HYBRID}


@pytest.mark.parametrize("adapter", [a for a in TIMM_HYBRID if a.pruned], ids=lambda adapter: adapter.name)
def test_replaced_forwards_are_timms(adapter):
    name = next(name for name, (_, _, served) in TIMM_HYBRID_MODELS.items() if adapter.name in served)
    model, inputs, _ = build(name)
    with torch.no_grad():
        expected = model(inputs)
        served = [module for module in model.modules() if adapter.serves(module)]
        for module in served:
            module.__class__ = adapter.pruned
        assert served
        torch.testing.assert_close(model(inputs), expected, atol=1e-6, rtol=1e-5)


def test_the_walk_through_the_graph_ends_where_torch_prunings_does_not():
    model, inputs, _ = build("maxvit")
    # No gated classes are given, so the graph passes through the attentions themselves.
    sites, _ = neuron_sites(model, inputs, {})
    assert any(site.name.endswith("mlp") for site in sites)


def test_a_squeeze_reads_the_units_too():
    model, inputs, _ = build("maxvit")
    (site,) = (s for s in xprune.find_sites(model, inputs) if s.consumers[0] == "stages.0.blocks.0.conv3_1x1")
    assert site.consumers == ("stages.0.blocks.0.conv3_1x1", "stages.0.blocks.0.se.fc1")
