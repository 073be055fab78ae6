"""`Library`: the functions by which `save` and `load` name and build the models of one library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from xprune.core.provenance import Arch


@dataclass(frozen=True)
class Library:
    """A library of models: how `save` finds the architecture of a model, and how `load` builds it.

    Args:
        name: The name of the library in saved files.
        build: A function of (name of an architecture, arguments) that returns the model on torch's default device. It
            must download nothing and open no file, even if the arguments ask for it: they come from a file that anybody
            may have written. It raises ArtefactError for a name or argument that is not allowed.
        arch_of: A function of a model. It returns the architecture that the model itself names, or None for a model of
            another library.
        transient: The names of attributes that only say how a model is run, such as "fused_attn". They may differ
            between the saved model and the one that is built.

    Example:
        >>> def build(name, kwargs): return nn.Linear(**kwargs)
        >>> mine = Library("mine", build, arch_of=lambda model: None, transient=frozenset())
        >>> mine.build("linear", {"in_features": 2, "out_features": 3})
        Linear(in_features=2, out_features=3, bias=True)
    """

    name: str
    build: Callable[[str, Mapping[str, Any]], nn.Module]
    arch_of: Callable[[nn.Module], Arch | None]
    transient: frozenset[str]


def plain(value: Any) -> bool:
    """Returns True for plain values: numbers, strings, None, and lists or tuples of these. Else False.

    Only such values may be arguments in a saved file.

    Example:
        >>> plain([1, "a", None]), plain({"a": 1})
        (True, False)
    """
    if isinstance(value, (list, tuple)):
        return all(plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
