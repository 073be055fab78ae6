"""Tests of `prune_folder`: block by block gives what the whole model in memory gives, and everything else is refused."""

import copy
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import xprune
from xprune.artefact import files
from xprune.blockwise.prune import prune_folder
from xprune.modules.calls import call

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 64}
MODELS = {
    "llama in bfloat16": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(**TEXT, num_key_value_heads=2, dtype="bfloat16"),
        "model.layers",
    ),
    "qwen2 with tied embeddings": (
        "Qwen2ForCausalLM",
        transformers.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
        "model.layers",
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**TEXT), "gpt_neox.layers"),
    "bert": ("BertForSequenceClassification", transformers.BertConfig(**TEXT), "bert.encoder.layer"),
    "vit": (
        "ViTForImageClassification",
        transformers.ViTConfig(**SMALL, image_size=16, patch_size=8),
        "vit.layers",
    ),
}


def written(name, path):
    """Writes a model with random weights as transformers does, in several files."""
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    # transformers writes into the config.
    config = copy.deepcopy(config)
    model = getattr(transformers, kind)(config)
    if config.dtype is not None:
        model = model.to(config.dtype)
    with torch.no_grad():
        # Biases are 0 at first, which hides mistakes.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size="20KB")
    return path


def inputs_of(name):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(64, (2, 7), generator=generator)}


def all_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude,p=1", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_gives_the_bits_of_the_whole_model(name, criterion, tmp_path):
    kind, _, path = MODELS[name]
    dense, budget, inputs = written(name, tmp_path / "dense"), xprune.Budget(macs=0.7), inputs_of(name)
    assert len(list(dense.glob("*.safetensors"))) > 1
    found = prune_folder(dense, tmp_path / "out", budget, criterion, example_inputs=inputs)
    model = getattr(transformers, kind).from_pretrained(dense).eval()
    sites = xprune.find_sites(model, inputs, inside=f"{path}.*")
    scores = xprune.score(model, sites, criterion=criterion)
    plan = xprune.select(model, scores, budget, example_inputs=inputs)
    whole = xprune.apply(model, plan, inputs)
    assert found.plan == plan and found.scores.sites == tuple(sites)
    assert all(torch.equal(a, b) for a, b in zip(found.scores.values, scores.values, strict=True))
    assert found.scores.info == scores.info and found.scores.scale == scores.scale
    xprune.save(whole, tmp_path / "whole")
    ours, theirs = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours)
    header, other = (json.loads((tmp_path / each / "xprune.json").read_text()) for each in ("out", "whole"))
    assert {key: header[key] for key in ("plan", "arch", "ties")} == {key: other[key] for key in ("plan", "arch", "ties")}
    with torch.no_grad():
        outputs = [call(each, inputs).logits for each in (xprune.load(tmp_path / "out"), whole)]
    assert torch.equal(*outputs)
    macs, dense_macs = found.pruned["macs"], found.dense["macs"]
    assert macs == xprune.count_macs(whole, inputs) <= 0.7 * dense_macs
    assert dense_macs == xprune.count_macs(model, inputs)
