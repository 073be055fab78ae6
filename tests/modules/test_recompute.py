"""Tests that blocks are found, and that computing their activations again changes memory only."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import xprune
from tests.support.models import build, images, loader
from xprune.modules.blocks import blocks_of
from xprune.modules.copies import tensors
from xprune.modules.recompute import recomputed
from xprune.testing import assert_untouched, snapshot


class Normed(nn.Module):
    """A block with a batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.4)

    def forward(self, x, *, scale):
        return x + scale * self.drop(self.norm(self.fc(x)).relu())


class Stack(nn.Module):
    """Blocks that get an argument by its name."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Normed() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=torch.tensor(0.5))
        return self.head(x)


def llama():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **shape))


CASES = {
    "timm's ViT": (lambda: build("vit"), lambda: images(4), 2),
    "timm's Swin": (lambda: build("swin"), lambda: images(4), 3),
    "torch's encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
        lambda: torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)),
        3,
    ),
    "batch norms": (Stack, lambda: torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), 3),
    "transformers with a cache": (llama, lambda: torch.arange(24).view(2, 12), 3),
}


def first(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def learned(model, inputs, wanted):
    """(gradients and buffers, bytes of tensors that the forward pass stores) of a forward and a backward pass."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = {tensor.untyped_storage().data_ptr() for tensor in tensors(model).values()}
    torch.manual_seed(1)
    with recomputed(model, wanted):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = first(model(inputs)).square().mean()
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers()), sum(size for key, size in sizes.items() if key not in held)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_equal_and_less_is_stored(name, training):
    make, data, blocks = CASES[name]
    torch.manual_seed(0)
    model, inputs = make().train(training), data()
    assert len(blocks_of(model)) == blocks
    before = snapshot(model)
    torch.manual_seed(0)
    (expected, much), (found, little) = (
        learned(fresh, inputs, wanted) for fresh, wanted in ((make().train(training), False), (model, True))
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert little < 0.6 * much, f"{little} of {much} bytes"
    assert all("forward" not in vars(module) for module in model.modules())
    assert getattr(getattr(model, "config", None), "use_cache", True)
    if name != "batch norms":
        model.zero_grad(set_to_none=True)
        assert_untouched(model, before)


def test_a_stage_is_not_a_block():
    assert list(blocks_of(build("swin"))) == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]


def test_fine_tuning_gives_the_same_weights():
    model, data = build("swin"), loader(16, 4)
    settings = {"epochs": 2, "ema": 0.9, "accumulate": 2}
    expected, found = (
        xprune.finetune(model, data, xprune.Finetune(**settings, recompute_activations=wanted))
        for wanted in (False, True)
    )
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(found)[name], tensor), name
    assert all("forward" not in vars(module) for module in found.modules())


def test_a_model_without_blocks_is_refused():
    data = [(torch.randn(8, 4), torch.arange(8) % 3)]
    with pytest.raises(xprune.ModelError, match="has no blocks whose activations could be computed again"):
        xprune.finetune(nn.Linear(4, 3), data, xprune.Finetune(recompute_activations=True))
