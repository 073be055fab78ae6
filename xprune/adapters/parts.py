"""The optional parts of a `Units` entry: further tensors, order of features, forwards, residual stream, scope.

All names are relative to the module that the entry describes, such as "proj" or "rel_pos.table". A tensor or layer that
a module does not have, or has as None, is skipped. One entry can so describe all variants of a class.
"""

from dataclasses import dataclass

from torch import nn

from xprune.core.registry import imported

Axes = tuple[tuple[str, int], ...]
"""Pairs (name of a tensor, axis)."""


@dataclass(frozen=True)
class Also:
    """The tensors and attributes that shrink with a unit, beside the producers and the consumer.

    An attention with a bias table of shape (positions, heads) loses a column of that table with each head. The table is
    then listed under `tensors`, with axis 1. A number such as `attn_dim`, which is heads x head size, is listed under
    `attributes`.

    Args:
        tensors: Pairs (tensor, axis). Along this axis the tensor has one entry per unit, or a multiple of that. A bias
            table with a column per head is one example, a bias that belongs to no layer is another.
        layers: Names of layers. All their parameters and buffers shrink along their first axis. Examples: a gate on the
            heads' output, a batch norm after the producer.
        norm: Name of a norm that runs over the features of all units. It shrinks as `layers` do. While gates are
            attached, a unit counts in the norm's statistics as much as its gate says. "" if there is none.
        attributes: Attributes that hold the number of units or a multiple of it, beside `Units.count`. "shape.2" is the
            third entry of the tuple `shape`.
        caches: Attributes that are emptied with `clear()` after units were removed.

    Example:
        >>> from xprune.adapters import Units
        >>> attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "table": nn.Embedding(49, 4)})
        >>> attention.num_heads = 4
        >>> units = Units("mine", ("my.Attention",), (("qkv", 3),), also=Also(tensors=(("table.weight", 1),)))
        >>> units.site("attn", attention).cuts[-1]
        Cut(tensor='attn.table.weight', axis=1, groups=1, width=1)
    """

    tensors: Axes = ()
    layers: tuple[str, ...] = ()
    norm: str = ""
    attributes: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Features:
    """The order of the units' features in the layers.

    The default fits linear layers and convolutions whose units are blocks of features: head 0, then head 1, and so on.

    Args:
        layout: Order of the features in the consumer's input. "unit-major": the features of a unit are next to each
            other. "width-major": first feature 0 of all units, then feature 1 of all units, and so on.
        transposed: True if the weights of producers and consumer have shape (in, out), as those of transformers'
            `Conv1D`. False for (out, in), as in torch.
        width: Attribute that holds the features of one unit in the last producer, for a class that does not store its
            number of units. Name the values' projection last. With grouped queries a unit is then one head of keys and
            values, with all query heads that share it. "" if `Units.count` says how many units there are.

    Example:
        >>> from xprune.adapters import Units
        >>> attention = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 4), "proj": nn.Linear(8, 8)})
        >>> attention.head_dim = 2
        >>> features = Features(width="head_dim")
        >>> units = Units("mine", ("my.Attention",), (("q", 1), ("v", 1)), count="", features=features)
        >>> site = units.site("attn", attention)
        >>> site.size, site.width  # two heads of values, each with two query heads
        (2, 4)
    """

    layout: str = "unit-major"
    transposed: bool = False
    width: str = ""


