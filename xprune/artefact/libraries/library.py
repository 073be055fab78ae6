"""What `save` and `load` have to know about a library of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from xprune.core.provenance import Arch


@dataclass(frozen=True)
class Library:
    """Says how the models of one library are named and built again.

    Args:
        name: The name of the library in saved files.
        build: A function that takes the name of an architecture and its arguments, and returns the model on torch's
            default device. It must download nothing and open no file, even if the arguments ask for it, because they
            come from a file that anybody may have written. It raises ArtefactError for a name or argument that is not
            allowed.
        arch_of: A function that takes a model and returns the architecture that the model carries. None for a model of
            another library.
        transient: Names of attributes that say how a model is run, not what it is. They may differ between the model
            that is saved and the one that is built again.

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
    """Returns True for numbers, strings, None, and lists or tuples of these. False for anything else.

    Example:
        >>> plain([1, "a", None]), plain({"a": 1})
        (True, False)
    """
    if isinstance(value, (list, tuple)):
        return all(plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
