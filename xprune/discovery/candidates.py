"""Proposes sites for modules of unknown classes, from their attributes and tensor shapes. Proves nothing.

A proposal is a complete `Site`: which rows, columns and attributes belong to a unit. Shapes seldom leave one
answer, so proposals come in an order, the likelier first. `by_structure` tries them on the module.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from xprune.core.site import Cut, Site
from xprune.modules.norms import is_feature_norm

HEADS = ("num_heads", "n_head", "n_heads", "heads", "nhead", "num_attention_heads", "head_count")
"""Attributes that may hold the number of heads of an attention."""

KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
"""Attributes that may hold the number of key and value heads, which groups of query heads share."""

LAYOUTS = ("groups first", "units first", "narrow layers shared")
"""Orders in which the rows of a producer may lie.

- "groups first": (q/k/v, units, width), as in most fused qkv layers.
- "units first": (units, q/k/v, width).
- "narrow layers shared": as "groups first", but a layer with fewer rows than units x width is shared by all units and
  is not cut. An example is the one key of multi-query attention.
"""


class Structure(ABC):
    """Says how to recognise a module that holds units of one kind, if no adapter knows its class.

    There are two subclasses, `AttentionStructure` in `kinds/head.py` and `MlpStructure` in `kinds/neuron.py`.

    Attributes:
        kind: Name of the unit kind.
        called: Name of the units in reasons.
        attributes: Attributes of a module that may hold the number of units.
        normed: True if a norm inside the module may run over the units.
        around: True if a module that contains a known site can still be tried. False if it is skipped.
    """

    kind: ClassVar[str]
    called: ClassVar[str]
    attributes: ClassVar[tuple[str, ...]] = ()
    normed: ClassVar[bool] = False
    around: ClassVar[bool]

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Returns True if the module looks like one with such units."""

    @abstractmethod
    def sizes(self, module: nn.Module, features: int) -> list[int]:
        """Returns the numbers of units to try, the likelier first.

        Args:
            module: The module.
            features: The number of input features of its last linear layer.
        """

    @abstractmethod
    def too_few(self, module: nn.Module, layers: int) -> str:
        """Returns why a module is left alone if its forward calls fewer than two linear layers.

        Args:
            module: The module.
            layers: How many of its linear layers the forward calls: 0 or 1.

        Returns:
            The reason, or "" if the module does not look like one with units after all.
        """

    @abstractmethod
    def only_one(self) -> str:
        """Returns the reason for leaving a module of one unit alone, or "" if none is needed."""

    @abstractmethod
    def plausible(self, features: int, produced: Sequence[int]) -> bool:
        """Returns False if the units cannot come from these layers. Then no proposal is tried.

        Args:
            features: The number of input features of the last linear layer.
            produced: The number of output features of each linear layer called before it.
        """


