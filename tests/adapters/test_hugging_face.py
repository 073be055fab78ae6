"""Tests that the Hugging Face families are pruned exactly, with batches as mappings and every criterion."""

import pytest
import torch

import xprune
from benchmarks.hugging_face_models import MODELS
from tests.support import reference
from tests.support.hugging_face_models import build, counting, first, pruned, rows
from xprune.adapters.hugging_face import HUGGING_FACE
from xprune.core.plan import Plan
from xprune.surgery.gates import Gates
from xprune.testing import check_adapter, check_criterion, check_selection

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")

QUICK = {"xpruner": "xpruner,steps=20"}
ADAPTER = {
    "hf beit": "hf-beit",
    "hf bert": "hf-bert",
    "hf roberta": "hf-bert",
    "hf clip text": "hf-clip",
    "hf clip vision": "hf-clip",
    "hf distilbert": "hf-distilbert",
    "hf gpt2": "hf-gpt2",
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_gated(name, attention):
    if (name, attention) == ("hf gemma2", "sdpa"):
        pytest.skip("transformers has no SDPA with capped scores")
    model, inputs = build(name)
    model.set_attn_implementation(attention)
    seeds = [("sdpa", "eager").index(attention)]  # each implementation sees a random plan, and each site alone
    sites = check_adapter(model, inputs, adapter=ADAPTER.get(name, "hf-attention"), seeds=seeds)
    depth = {"hf swin": 4, "hf segformer": 4}.get(name, 2)
    assert [site.kind for site in sites][: 2 * depth] == ["head", "neuron"] * depth


def test_every_adapter_is_exercised():
    served = {site.adapter for name in MODELS for site in xprune.find_sites(*build(name))} - {""}
    assert served == {adapter.name for adapter in HUGGING_FACE} <= set(xprune.ADAPTERS)


@pytest.mark.parametrize("name", ["hf vit", "hf bert", "hf gpt2", "hf llama"])
def test_attention_implementations_agree(name):
    model, inputs = pruned(name, gone=0)
    outputs = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        outputs.append(first(model, inputs))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_a_unit_of_grouped_queries_is_a_key_value_head_and_its_readers():
    model, inputs = build("hf qwen3")
    site = xprune.find_sites(model, inputs)[0]
    assert (site.size, site.width) == (2, 16)  # 4 query heads of 8 features, in 2 groups
    attention = xprune.apply(model, Plan((site,), ((1,),)), inputs).model.layers[0].self_attn
    shapes = [tuple(getattr(attention, f"{name}_proj").weight.shape) for name in "qkvo"]
    assert shapes == [(16, 32), (8, 32), (8, 32), (32, 16)]
    assert torch.equal(attention.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight[8:])
    assert attention.num_key_value_groups == 2 and attention.q_norm.weight.shape == (8,)
    assert attention.config.num_attention_heads == 4  # which all layers share


def test_heads_of_a_table_that_all_layers_share_are_picked_from_it():
    config = transformers.BeitConfig(**{**MODELS["hf beit"]()[0].config.to_dict(), "use_relative_position_bias": False})
    config.use_shared_relative_position_bias = True
    model, inputs = transformers.BeitModel(config).eval(), MODELS["hf beit"]()[1]
    sites = check_adapter(model, inputs, seeds=[0])
    heads = [site for site in sites if site.kind == "head"]
    assert [(site.size, site.adapter) for site in heads] == [(3, "derived")] * 2


@pytest.mark.parametrize("name", ["hf gpt2", "hf gemma"])
def test_tied_embeddings_stay_tied(name):
    model, _ = pruned(name)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["hf gpt2", "hf llama", "hf gemma3"])
def test_a_pruned_language_model_generates_with_and_without_its_cache(name):
    model, inputs = pruned(name, gone=0)
    ids = inputs["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached, plain = (model.generate(ids, use_cache=cache, **settings) for cache in (True, False))
    assert cached.shape == (2, 18) and torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["hf gpt2", "hf bert", "hf swin"])
def test_each_sample_has_its_own_gates(name):
    model, inputs = build(name)
    sites = xprune.find_sites(model, inputs)
    values = [torch.ones(2, site.size) for site in sites]
    for value in values:
        value[0, 0] = 0.0
    dense = first(model, inputs)
    with Gates(sites, values).attached(model):
        gated = first(model, inputs)
    torch.testing.assert_close(gated[1], dense[1])
    assert (gated[0] - dense[0]).abs().max() > 1e-4


def test_magnitude_is_of_every_weight_that_leaves_transposed_or_not():
    model, inputs = build("hf gpt2")
    for site in xprune.find_sites(model, inputs)[:2]:
        (values,) = xprune.score(model, [site], criterion="magnitude").values
        assert reference.magnitude(model, site, 1, inputs, 2) == pytest.approx(float(values[1]), rel=1e-4)


@pytest.mark.parametrize("name", ["hf bert", "hf vit"])
@pytest.mark.parametrize("criterion", xprune.CRITERIA)
def test_every_criterion_scores(criterion, name):
    scores = check_criterion(QUICK.get(criterion, criterion), build(name)[0], rows(name))
    assert {site.kind for site in scores.sites} == {"head", "neuron"}


@pytest.mark.parametrize("criterion", [name for name in xprune.CRITERIA if not name.startswith("captum")])
def test_criteria_without_classes_score_a_language_model(criterion):
    check_criterion(QUICK.get(criterion, criterion), build("hf llama")[0], counting(), xprune.LanguageModel())


@pytest.mark.parametrize("name", ["hf beit", "hf segformer", "hf bert", "hf gpt2", "hf llama"])
def test_costs_are_recounted_to_the_parameter(name):
    """Tables beside an attention, weights either way round, norms inside it: all in the price of a unit."""
    model, inputs = build(name)
    scores = xprune.score(model, xprune.find_sites(model, inputs), criterion="random")
    task = xprune.LanguageModel() if name in ("hf gpt2", "hf llama") else None
    loader = [inputs if task else {**inputs, "labels": torch.arange(2)}]
    check_selection("global", model, scores, loader, xprune.Budget(params=0.9, macs=0.8), task)


def test_captum_scores_a_language_model_without_classes():
    model, inputs = build("hf llama")
    sites = xprune.find_sites(model, inputs)
    scores = xprune.score(model, sites, counting(), "captum:IntegratedGradients", task=xprune.LanguageModel())
    assert scores.classwise is None and all(bool(values.isfinite().all()) for values in scores.values)
