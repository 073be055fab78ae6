"""Finds parts, tensors and integer attributes of a model by their dotted paths."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def part_at(module: nn.Module, path: str) -> Any:
    """Returns the attribute at a dotted path. Returns None if there is no such attribute, or if the path is empty.

    Example:
        >>> part_at(nn.Sequential(nn.Linear(4, 8)), "0.out_features")
        8
    """
    found: Any = module if path else None
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """Returns the parameter or buffer at a dotted path. Raises AttributeError if there is none."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), name)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{path} is not a tensor")
    return tensor


def attribute_at(model: nn.Module, path: str) -> int:
    """Returns the integer at a dotted path. Raises AttributeError if there is none.

    The integer may be an attribute of a module, or lie inside such an attribute. "rel_pos.bias_shape.2" is the third
    number of the tuple `bias_shape`, and "attn.config.num_heads" is an attribute of an object that `attn` holds.
    """
    found: Any = model
    for name in path.split("."):
        found = _inside(found, name, path)
    if type(found) is not int:
        raise AttributeError(f"{path} is not a whole number")
    return found


def set_attribute(model: nn.Module, path: str, count: int) -> nn.Module:
    """Sets the integer at a dotted path, see `attribute_at`. Returns the module that holds it.

    If the integer lies inside a tuple or another object, the module gets a changed copy of it. So other modules that
    hold the same object, such as a config, keep their numbers.
    """
    module, names = model, path.split(".")
    while len(names) > 1 and isinstance(inner := getattr(module, names[0], None), nn.Module):
        module, names = inner, names[1:]
    setattr(module, names[0], _changed(getattr(module, names[0]), names[1:], count, path))
    return module


def _inside(value: Any, name: str, path: str) -> Any:
    """Returns the part of a value that one name of a path leads to. Raises AttributeError if there is none."""
    if isinstance(value, (tuple, list)):
        if name.isdigit() and int(name) < len(value):
            return value[int(name)]
    elif isinstance(value, Mapping):
        if name in value:
            return value[name]
    elif hasattr(value, name):
        return getattr(value, name)
    raise AttributeError(f"{path} is not a whole number: there is no {name}")


def _changed(value: Any, names: list[str], count: int, path: str) -> Any:
    """Returns a copy of a value in which the integer at the rest of the path is `count`."""
    if not names:
        return count
    inner = _changed(_inside(value, names[0], path), names[1:], count, path)
    if isinstance(value, (tuple, list)):
        items = [inner if index == int(names[0]) else item for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {**value, names[0]: inner}
    twin = copy.copy(value)
    setattr(twin, names[0], inner)
    return twin


def layer_path(model: nn.Module, path: str) -> str:
    """Returns the path of the module that a consumer belongs to: the path itself, or that of a weight's owner."""
    return path.rpartition(".")[0] if isinstance(part_at(model, path), Tensor) else path


def input_axis(layer: Any) -> int:
    """Returns the axis of the features in the input of a layer: 1 for a convolution, else -1, the last axis."""
    return 1 if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1


def is_linear(module: nn.Module) -> bool:
    """Returns True if a module is a linear layer of torch or of PyTorch Geometric, else False.

    PyTorch Geometric's layer has `in_channels` and `out_channels` instead of `in_features` and `out_features`.
    """
    weight = getattr(module, "weight", None)
    named = hasattr(module, "in_channels") and hasattr(module, "out_channels")
    return isinstance(module, nn.Linear) or (named and isinstance(weight, Tensor) and weight.dim() == 2)


def is_transposed(module: nn.Module) -> bool:
    """Returns True for a linear layer whose weight is (inputs, outputs), as in the Conv1D of transformers, else False."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")


def weight_axes(layer: Any) -> tuple[int, int]:
    """Returns (axis of the inputs, axis of the outputs) of the weight of a linear layer or convolution."""
    if layer.weight.dim() == 3 and type(getattr(layer, "in_features", None)) is int:
        # The layers of a mixture of experts in one module. Their weight is (experts, inputs, outputs) or has the last
        # two axes the other way round.
        return (1, 2) if layer.weight.shape[1] == layer.in_features else (2, 1)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return (0, 1) if is_transposed(layer) or isinstance(layer, transposed) else (1, 0)
