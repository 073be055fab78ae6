"""Tests that an attention or MLP without units returns the bias of its consumer."""

import pytest
import torch
from torch import nn

from xprune.modules.removed import Removed

# Name -> (a function that builds the consumer, shape of the input of the module).
LAYERS = {
    "linear": (lambda bias: nn.Linear(4, 3, bias=bias), (2, 5, 4)),
    "convolution": (lambda bias: nn.Conv2d(4, 3, 1, bias=bias), (2, 4, 6, 7)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_it_gives_what_the_layer_gives_for_zeros(name, bias):
    make, shape = LAYERS[name]
    layer = make(bias)
    got = Removed(layer)(torch.randn(shape), "mask", key=None)
    assert torch.equal(got, layer(torch.zeros(shape)))


@pytest.mark.parametrize("name", LAYERS)
def test_it_follows_the_dtype_of_its_input_and_learns(name):
    make, shape = LAYERS[name]
    layer = make(True)
    gone = Removed(layer)
    assert gone(torch.zeros(shape, dtype=torch.bfloat16)).dtype == torch.bfloat16
    gone(torch.zeros(shape)).sum().backward()
    assert gone.bias is layer.bias and (layer.bias.grad > 0).all()
    assert [name for name, _ in gone.named_parameters()] == ["bias"]


def test_without_a_bias_it_has_nothing_to_save():
    assert not Removed(nn.Linear(4, 3, bias=False)).state_dict()
