"""Tests that the learning rate falls from the head to the embedding as the formula says."""

import pytest
import timm.optim
import torch
from torch import nn

import xprune
from tests.support.models import build, loader
from xprune.training.optim import decayed, layer_scales


def rates(model, decay, lr=1.0):
    """Name of a parameter -> its learning rate in the groups for the optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = decayed(model, 0.05, lr, decay)
    found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups), "each parameter once"
    for group in groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    return found


@pytest.mark.parametrize("name", ["vit", "swin", "class attention"])
def test_models_of_timm_have_the_rates_of_timm(name):
    model = build(name)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.7)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {names[id(p)]: 0.1 * group["lr_scale"] for group in groups for p in group["params"]}
    found = rates(model, 0.7, lr=0.1)
    assert found == pytest.approx(expected)
    assert (
        found["head.fc.bias" if name == "swin" else "head.bias"] == pytest.approx(0.1) and len(set(found.values())) > 3
    )


def test_other_models_have_the_rates_of_the_formula():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(8))
            self.embed = nn.Linear(4, 8)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    found = rates(Model(), 0.5)
    depth = {"place": 0, "embed": 0, "layers": None, "norm": 4, "head": 4}
    for name, rate in found.items():
        layer = depth[name.split(".")[0]]
        layer = int(name.split(".")[1]) + 1 if layer is None else layer
        assert rate == 0.5 ** (4 - layer), name


def test_what_lies_between_blocks_has_the_rate_of_the_block_before():
    stage = lambda: nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 8), stage(), nn.Linear(8, 8), stage(), nn.Linear(8, 3))
    found = rates(model, 0.5)
    assert [found[name] for name in ("0.weight", "1.0.norm1.bias", "1.1.norm1.bias", "2.weight", "3.0.norm1.bias")] == [
        0.5**5, 0.5**4, 0.5**3, 0.5**3, 0.5**2,
    ]  # fmt: skip
    assert found["4.weight"] == 1


def test_models_of_transformers_count_their_layers():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **shape))
    found = rates(model, 0.5)
    assert found["bert.embeddings.word_embeddings.weight"] == 0.5**4
    assert found["bert.encoder.layer.0.output.dense.weight"] == 0.5**3
    assert found["bert.encoder.layer.2.output.dense.weight"] == 0.5
    assert found["bert.pooler.dense.weight"] == found["classifier.bias"] == 1


def test_frozen_parameters_have_no_rate():
    model = build("vit")
    model.patch_embed.requires_grad_(False)
    assert not any(name.startswith("patch_embed") for name in rates(model, 0.7))
    assert len(layer_scales(model, 0.7)) == len(rates(model, 0.7))


def test_the_first_step_moves_each_weight_as_far_as_its_rate_says():
    """The first step of AdamW moves a weight by its learning rate, in the direction of its gradient."""
    model, data = build("vit"), loader(8, 8)
    settings = {"steps": 1, "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.0}
    plain, layered = (
        xprune.finetune(model, data, xprune.Finetune(**settings, layer_decay=decay)) for decay in (None, 0.5)
    )
    scales = rates(model, 0.5)
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "head.weight"):
        before = model.get_parameter(name)
        far, near = (tuned.get_parameter(name) - before for tuned in (plain, layered))
        torch.testing.assert_close(near, scales[name] * far, rtol=1e-3, atol=1e-7)


def test_a_model_without_layers_is_refused():
    model, data = nn.Linear(4, 3), [(torch.randn(8, 4), torch.arange(8) % 3)]
    with pytest.raises(xprune.ModelError, match="has no layers for Finetune"):
        xprune.finetune(model, data, xprune.Finetune(layer_decay=0.5))
    with pytest.raises(xprune.TrainingError, match=r"layer_decay=0\)"):
        xprune.Finetune(layer_decay=0)
