"""Hugging Face: exact for each family, batches as mappings, language models, files that need no hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import xprune
from benchmarks.hugging_face_models import CLASSES, MODELS, TOKENS
from tests import reference
from xprune.adapters.hugging_face import HUGGING_FACE
from xprune.gates import Gates
from xprune.plan import Plan
from xprune.provenance import Arch
from xprune.structure import Removed
from xprune.testing import check_adapter, check_criterion, perturb, random_plan

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


def build(name):
    """(model with random weights everywhere, inputs)."""
    model, inputs = MODELS[name]()
    return perturb(model), inputs


def pruned(name, seed=1, gone=0.3):
    model, inputs = build(name)
    return xprune.apply(model, random_plan(xprune.find_sites(model, inputs), seed, gone), inputs), inputs


def rows(name, count=16):
    """Batches of 8 mappings whose label can be told from the input."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    if "pixel_values" in MODELS[name]()[1]:
        inputs = torch.randn(count, 3, 32, 32, generator=chance) + labels[:, None, None, None]
        data = [{"pixel_values": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    else:
        ids = torch.randint(4, TOKENS, (count, 12), generator=chance)
        ids[:, 0] = labels
        mask = (torch.arange(12) < torch.randint(6, 13, (count, 1), generator=chance)).long()
        data = [{"input_ids": x, "attention_mask": m, "labels": y} for x, m, y in zip(ids, mask, labels, strict=True)]
    return DataLoader(data, batch_size=8)


def counting(count=32, length=12):
    """Batches of 8 rows of tokens that count upwards."""
    ids = torch.arange(length) + torch.randint(
        4, TOKENS - length, (count, 1), generator=torch.Generator().manual_seed(0)
    )
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=8)


@torch.no_grad()
def first(model, inputs):
    outputs = model(**inputs)
    return outputs[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_gated(name, attention):
    if (name, attention) == ("hf gemma2", "sdpa"):
        pytest.skip("transformers has no SDPA with capped scores")
    model, inputs = build(name)
    model.set_attn_implementation(attention)
    sites = check_adapter(model, inputs, adapter=ADAPTER.get(name, "hf-attention"), seeds=range(2))
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


def test_heads_that_share_one_table_over_all_layers_stay():
    config = transformers.BeitConfig(**{**MODELS["hf beit"]()[0].config.to_dict(), "use_relative_position_bias": False})
    config.use_shared_relative_position_bias = True
    model, inputs = transformers.BeitModel(config).eval(), MODELS["hf beit"]()[1]
    assert {site.kind for site in xprune.find_sites(model, inputs)} == {"neuron"}


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


def test_captum_says_that_a_language_model_has_no_classes():
    model, inputs = build("hf llama")
    with pytest.raises(xprune.DataError, match="no classes"):
        sites = xprune.find_sites(model, inputs)
        xprune.score(model, sites, counting(), "captum:IntegratedGradients", task=xprune.LanguageModel())


def run_elsewhere(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_language_model_from_dense_to_a_file_in_a_new_process(tmp_path):
    task, loader = xprune.LanguageModel(), counting()
    model = xprune.finetune(MODELS["hf llama"]()[0], loader, xprune.Finetune(epochs=12, lr=1e-2), task=task)
    dense = xprune.evaluate(model, loader, task=task)
    tuning = xprune.Finetune(epochs=6, lr=3e-3, distill=0.5)
    learned = xprune.LearnedThresholds(steps=8)
    pruner = xprune.Pruner(model, "taylor", xprune.Budget(params=0.85), learned, tuning, task)
    result = pruner.run(loader)
    assert result.metrics["pruned"].params <= 0.85 * result.metrics["dense"].params
    assert result.metrics["pruned"].macs < result.metrics["dense"].macs
    assert dense.metric > 0.5 and result.metrics["finetuned"].metric > 0.5  # chance is about 0.01
    result.save(tmp_path / "model")
    ids = next(iter(loader))["input_ids"]
    save_file({"ids": ids, "logits": first(result.model, {"input_ids": ids})}, tmp_path / "check.safetensors")
    run_elsewhere(
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import torch; from safetensors.torch import load_file; from xprune.artefact import load\n"
        f"d = load_file({str(tmp_path / 'check.safetensors')!r}); model = load({str(tmp_path / 'model')!r})\n"
        "assert type(model).__module__.startswith('transformers.')\n"
        "with torch.no_grad(): assert torch.equal(model(d['ids']).logits, d['logits'])\n"
    )


def test_a_model_of_from_pretrained_through_the_whole_path(tmp_path):
    build("hf vit")[0].save_pretrained(tmp_path / "mine")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "mine")
    result = xprune.Pruner(model, "taylor", finetune=xprune.Finetune(epochs=1)).run(rows("hf vit"))
    assert result.metrics["pruned"].macs <= 0.5 * result.metrics["dense"].macs
    result.save(tmp_path / "model")
    assert "mine" not in (tmp_path / "model" / "xprune.json").read_text()  # where it came from is nobody's business
    loaded, inputs = xprune.load(tmp_path / "model"), MODELS["hf vit"]()[1]
    assert torch.equal(first(loaded, inputs), first(result.model, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_saved_equals_loaded(name, tmp_path, recwarn):
    model, inputs = pruned(name)
    model.set_attn_implementation("eager")
    first(model, inputs)  # Swin sets its windows in the forward pass
    xprune.save(model, tmp_path / "model")
    assert not [w for w in recwarn if "architecture" in str(w.message)]
    loaded = xprune.load(tmp_path / "model")
    assert type(loaded) is type(model) and torch.equal(first(loaded, inputs), first(model, inputs))
    assert any(isinstance(m, Removed) for m in loaded.modules()) == any(isinstance(m, Removed) for m in model.modules())


def test_what_a_config_does_not_tell_is_not_claimed(tmp_path):
    model = transformers.ViTModel(MODELS["hf vit"]()[0].config, add_pooling_layer=False)
    with pytest.warns(UserWarning, match=r"transformers builds as ViTModel differs: pooler.*model_fn"):
        xprune.save(model, tmp_path / "model")
    with pytest.raises(xprune.ArtefactError, match="does not rebuild"):
        config = {**MODELS["hf vit"]()[0].config.to_dict(), "num_hidden_layers": 3}
        xprune.save(model, tmp_path / "model", arch=Arch("ViTModel", tuple(config.items()), "transformers"))


TAMPERING = {
    "an unknown library": ({"library": "pickle"}, "known libraries"),
    "a library that is no name": ({"library": ["timm"]}, "known libraries"),
    "no model": ({"name": "BertTokenizer"}, "no model class"),
    "code of the standard library": ({"name": "os"}, "no model class"),
    "a model that loads by name": ({"name": "TimmWrapperModel"}, "no model class"),
    "a class of Auto": ({"name": "AutoModel"}, "no model class"),
    "remote code": ({"auto_map": {"AutoModel": "them--evil.Model"}}, "code to run"),
    "remote code further down": ({"text_config": [{"auto_map": {"AutoModel": "evil"}}]}, "code to run"),
    "a backbone of the hub": ({"backbone": "facebook/dinov2-base"}, "weights to load"),
    "weights of the hub": ({"use_pretrained_backbone": True}, "weights to load"),
    "a kernel of the hub": ({"attn_implementation": "kernels-community/flash-attn"}, "eager and sdpa"),
    "the same by its private name": ({"_attn_implementation": "kernels-community/flash-attn"}, "no setting"),
    "a config of the wrong type": ({"hidden_size": "wide"}, "cannot build"),
    "another width": ({"hidden_size": 27}, "does not fit|in the file"),
}


@pytest.mark.parametrize("how", TAMPERING)
def test_a_config_that_is_not_ours_is_refused(how, tmp_path):
    change, message = TAMPERING[how]
    xprune.save(pruned("hf vit")[0], tmp_path / "model")
    path = tmp_path / "model" / "xprune.json"
    header = json.loads(path.read_text())
    for key, value in change.items():
        (header["arch"] if key in ("library", "name") else header["arch"]["kwargs"])[key] = value
    path.write_text(json.dumps(header))
    with pytest.raises(xprune.ArtefactError, match=message):
        xprune.load(tmp_path / "model")


def test_without_transformers_only_its_models_are_missing(tmp_path):
    xprune.save(pruned("hf vit")[0], tmp_path / "model")
    run_elsewhere(
        "import sys; sys.modules['transformers'] = None\n"
        "import timm, torch, xprune\n"
        "assert len(xprune.find_sites(timm.create_model('test_vit'), torch.randn(2, 3, 160, 160)))\n"
        f"try: xprune.load({str(tmp_path / 'model')!r})\n"
        "except xprune.ArtefactError as error: assert 'xprune[hf]' in str(error)\n"
        "else: raise AssertionError\n"
    )


def test_the_loss_of_a_language_model_is_its_own():
    model, inputs = build("hf llama")
    task, ids = xprune.LanguageModel(), inputs["input_ids"]
    _, targets = task.unpack({"input_ids": ids})
    with torch.no_grad():
        ours, theirs = task.loss(task.forward(model, {"input_ids": ids}), targets), model(ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)


def test_tokens_without_labels_do_not_count():
    task = xprune.TokenClassification()
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    _, targets = task.unpack({"input_ids": torch.zeros(2, 5).long(), "labels": torch.full((2, 5), -100)})
    targets[0, 1], targets[1, 2:] = 3, torch.tensor([4, 5, 6])
    task.check(logits, targets)
    logs = logits.log_softmax(-1)
    by_hand = -(logs[0, 1, 3] + (logs[1, 2, 4] + logs[1, 3, 5] + logs[1, 4, 6]) / 3) / 2
    torch.testing.assert_close(task.loss(logits, targets), by_hand)
    expected = [float(logits[0, 1].argmax() == 3), float((logits[1, 2:].argmax(-1) == targets[1, 2:]).float().mean())]
    torch.testing.assert_close(task.metric(logits, targets), torch.tensor(expected))
    batch = {"input_ids": targets.abs(), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    assert xprune.LanguageModel().unpack(batch)[1][1].tolist()[2:] == [-100] * 3


BAD = {
    "no labels": (xprune.Classification(), {"input_ids": torch.zeros(2, 3).long()}, "with 'labels'"),
    "no ids": (xprune.LanguageModel(), {"labels": torch.zeros(2, 3).long()}, "with 'input_ids'"),
    "a pair": (xprune.LanguageModel(), (torch.zeros(2, 3), torch.zeros(2, 3)), "TokenClassification"),
    "a label for a row": (
        xprune.TokenClassification(),
        {"x": 0, "labels": torch.zeros(2).long()},
        r"\(batch, tokens\)",
    ),
}


@pytest.mark.parametrize("how", BAD)
def test_batches_that_do_not_fit_are_refused(how):
    task, batch, message = BAD[how]
    with pytest.raises(xprune.DataError, match=message):
        task.unpack(batch)


@pytest.mark.parametrize("targets", [[[1, -100, -100]], [[1, 7, 2]], [[1, -3, 2]]])
def test_labels_that_do_not_fit_are_refused(targets):
    with pytest.raises(xprune.DataError, match=r"no labels|out of range"):
        xprune.LanguageModel().check(torch.zeros(1, 3, 7), torch.tensor(targets))


def test_the_example_of_the_documentation_runs(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "hugging-face.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    here = {**os.environ, "PYTHONPATH": str(page.parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=here)
    assert load_file(tmp_path / "pruned" / "model.safetensors")
