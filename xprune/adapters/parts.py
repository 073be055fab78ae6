"""The classes for the optional fields of `Units`: `Also`, `Features`, `Forwards`, `Stream` and `Scope`.

All names are relative to the module that `Units` describes, such as "proj" or "rel_pos.table". If a module does not
have a tensor or layer of a name, or has None in its place, the name is skipped. So one `Units` can describe several
variants of a class.
"""

from dataclasses import dataclass

from torch import nn

from xprune.core.registry import imported

Axes = tuple[tuple[str, int], ...]
"""Pairs (name of a tensor, axis)."""


@dataclass(frozen=True)
class Also:
    """The other tensors and attributes that shrink when a unit is removed.

    `Units` names the producers and the consumer. `Also` names everything else that shrinks. For example, an attention
    has a bias table of shape (positions, heads). The table loses a column with each head, so `tensors` lists it with
    axis 1. The attribute `attn_dim` is heads x head size, so `attributes` lists it.

    Args:
        tensors: Pairs (tensor, axis). Along this axis, the tensor has the same number of entries for each unit, usually
            one. Examples: a bias table with a column for each head, a bias that belongs to no layer.
        layers: Names of layers. All parameters and buffers of these layers shrink along their first axis. Examples: a
            layer that computes a factor for each feature of the heads, a batch norm after the producer.
        norm: Name of a norm layer that computes its mean and variance over the features of all units. The tensors of
            this layer shrink along their first axis. While gates are attached, each unit counts in the mean and
            variance as much as its gate says. "" if there is no such layer.
        attributes: Attributes that hold the number of units or a multiple of it, in addition to `Units.count`.
            "shape.2" is the third entry of the tuple `shape`.
        caches: Attributes with cached values. Surgery calls their method `clear()` after it removed units.

    Example:
        >>> from xprune.adapters import Units
        >>> attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "table": nn.Embedding(49, 4)})
        >>> attention.num_heads = 4
        >>> units = Units("mine", ("my.Attention",), (("qkv", 3),), also=Also(tensors=(("table.weight", 1),)))
        >>> units.site("attn", attention).cuts[-1]
        Cut(tensor='attn.table.weight', axis=1, groups=1, width=1, segments=())
    """

    tensors: Axes = ()
    layers: tuple[str, ...] = ()
    norm: str = ""
    attributes: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Features:
    """Describes how the features of the units are ordered in the layers.

    `Features()` fits linear layers and convolutions in which all features of head 0 come first, then all features of
    head 1, and so on.

    Args:
        layout: Order of the features in the input of the consumer. "unit-major": all features of unit 0, then all
            features of unit 1, and so on. "width-major": feature 0 of all units, then feature 1 of all units, and so
            on.
        transposed: True if the weights of the producers and the consumer have the shape (in, out), as in the `Conv1D`
            of transformers. False if the shape is (out, in), as in torch.
        width: Attribute that holds the number of features of one unit in the last producer. Give it for a class that
            does not store its number of units. The last producer has to be the layer that makes the values. With
            grouped queries, one unit is one head of keys and values together with all query heads that share it. "" if
            `Units.count` gives the number of units.

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
    """The classes that replace the class of a module if its forward does not work with removed units or with gates.

    xprune assigns such a class to `module.__class__`. The module keeps its weights and attributes. Only the forward
    changes. Most adapters need none of these classes.

    You can give a class itself, or a string "module:Class". The class of a string is imported when it is first needed,
    so that `import xprune` does not import a large library.

    Args:
        pruned: Class of the module after some units were removed. Give it if the forward works only with all units, for
            example because it calls `reshape(B, N, C)` where C is the hidden size. None: the module keeps its class.
        gated: Class of the module while gates are attached. Give it if the forward passes the weight of the consumer to
            a function and does not call the consumer as a layer. Then a hook on the consumer would never run. None: the
            module keeps its class.
        removed: Class of the module that replaces this module after all its units were removed. Its constructor gets
            the arguments (consumer, module). None: the class `Removed`, which returns the bias of the consumer. The
            same class as `pruned`: the module stays, and its forward runs with zero units.
        built: Name of an attribute. Surgery stores in it which units of the dense model are kept, as a tuple of
            indices. A `pruned` class needs it if the model passes a tensor for all units of the dense model to its
            forward, such as a rotary table with an entry for each head. "" if the class needs no such attribute.

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
        """Returns the class that a field holds. Imports the class if the field holds a string.

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
    """The other parts of a module that shrink when channels of the residual stream are removed.

    When a channel is removed, the producers lose a column and the consumer loses a row. `Stream` names everything else
    that shrinks. It has no effect if only heads or neurons are removed.

    Args:
        tensors: Pairs (tensor, axis) of tensors that are used between the stream and a producer. The axis is that of
            the channels. An example is a strided convolution that makes the feature map for keys and values smaller. If
            the module has any such tensor, gates on channels act on the input of each layer in the module that reads
            the stream. Otherwise they act on the input of the module.
        after: Names of layers that process the stream after the consumer. All tensors of these layers shrink along
            their first axis.
        attributes: Attributes that hold the number of channels or a multiple of it, such as `embed_dim`.
        joins: True if the module itself adds its input to the output of the consumer, so that it reads and writes the
            same stream. False if the block around the module adds them.

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
    """Conditions on the modules of a class: which of them `Units` describes, and whether all units may be removed.

    Args:
        needs: Names that the module must have, with a value other than None and False. Use it if two variants of a
            class need different adapters, for example because their rows have another order.
        unless: Name of an attribute. A module for which this attribute is true gets no site. "" if there is no such
            attribute.
        inner: Name of the submodule that contains the units. Give it if a tensor that shrinks with the units lies
            outside of this submodule. The site has the path of the submodule as its name. When all units are removed,
            the submodule is replaced. "" if there is no such submodule. Then the module itself is replaced.
        whole: True if the module returns only the output of its consumer. Then it can be replaced when all units are
            removed. False if the module returns something else. Then at least one unit has to stay.

    Example:
        >>> from xprune.adapters import Units
        >>> mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        >>> options = {"consumer": "fc2", "count": "", "kind": "neuron", "scope": Scope(needs=("gate",))}
        >>> units = Units("gated-mlp", ("my.Mlp",), (("fc1", 1),), **options)
        >>> print(units.site("mlp", mlp))  # this MLP has no `gate`
        None
    """

    needs: tuple[str, ...] = ()
    unless: str = ""
    inner: str = ""
    whole: bool = True
