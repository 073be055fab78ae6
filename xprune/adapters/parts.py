"""The optional parts of a `Units` entry: what else shrinks, how features lie, other forwards, the stream, the scope.

Names are relative to the module that is served. What a module does not have, or has as None, is left out, so that one
entry serves the variants of a class.
"""

from dataclasses import dataclass

from torch import nn

from xprune.core.registry import imported

Axes = tuple[tuple[str, int], ...]
"""(tensor, axis) of several tensors."""


@dataclass(frozen=True)
class Also:
    """What else goes with a unit, beside the rows of the readers and the columns of the writer.

    Args:
        tensors: (tensor, axis) of what has a multiple of the units as entries along that axis: a column of a bias table
            for each head, biases that belong to no layer.
        layers: Layers all of whose tensors shrink along their first axis: gates, norms over the units.
        norm: A norm that runs over the units themselves. Gates then mean its statistics over the units that are kept.
        counts: Attributes that hold a multiple of the units, beside `Units.count`; "shape.2" is the third of a tuple.
        caches: Attributes to empty once units have gone.
    """

    tensors: Axes = ()
    layers: tuple[str, ...] = ()
    norm: str = ""
    counts: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Features:
    """How the features of units lie in the layers.

    Args:
        layout: Of the input of the writer: "unit-major" where the features of a unit follow one another, "width-major"
            where they stride over the units.
        transposed: True where the weights of readers and writer are (in, out), as transformers' Conv1D has them.
        width: Attribute that holds the features of a unit in the last reader, for a class that does not say how many
            units it has. Keys and values that several query heads share then make one unit of these.
    """

    layout: str = "unit-major"
    transposed: bool = False
    width: str = ""


@dataclass(frozen=True)
class Forwards:
    """Classes that a module gets in place of its own, where its own forward does not do. They keep its attributes.

    A class may be given as "module:Class", which is imported when the class is first needed.

    Args:
        pruned: Class once units have gone, where the own forward takes all of them for granted.
        gated: Class while gates are attached, where the own forward does not call the layer that the units feed.
        removed: Class of what stands in the place of the module once all units have gone, made from (layer, module).
            None: `Removed`, which gives the bias of the writer. The class `pruned` itself: the module stays, with no
            units, and its pruned forward runs without any.
        built: Attribute that is to say which of the units built are left, for a `pruned` class that is given something
            made outside of it for all of them.
    """

    pruned: type[nn.Module] | str | None = None
    gated: type[nn.Module] | str | None = None
    removed: type[nn.Module] | str | None = None
    built: str = ""

    def class_of(self, name: str) -> type[nn.Module] | None:
        """Returns the class of the field "pruned", "gated" or "removed", None if the field is None."""
        given = getattr(self, name)
        found: type[nn.Module] | None = imported(given) if isinstance(given, str) else given
        return found


@dataclass(frozen=True)
class Stream:
    """What of the module lies along the residual stream, beside the readers' columns and the writer's rows.

    Args:
        tensors: (tensor, axis) of what runs over the stream before some of the readers.
        after: Layers that run over the stream once the writer has written to it.
        counts: Attributes that hold a multiple of the stream's channels.
        joins: True where the module adds its input to what its units write: the stream it reads is the one it writes.
    """

    tensors: Axes = ()
    after: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    joins: bool = False


@dataclass(frozen=True)
class Scope:
    """Which modules of the class the entry serves, and how much of a module its units make up.

    Args:
        needs: What the module has, and not as False: variants of a class in other layouts have entries of their own.
        unless: What is true of the module where its units cannot go.
        inner: The module in it that the units make up, where a tensor that shrinks with them stands outside of that.
        whole: False where the module gives more than the output of its writer, so that one unit has to stay.
    """

    needs: tuple[str, ...] = ()
    unless: str = ""
    inner: str = ""
    whole: bool = True
