"""Computes digests: short texts that identify the contents of a model or object. Equal contents have equal digests.

Digests are the same in every process. Checkpoints and comparisons store digests, to notice later that a model, a
setting or a function has changed.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xprune.modules.copies import tensors

_LENGTH = 16
"""The number of hexadecimal digits of a digest. 16 digits are 64 bits."""
OPTIONAL: Mapping[str, Any] = MappingProxyType({"digest": "optional"})
"""The metadata of a dataclass field that a later release added. At its default, the field is no part of digests.

So the digests in existing checkpoints and comparisons stay valid: `field(default=0, metadata=OPTIONAL)`.
"""
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, functools.partial)


def values_digest(module: nn.Module) -> str:
    """Returns a digest of the names, dtypes, shapes and values of all parameters and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in tensors(module).items():
        _add_tensor(digest, name, tensor)
    return digest.hexdigest()[:_LENGTH]


def structure_digest(module: nn.Module) -> str:
    """Returns a digest of how a model is built: the class, the `extra_repr` and the plain attributes of each module.

    It does not depend on the values of parameters, or on train or eval mode.
    """
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        plain = {name: value for name, value in vars(part).items() if _is_plain(value) and name != "training"}
        # Functions matter too: a module may hold its activation as a function, or a replaced forward on the instance.
        functions = {
            name: digest_of(_without_object(value))
            for name, value in vars(part).items()
            if isinstance(value, _FUNCTIONS)
        }
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        # Do not change this format. Existing checkpoints and results of comparisons contain digests that were computed
        # with it.
        line = f"{path}|{kind}|{part.extra_repr()}|{sorted(plain.items())}|{sorted(functions.items())}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:_LENGTH]


def digest_of(value: Any) -> str:
    """Returns a digest of the contents of any value.

    The value may consist of tensors, modules, numbers, texts, containers, dataclasses, functions and other objects.

    Example:
        >>> digest_of({"lr": 0.1, "steps": [1, 2]}) == digest_of({"lr": 0.1, "steps": [1, 2]})
        True
        >>> digest_of({"lr": 0.1}) == digest_of({"lr": 0.2})
        False
    """
    digest = hashlib.sha256()
    _add_value(digest, value, ())
    return digest.hexdigest()[:_LENGTH]


def _without_object(function: Any) -> Any:
    """Returns the function of a method without the object that it is bound to. Other functions are returned unchanged.

    The object is the module whose digest is being computed. With the object, the computation would call itself without
    end.
    """
    return function.__func__ if isinstance(function, MethodType) else function


def _add_value(digest: Any, value: Any, inside: tuple[int, ...]) -> None:
    """Adds a value to a digest.

    Args:
        digest: The hashlib object.
        value: The value.
        inside: The ids of the objects that contain this value. They are needed to stop at an object that contains
            itself.
    """
    if isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype} {value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Tensor):
        _add_tensor(digest, "", value)
    elif isinstance(value, nn.Module):
        digest.update(f"{structure_digest(value)} {values_digest(value)}".encode())
    elif id(value) in inside:
        # The value contains itself.
        digest.update(b"...")
    elif isinstance(value, (Mapping, tuple, list)) or not _is_plain(value):
        digest.update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
        for name, item in _items(value):
            digest.update(f"{name}=".encode())
            _add_value(digest, item, (*inside, id(value)))
        digest.update(b")")
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Returns (name, part) for all parts of a container or an object."""
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (tuple, list)):
        return enumerate(value)
    if isinstance(value, (set, frozenset)):
        # The order of a set differs between processes. So the digests of its items are sorted.
        return enumerate(sorted(digest_of(item) for item in value))
    if isinstance(value, torch.Generator):
        return (("state", value.get_state()),)
    if isinstance(value, MethodType):
        return (("function", value.__func__), ("object", value.__self__))
    if isinstance(value, BuiltinFunctionType):
        return (("name", f"{value.__module__}.{value.__qualname__}"),)
    if isinstance(value, functools.partial):
        return (("function", value.func), ("args", value.args), ("keywords", value.keywords))
    if isinstance(value, FunctionType):
        # The bytecode is included, so that an edited function has another digest. Constants that are not plain, such as
        # the code of inner functions, are left out, because their repr contains a memory address.
        plain = [each for each in value.__code__.co_consts if _is_plain(each)]
        code = (value.__code__.co_code.hex(), value.__code__.co_names, plain)
        captured = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return (
            ("name", f"{value.__module__}.{value.__qualname__}"),
            ("code", code),
            ("defaults", (value.__defaults__, value.__kwdefaults__)),
            ("closure", captured),
        )
    if isinstance(value, type):
        return (("name", f"{value.__module__}.{value.__qualname__}"),)
    names = _counted_fields(value) if is_dataclass(value) else set(getattr(value, "__dict__", ()))
    names |= {name for name in slots_of(type(value)) if hasattr(value, name)}
    if names:
        return ((name, getattr(value, name)) for name in sorted(names))
    text = repr(value)
    # The default repr contains the memory address of the object, which differs between processes.
    return (("repr", "" if " at 0x" in text else text),)


def _counted_fields(value: Any) -> set[str]:
    """Returns the names of the fields of a dataclass, without the `OPTIONAL` fields that are at their default."""
    return {
        each.name for each in fields(value) if each.metadata != OPTIONAL or getattr(value, each.name) != each.default
    }


def slots_of(kind: type) -> list[str]:
    """Returns the names of the attributes that a class and its base classes keep in `__slots__`."""
    found: list[str] = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        # If there is only one slot, `__slots__` may be a plain string.
        found += [names] if isinstance(names, str) else list(names)
    return [name for name in found if not name.startswith("__")]


def _is_filled(cell: Any) -> bool:
    """Returns False if a variable of an enclosing function has no value yet, else True."""
    try:
        cell.cell_contents  # noqa: B018 - reading it is the test
    except ValueError:
        return False
    return True


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Adds the name, dtype, shape and values of a tensor to a digest."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        # The tensor is viewed as bytes because numpy has no bfloat16.
        digest.update(flat.view(torch.uint8).numpy().data)


def _is_plain(value: Any) -> bool:
    """Returns True for None, a number, text, a dtype of torch, and a tuple or list of these, else False."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