@dataclass(frozen=True)
class Forwards:
    """The classes that a module gets when its own forward does not work with removed or gated units.

    Surgery assigns such a class to `module.__class__`. The module keeps its weights and attributes. Only the forward
    changes. Most entries need none of these classes.

    Each class is given as the class itself or as a string "module:Class". The class of a string is imported when it is
    first needed. This saves the import of a large library.

    Args:
        pruned: Class of the module after units were removed. Needed if the own forward assumes all units, for example
            with `reshape(B, N, C)` where C is the hidden size. None: the module keeps its class.
        gated: Class of the module while gates are attached. Needed if the own forward does not call the consumer, but
            hands the consumer's weight to a function: a hook on the consumer would never run. None: the module keeps
            its class.
        removed: Class that replaces the module after all its units were removed. It is built from (consumer, module).
            None: `Removed`, which returns the bias of the consumer. The same class as `pruned`: the module stays, and
            its forward runs with zero units.
        built: Attribute that receives the indices of the units that were kept, among those that the module was built
            with. A `pruned` class needs it if its forward is given a tensor for all units from outside, such as a
            rotary table per head. "" if it needs none.

    Example:
        >>> class AnyHeads(nn.MultiheadAttention):
        ...     def forward(self, query, key, value): ...
        >>> forwards = Forwards(pruned=AnyHeads, gated=AnyHeads)
        >>> forwards.removed is None  # the module is replaced by the bias of its consumer
        True
    """

    pruned: type[nn.Module] | str | None = None
    gated: type[nn.Module] | str | None = None
    removed: type[nn.Module] | str | None = None
    built: str = ""

    def class_of(self, name: str) -> type[nn.Module] | None:
        """Returns the class that a field gives, and imports it if the field is a string.

        Args:
            name: The name of the field: "pruned", "gated" or "removed".

        Returns:
            The class. None if the field is None.
        """
        given = getattr(self, name)
        found: type[nn.Module] | None = imported(given) if isinstance(given, str) else given
        return found


@dataclass(frozen=True)
class Stream:
    """The parts of the module that shrink when channels of the residual stream are removed.

    The columns of the producers and the rows of the consumer shrink with the stream in any case. This part lists the
    rest. It has no effect on heads and neurons.

    Args:
        tensors: Pairs (tensor, axis) between the stream and some of the producers, such as a strided convolution that
            makes the map for keys and values smaller. If the module has any of them, channels are gated at each layer
            in it that reads the stream. Otherwise they are gated at the module's input.
        after: Names of layers that run over the stream after the consumer has written to it. All their tensors shrink
            along their first axis.
        attributes: Attributes that hold the number of channels or a multiple of it, such as `embed_dim`.
        joins: True if the module itself adds its input to its units' output. It then reads and writes one stream.
            False if the block around the module adds them.

    Example:
        >>> from xprune.adapters import Units
        >>> attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "ln": nn.LayerNorm(8)})
        >>> attention.num_heads = 4
        >>> units = Units("mine", ("my.Attention",), (("qkv", 3),), stream=Stream(after=("ln",)))
        >>> [name for name, axis in units.stream_parts("attn", attention).writes]
        ['attn.proj.weight', 'attn.proj.bias', 'attn.ln.weight', 'attn.ln.bias']
    """

    tensors: Axes = ()
    after: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    joins: bool = False


@dataclass(frozen=True)
class Scope:
    """The modules of the class that the entry describes, and whether a module may lose all its units.

    Args:
        needs: Names that the module must have, with a value other than None and False. Variants of a class with another
            order of rows have entries of their own, and this field tells them apart.
        unless: Attribute that says that no unit can be removed. Modules where it is true get no site. "" for no such
            attribute.
        inner: Name of the submodule that consists of the units, if a tensor that shrinks with them is outside of that
            submodule. The site is named after the submodule, and the submodule is replaced when all units are removed.
            "" if the module itself consists of the units.
        whole: True if the module returns only the output of its consumer, so that it can be replaced when all units are
            removed. False if it returns more than that: one unit then has to stay.

    Example:
        >>> from xprune.adapters import Units
        >>> mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        >>> options = {"consumer": "fc2", "count": "", "kind": "neuron", "scope": Scope(needs=("gate",))}
        >>> units = Units("gated-mlp", ("my.Mlp",), (("fc1", 1),), **options)
        >>> print(units.site("mlp", mlp))  # this one has no gate
        None
    """

    needs: tuple[str, ...] = ()
    unless: str = ""
    inner: str = ""
    whole: bool = True
