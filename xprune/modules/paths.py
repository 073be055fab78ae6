"""Finds parts, tensors and integer attributes of a model by their dotted paths."""

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
    """Returns the integer attribute at a dotted path. Raises AttributeError if there is none.

    If the attribute is a tuple, the path ends with an index: "rel_pos.bias_shape.2" is the third number of
    `bias_shape`.
    """
    module, name, index = _holder_of(model, path)
    value = getattr(module, name)
    if index is not None:
        value = value[index] if isinstance(value, tuple) and index < len(value) else None
    if type(value) is not int:
        raise AttributeError(f"{path} is not a whole number")
    return value


def set_attribute(model: nn.Module, path: str, count: int) -> nn.Module:
    """Sets the integer attribute at a dotted path, see `attribute_at`. Returns the module that holds the attribute."""
    module, name, index = _holder_of(model, path)
    old: Any = getattr(module, name)
    # A tuple cannot be changed, so the attribute gets a new tuple.
    setattr(module, name, count if index is None else (*old[:index], count, *old[index + 1 :]))
    return module


def _holder_of(model: nn.Module, path: str) -> tuple[nn.Module, str, int | None]:
    """Splits the path of an integer attribute.

    Returns:
        (module, name, index). The attribute `name` belongs to `module`. `index` is the position in the attribute if it
        is a tuple, else None.
    """
    owner, _, name = path.rpartition(".")
    index = int(name) if name.isdigit() else None
    if index is not None:
        owner, _, name = owner.rpartition(".")
    return model.get_submodule(owner), name, index


def input_axis(layer: Any) -> int:
    """Returns the axis of the features in the input of a layer: 1 for a convolution of maps, else -1, the last axis."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def is_linear(module: nn.Module) -> bool:
    """Returns True if a module is a linear layer of torch or of PyTorch Geometric, else False.

    PyTorch Geometric's layer has `in_channels` and `out_channels` instead of `in_features` and `out_features`.
    """
    weight = getattr(module, "weight", None)
    named = hasattr(module, "in_channels") and hasattr(module, "out_channels")
    return isinstance(module, nn.Linear) or (named and isinstance(weight, Tensor) and weight.dim() == 2)
