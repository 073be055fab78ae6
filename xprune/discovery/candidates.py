"""Proposes sites for modules of unknown classes, from their attributes and the shapes of their tensors.

A proposal is a complete `Site`: it says which rows, columns and attributes belong to a unit. The shapes seldom leave
only one possibility. So there are several proposals, the likelier ones first. Nothing is proved here. `by_structure`
tests each proposal on the module.
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
"""Attributes that may hold the number of key and value heads. Several query heads share one of these heads."""

LAYOUTS = ("groups first", "units first", "narrow layers shared")
"""Possible orders of the rows in the weight of a producer. A proposal assumes one of them.

- "groups first": (q/k/v, units, width), as in most fused qkv layers.
- "units first": (units, q/k/v, width).
- "narrow layers shared": the same order as "groups first". But a layer with fewer rows than units x width belongs to
  all units together and is not cut. An example is the key layer of multi-query attention.
"""


class Structure(ABC):
    """The rules by which a module with units of one kind is recognised if no adapter knows its class.

    There are two subclasses, `AttentionStructure` in `kinds/head.py` and `MlpStructure` in `kinds/neuron.py`.

    Attributes:
        kind: The name of the unit kind.
        called: The name of the units in the reasons that users read.
        attributes: The names of attributes that may hold the number of units.
        normed: True if a norm layer over the units may lie inside the module.
        around: True if a module that contains a known site is tried too. False if such a module is skipped.
    """

    kind: ClassVar[str]
    called: ClassVar[str]
    attributes: ClassVar[tuple[str, ...]] = ()
    normed: ClassVar[bool] = False
    around: ClassVar[bool]

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Returns True if a module may have such units, else False."""

    @abstractmethod
    def sizes(self, module: nn.Module, features: int) -> list[int]:
        """Returns the numbers of units that proposals should assume, the likelier ones first.

        Args:
            module: The module.
            features: The number of input features of the consumer, which is the last linear layer that the module
                calls.
        """

    @abstractmethod
    def too_few(self, module: nn.Module, layers: int) -> str:
        """Returns the reason for leaving a module alone whose forward calls fewer than two linear layers.

        Args:
            module: The module.
            layers: The number of its linear layers that the forward calls: 0 or 1.

        Returns:
            The reason, or "" if such a module does not count as one with units.
        """

    @abstractmethod
    def only_one(self) -> str:
        """Returns the reason for leaving a module with a single unit alone, or "" if no reason is needed."""

    @abstractmethod
    def plausible(self, features: int, produced: Sequence[int]) -> bool:
        """Returns True if layers with these numbers of output features can produce the units.

        If False, no site is tried for the module.

        Args:
            features: The number of input features of the consumer.
            produced: The numbers of output features of the other linear layers that the module calls.
        """


