"""Tests which modules and tensors dotted paths lead to."""

import pytest
import torch
from torch import nn

from xprune.modules.paths import attribute_at, part_at, set_attribute, tensor_at


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 4))
    made[0].shape = (1, 2, 3)
    made[0].num_heads = 2
    return made


def test_tensors_and_numbers_are_found_by_their_paths():
    made = model()
    assert tensor_at(made, "0.weight") is made[0].weight
    assert attribute_at(made, "0.num_heads") == 2 and attribute_at(made, "0.shape.2") == 3
    set_attribute(made, "0.shape.2", 7)
    assert made[0].shape == (1, 2, 7)
    assert part_at(made, "0.nothing") is None and part_at(made, "") is None


@pytest.mark.parametrize("path", ["0.nothing", "1.weight", "0.in_features"])
def test_what_is_no_tensor_is_an_attribute_error(path):
    with pytest.raises(AttributeError):
        tensor_at(model(), path)


@pytest.mark.parametrize("path", ["0.weight", "0.shape.5", "0.nothing"])
def test_what_is_no_whole_number_is_an_attribute_error(path):
    made = model()
    assert isinstance(made[0].weight, torch.Tensor)
    with pytest.raises(AttributeError):
        attribute_at(made, path)
