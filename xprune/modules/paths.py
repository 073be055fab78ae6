"""Paths: tensors, whole numbers and parts of a module by their dotted paths."""

from typing import Any

from torch import Tensor, nn


def part_at(module: nn.Module, path: str) -> Any:
    """What stands at a dotted path, None for nothing or for no path."""
    found: Any = module if path else None
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path; AttributeError where there is none."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), name)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{path} is no tensor")
    return tensor


def attribute_at(model: nn.Module, path: str) -> int:
    """The whole number at a dotted path, that of a tuple at its index; AttributeError where there is none."""
    module, name, index = count_at(model, path)
    value = getattr(module, name)
    if index is not None:
        value = value[index] if isinstance(value, tuple) and index < len(value) else None
    if type(value) is not int:
        raise AttributeError(f"{path} is no whole number")
    return value


def count_at(model: nn.Module, path: str) -> tuple[nn.Module, str, int | None]:
    """(module, attribute, index in it): "rel_pos.bias_shape.2" is the third number of a tuple."""
    owner, _, name = path.rpartition(".")
    index = int(name) if name.isdigit() else None
    if index is not None:
        owner, _, name = owner.rpartition(".")
    return model.get_submodule(owner), name, index


def set_attribute(model: nn.Module, path: str, count: int) -> nn.Module:
    """Sets the whole number at a dotted path, that of a tuple at its index; the module that holds it."""
    module, name, index = count_at(model, path)
    old: Any = getattr(module, name)
    setattr(module, name, count if index is None else (*old[:index], count, *old[index + 1 :]))
    return module


def is_linear(module: nn.Module) -> bool:
    """True for a linear layer: torch's, or one that calls its features channels, as PyG's own does."""
    weight = getattr(module, "weight", None)
    named = hasattr(module, "in_channels") and hasattr(module, "out_channels")
    return isinstance(module, nn.Linear) or (named and isinstance(weight, Tensor) and weight.dim() == 2)