def heads_of(module: nn.Module) -> int | None:
    """Returns the number of heads that an attribute of the module holds, or None if there is no such attribute.

    HEADS lists the names of such attributes.

    Example:
        >>> heads_of(nn.MultiheadAttention(8, 2)), heads_of(nn.Linear(8, 8))
        (2, None)
    """
    return next((v for name in HEADS if type(v := vars(module).get(name)) is int and v > 0), None)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers of a module by their names.

    These are the children of the module, and the layers inside its children of the classes nn.Sequential, nn.ModuleList
    and nn.ModuleDict. Layers inside other children are not included.
    """
    found: dict[str, nn.Linear] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            found[name] = child
        elif isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            found.update({f"{name}.{inner}": layer for inner, layer in linears_of(child).items()})
    return found


def sizes_of(module: nn.Module) -> list[int]:
    """Returns the numbers of units that proposals for an attention should assume, the likelier ones first.

    With grouped queries, a unit is a key and value head with the query heads that share it. So the number of key and
    value heads comes first, and the number of all heads last.
    """
    heads = heads_of(module) or 1
    shared = [v for name in KV_HEADS if type(v := vars(module).get(name)) is int and 1 < v < heads and heads % v == 0]
    return [*dict.fromkeys((*shared, heads))]


def proposals(
    module: nn.Module, structure: Structure, consumer: str, producers: Sequence[str], sizes: Sequence[int]
) -> Iterator[Site]:
    """Proposes sites for a module, the likelier ones first.

    The shapes leave four questions open, and each proposal answers them in another way:

    - Which other tensors have an axis of units, for example a table of position biases?
    - If such a tensor has two axes that fit, along which axis is it cut?
    - Which attributes hold a multiple of the number of the units' features and have to shrink, for example `inner_dim`?
    - In which order do the rows of the producers lie, see LAYOUTS?

    Args:
        module: The module.
        structure: The rules for the kind of unit.
        consumer: The name of the linear layer that is called last. Its input is the units.
        producers: The names of the linear layers that are called before it.
        sizes: The numbers of units to assume.

    Yields:
        Sites whose paths start with "module", which is the path of the module inside `by_structure.Alone`.
    """
    linears = linears_of(module)
    for size in sizes:
        features = linears[consumer].in_features
        if features % size:
            continue
        width = features // size
        # Attributes that hold the number of units always shrink. An attribute that holds a multiple of the units'
        # features may mean something else, such as the hidden size of the stream. So proposals with and without it are
        # tried.
        attributes = [n for n in structure.attributes if _is_multiple(module, n, size)]
        feature_counts = [n for n in vars(module) if n not in attributes and _is_multiple(module, n, features)]
        others = _other_tensors(module, (consumer, *producers), size)
        norm = next((n for n, m in module.named_children() if structure.normed and _norms(m, features)), "")
        # In a product, the last item varies fastest. So all layouts are tried before another tensor is cut.
        choices = itertools.product(_subsets(others), (0, 1), _subsets(feature_counts), LAYOUTS)
        for cut_too, axes, shrunk_too, layout in choices:
            other_cuts = _cuts_of_others(module, cut_too, size, axes)
            if other_cuts is None:
                continue
            cuts = [c for name in producers for c in _producer_cuts(linears[name], name, size, width, layout)]
            if norm:
                # A norm layer over the units is always cut, along its only axis.
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
    """Returns the sets of names that are tried: no name, all names, and each name alone."""
    return list(dict.fromkeys(((), tuple(names), *((name,) for name in names))))


def _is_multiple(module: nn.Module, name: str, multiple: int) -> bool:
    """Returns True if an attribute is a positive integer and a multiple of a number. A bool is not an integer here."""
    value = vars(module).get(name)
    return type(value) is int and value > 0 and value % multiple == 0


def _norms(module: nn.Module, features: int) -> bool:
    """Returns True if a module is a norm layer with one mean or variance over exactly this number of features."""
    weight = getattr(module, "weight", None)
    return is_feature_norm(module) and isinstance(weight, Tensor) and weight.shape == (features,)


def _other_tensors(module: nn.Module, layers: Sequence[str], size: int) -> list[str]:
    """Returns the names of tensors outside of `layers` that have an axis whose length is a multiple of `size`."""
    held = (*module.named_parameters(), *module.named_buffers())
    return [n for n, t in held if n.rpartition(".")[0] not in layers and any(d % size == 0 for d in t.shape if d)]


def _cuts_of_others(module: nn.Module, names: Sequence[str], size: int, which: int) -> list[Cut] | None:
    """Returns a cut for each of these tensors, or None if `which` is 1 and the cuts would be those of `which` 0.

    An axis fits if its length is `size`. Only if there is no such axis, a multiple of `size` fits too.

    Args:
        module: The module.
        names: The names of the tensors.
        size: The number of units.
        which: 0 to cut the first axis that fits. 1 to cut the second axis that fits, in tensors that have one.
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
    """Returns the cuts of a producer's weight and bias. The list is empty if all units share the producer."""
    rows = layer.out_features
    if rows % size or (layout == "narrow layers shared" and rows < size * width):
        return []
    # If the number of rows is not a multiple of size x width, there is one group: keys may have another width than
    # values.
    groups = rows // (size * width) if layout != "units first" and rows % (size * width) == 0 else 1
    parts = [part for part in ("weight", "bias") if getattr(layer, part) is not None]
    return [Cut(f"{name}.{part}", 0, groups, rows // (size * groups)) for part in parts]
