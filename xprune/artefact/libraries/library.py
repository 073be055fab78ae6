"""Library: what saving and loading have to know of a library of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from xprune.core.provenance import Arch


@dataclass(frozen=True)
class Library:
    """One library.

    name        as it is written in files
    build       (name of the architecture, arguments) -> the model, on torch's default device. Downloads nothing and
                opens no file, whatever they say; ArtefactError for what is not known or not allowed
    carried     what a model says of itself, None for a model of another library
    transient   attributes that say how a model is run, not what it is
    """

    name: str
    build: Callable[[str, Mapping[str, Any]], nn.Module]
    carried: Callable[[nn.Module], Arch | None]
    transient: frozenset[str]


def plain(value: Any) -> bool:
    """True for numbers, strings, None and lists of these."""
    if isinstance(value, (list, tuple)):
        return all(plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