def heads_of(module: nn.Module) -> int | None:
    """Returns the number of heads that a module has as an attribute, see HEADS. None if it has no such attribute.

    Example:
        >>> heads_of(nn.MultiheadAttention(8, 2)), heads_of(nn.Linear(8, 8))
        (2, None)
    """
    return next((v for name in HEADS if type(v := vars(module).get(name)) is int and v > 0), None)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers of a module by name: its children, and those inside containers among its children.

    Containers are nn.Sequential, nn.ModuleList and nn.ModuleDict. Layers of other child modules are not included.
    """
    found: dict[str, nn.Linear] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            found[name] = child
        elif isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            found.update({f"{name}.{inner}": layer for inner, layer in linears_of(child).items()})
    return found


def sizes_of(module: nn.Module) -> list[int]:
    """Returns the numbers of units to try for an attention.

    With grouped queries, a unit is a group of query heads and the key and value head that they share. The number of
    groups comes first, the number of heads last.
    """
    heads = heads_of(module) or 1
    shared = [v for name in KV_HEADS if type(v := vars(module).get(name)) is int and 1 < v < heads and heads % v == 0]
    return [*dict.fromkeys((*shared, heads))]


def proposals(
    module: nn.Module, structure: Structure, consumer: str, producers: Sequence[str], sizes: Sequence[int]
) -> Iterator[Site]:
    """Proposes sites for a module, the likelier first.

    Four questions are open after a look at the shapes, and a proposal answers each:

    - Which other tensors have an axis of units, for example a table of position biases?
    - Along which of two fitting axes is such a tensor cut?
    - Which attributes hold a multiple of the units' features and have to shrink, for example an inner dimension?
    - In which order do the rows of the producers lie, see LAYOUTS?

    Args:
        module: The module.
        structure: What kind of units it is tried for.
        consumer: Name of the linear layer called last. It reads the units.
        producers: Names of the linear layers called before it.
        sizes: Numbers of units to try.

    Yields:
        Sites whose paths start with "module", the name of the module inside `by_structure.Alone`.
    """
    linears = linears_of(module)
    for size in sizes:
        features = linears[consumer].in_features
        if features % size:
            continue
        width = features // size
        # Attributes that hold the number of units always shrink. Those that hold a multiple of all features may be
        # something else, such as the hidden size of the stream, so each is tried with and without.
        attributes = [n for n in structure.attributes if _is_multiple(module, n, size)]
        feature_counts = [n for n in vars(module) if n not in attributes and _is_multiple(module, n, features)]
        others = _other_tensors(module, (consumer, *producers), size)
        norm = next((n for n, m in module.named_children() if structure.normed and _norms(m, features)), "")
        # The last of these varies fastest: all layouts are tried before a further tensor is cut.
        choices = itertools.product(_subsets(others), (0, 1), _subsets(feature_counts), LAYOUTS)
        for cut_too, axes, shrunk_too, layout in choices:
            other_cuts = _cuts_of_others(module, cut_too, size, axes)
            if other_cuts is None:
                continue
            cuts = [c for name in producers for c in _producer_cuts(linears[name], name, size, width, layout)]
            if norm:
                # A norm over the units is always cut, along its only axis.
                other_cuts = [c for c in other_cuts if not c.tensor.startswith(f"{norm}.")]
                other_cuts += [Cut(f"{norm}.{name}", 0) for name, _ in module.get_submodule(norm).named_parameters()]
            cuts += [Cut(f"{consumer}.weight", 1, 1, width), *other_cuts]
            yield Site(
                name="module",
                kind=structure.kind,
                size=size,
                width=width,
                consumers=(f"module.{consumer}",),
                cuts=tuple(Cut(f"module.{c.tensor}", c.axis, c.groups, c.width) for c in cuts),
                norms=(f"module.{norm}",) if norm else (),
                attributes=tuple(f"module.{name}" for name in (*attributes, *shrunk_too)),
            )


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the subsets of names that are tried: the empty one, the full one, and each name alone."""
    return list(dict.fromkeys(((), tuple(names), *((name,) for name in names))))


def _is_multiple(module: nn.Module, name: str, multiple: int) -> bool:
    """Returns True if the attribute is a positive integer and a multiple of the number. A bool is not an integer."""
    value = vars(module).get(name)
    return type(value) is int and value > 0 and value % multiple == 0


def _norms(module: nn.Module, features: int) -> bool:
    """Returns True if the module is a norm with one statistic over all of so many features."""
    weight = getattr(module, "weight", None)
    return is_feature_norm(module) and isinstance(weight, Tensor) and weight.shape == (features,)


def _other_tensors(module: nn.Module, layers: Sequence[str], size: int) -> list[str]:
    """Returns the tensors, outside of `layers`, that have an axis with a multiple of `size` entries."""
    held = (*module.named_parameters(), *module.named_buffers())
    return [n for n, t in held if n.rpartition(".")[0] not in layers and any(d % size == 0 for d in t.shape if d)]


def _cuts_of_others(module: nn.Module, names: Sequence[str], size: int, which: int) -> list[Cut] | None:
    """Returns a cut for each of these tensors, along the first (`which` 0) or second (1) axis that fits.

    An axis with exactly `size` entries is preferred to a multiple.

    Returns:
        The cuts. None for `which` 1 if no tensor has a second such axis: the cuts would be those of `which` 0.
    """
    cuts, has_second = [], False
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    for name in names:
        shape = tensors[name].shape
        axes = [a for a, d in enumerate(shape) if d == size] or [a for a, d in enumerate(shape) if d and d % size == 0]
        has_second = has_second or len(axes) > 1
        axis = axes[min(which, len(axes) - 1)]
        cuts.append(Cut(name, axis, 1, shape[axis] // size))
    return cuts if has_second or not which else None


def _producer_cuts(layer: nn.Linear, name: str, size: int, width: int, layout: str) -> list[Cut]:
    """Returns the cuts of a producer's weight and bias. Empty if all units share its output."""
    rows = layer.out_features
    if rows % size or (layout == "narrow layers shared" and rows < size * width):
        return []
    # Rows that are no multiple of all features cannot be groups of them: keys may have another width than values.
    groups = rows // (size * width) if layout != "units first" and rows % (size * width) == 0 else 1
    parts = [part for part in ("weight", "bias") if getattr(layer, part) is not None]
    return [Cut(f"{name}.{part}", 0, groups, rows // (size * groups)) for part in parts]
