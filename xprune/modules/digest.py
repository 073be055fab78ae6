"""Digests: short names for what a model holds and how it is built, so that one is not taken for another."""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xprune.modules.copies import tensors

_LENGTH = 16  # hexadecimal digits, 64 bits
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, functools.partial)


def values_digest(module: nn.Module) -> str:
    """A name for every value of every parameter and buffer, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors(module).items():
        _add(digest, name, tensor)
    return digest.hexdigest()[:_LENGTH]


def structure_digest(module: nn.Module) -> str:
    """A name for the classes of all modules, what they print of themselves, and their plain attributes."""
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        plain = {name: value for name, value in vars(part).items() if _is_plain(value) and name != "training"}
        # An activation may be held as a function, and a forward may have been put in the place of the class's own.
        called = {name: digest_of(_apart(value)) for name, value in vars(part).items() if isinstance(value, _FUNCTIONS)}
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        said = f"{path}|{kind}|{part.extra_repr()}|{sorted(plain.items())}|{sorted(called.items())}\n"
        digest.update(said.encode())
    return digest.hexdigest()[:_LENGTH]


def digest_of(value: Any) -> str:
    """A name for a nest of tensors, plain values, dataclasses, functions and other objects, by what they hold."""
    digest = hashlib.sha256()
    _nest(digest, value, ())
    return digest.hexdigest()[:_LENGTH]


def _apart(function: Any) -> Any:
    """A method without its object, which is the module that is looked at."""
    return function.__func__ if isinstance(function, MethodType) else function


def _nest(digest: Any, value: Any, inside: tuple[int, ...]) -> None:
    """Adds a value. `inside`: the ids of what holds it, since objects may point back to their owners."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype} {value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Tensor):
        _add(digest, "", value)
    elif isinstance(value, nn.Module):
        digest.update(f"{structure_digest(value)} {values_digest(value)}".encode())
    elif id(value) in inside:
        digest.update(b"...")
    elif isinstance(value, (Mapping, tuple, list)) or not _is_plain(value):
        digest.update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
        for name, item in _items(value):
            digest.update(f"{name}=".encode())
            _nest(digest, item, (*inside, id(value)))
        digest.update(b")")
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """(name, part) of all that an object is made of."""
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (tuple, list)):
        return enumerate(value)
    if isinstance(value, (set, frozenset)):
        return enumerate(sorted(digest_of(item) for item in value))  # in an order that is the same in every process
    if isinstance(value, torch.Generator):
        return (("state", value.get_state()),)
    if isinstance(value, MethodType):
        return (("function", value.__func__), ("object", value.__self__))
    if isinstance(value, BuiltinFunctionType):
        return (("name", f"{value.__module__}.{value.__qualname__}"),)
    if isinstance(value, functools.partial):
        return (("function", value.func), ("args", value.args), ("keywords", value.keywords))
    if isinstance(value, FunctionType):
        plain = [each for each in value.__code__.co_consts if _is_plain(each)]
        code = (value.__code__.co_code.hex(), value.__code__.co_names, plain)
        closed = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return (
            ("name", f"{value.__module__}.{value.__qualname__}"),
            ("code", code),
            ("defaults", (value.__defaults__, value.__kwdefaults__)),
            ("closure", closed),
        )
    if isinstance(value, type):
        return (("name", f"{value.__module__}.{value.__qualname__}"),)
    held = {field.name for field in fields(value)} if is_dataclass(value) else set(getattr(value, "__dict__", ()))
    held |= {name for name in slots_of(type(value)) if hasattr(value, name)}
    if held:
        return ((name, getattr(value, name)) for name in sorted(held))
    text = repr(value)
    return (("repr", "" if " at 0x" in text else text),)  # an address says nothing of the value


def slots_of(kind: type) -> list[str]:
    """Names of the attributes that objects of a class keep without a dictionary."""
    found: list[str] = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return [name for name in found if not name.startswith("__")]


def _is_filled(cell: Any) -> bool:
    """False for a variable of an enclosing function that has no value yet."""
    try:
        cell.cell_contents  # noqa: B018 - to read it is the test
    except ValueError:
        return False
    return True


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _is_plain(value: Any) -> bool:
    """Numbers, text, types of torch and tuples of these."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
