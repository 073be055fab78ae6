"""Units: an adapter that describes a class as data. It serves most attention and MLP classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xprune.adapters.old_keywords import accept_old_keywords
from xprune.adapters.parts import Also, Features, Forwards, Scope, Stream
from xprune.core.interfaces import Adapter
from xprune.core.site import Cut, Site, StreamParts
from xprune.modules.paths import attribute_at, part_at, set_attribute


@dataclass(frozen=True)
class Units(Adapter):
    """Describes the units of one attention or MLP class, as data.

    An attention or MLP has this form::

        input -> producers (qkv, or q, k, v, or fc1) -> units -> consumer (proj, or fc2) -> output

    A unit is some rows of each producer's weight and bias, and some columns of the consumer's weight. Gates act on the
    input of the consumer. An entry names the producers, the consumer and the attribute that holds the number of units.
    That is enough for a class whose forward reads the number of units from the module. Other classes need one of the
    parts `also`, `features`, `forwards`, `stream` and `scope` in addition.

    All names are relative to the module, such as "proj" or "output.dense". An entry serves a module only if its tensors
    have the lengths that the entry expects.

    Args:
        name: Name of the adapter. Saved plans hold it.
        classes: Qualified names of the classes that are served. Subclasses are served too. Names are compared as text,
            so that nothing is imported.
        producers: Pairs (layer or bare weight, groups) of all that make the units' features. The rows of a producer are
            read as (groups, units, width). groups is 3 for a fused qkv whose rows are all queries, then all keys, then
            all values. It is 1 for a separate q, and 1 if the rows of a head are together. 0 means the number of rows
            divided by the consumer's number of input features: 3 for a fused qkv, 2 for a fused kv. 0 needs a layer.
        consumer: The layer whose input is the units.
        count: Attribute that holds the number of units. "" if each input feature of the consumer is a unit, or if
            `Features.width` says how many units there are.
        kind: Name of the unit kind, such as "head" or "neuron".
        also: Other tensors and attributes that shrink with a unit, see `Also`.
        features: The order of the features in the layers, see `Features`.
        forwards: Classes with another forward, see `Forwards`.
        stream: Parts that shrink with the residual stream, see `Stream`.
        scope: Which modules of the class are served, see `Scope`.

    Example:
        Any module with these names will do. Here it is a `ModuleDict` with 4 heads of 2 features.

        >>> attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        >>> attention.num_heads = 4
        >>> units = Units("mine", ("my_package.Attention",), (("qkv", 3),))
        >>> site = units.site("blocks.0.attn", attention)
        >>> site.size, site.width, site.consumers
        (4, 2, ('blocks.0.attn.proj',))
        >>> [cut.tensor for cut in site.cuts]
        ['blocks.0.attn.qkv.weight', 'blocks.0.attn.qkv.bias', 'blocks.0.attn.proj.weight']
    """

    name: str
    classes: tuple[str, ...]
    producers: tuple[tuple[str, int], ...]
    consumer: str = "proj"
    count: str = "num_heads"
    kind: str = "head"
    also: Also = Also()  # noqa: RUF009 - immutable
    features: Features = Features()  # noqa: RUF009 - immutable
    forwards: Forwards = Forwards()  # noqa: RUF009 - immutable
    stream: Stream = Stream()  # noqa: RUF009 - immutable
    scope: Scope = Scope()  # noqa: RUF009 - immutable

    @property
    def pruned(self) -> type[nn.Module] | None:  # type: ignore[override]
        """Returns `Forwards.pruned`: the class of a module that lost units."""
        return self.forwards.class_of("pruned")

    @property
    def gated(self) -> type[nn.Module] | None:  # type: ignore[override]
        """Returns `Forwards.gated`: the class of a module while gates are attached."""
        return self.forwards.class_of("gated")

    @property
    def removed(self) -> type[nn.Module] | None:  # type: ignore[override]
        """Returns `Forwards.removed`: the class that replaces a module without units."""
        return self.forwards.class_of("removed")

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Returns `Stream.joins`: True if the module adds its own input to its output, otherwise False."""
        return self.stream.joins

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Returns the site of a module with all its cuts, or None.

        None means that the entry does not fit the module. There are several reasons: a layer is missing or of an
        unknown type. `scope` excludes the module. The length of a tensor is no multiple of the number of units. The
        module has no units left. Or the module is of a subclass with another forward, which `Forwards.gated` or
        `Forwards.pruned` would replace.
        """
        lacking = [name for name in self.scope.needs if part_at(module, name) is None or part_at(module, name) is False]
        if lacking or (self.scope.unless and part_at(module, self.scope.unless)):
            return None

        consumer: Any = part_at(module, self.consumer)
        parts = consumer, *(part_at(module, name) for name, _ in self.producers)
        # Producers may be bare weights. Those that are None do not exist in this variant of the class.
        layers: list[Any] = [part for part in parts if isinstance(part, nn.Module)]
        if consumer is None or not all(self._is_known_layer(layer) for layer in layers):
            return None
        if self.count and part_at(module, self.count) is None:
            return None

        # A subclass may define a forward that computes something else. Our class would silently replace that forward.
        # So the module's forward has to be our class's own, or one that our class inherits or overrides.
        own_class = self.gated or self.pruned
        if own_class and not any(type(module).forward is vars(base).get("forward") for base in own_class.__mro__):
            return None

        in_axis, out_axis = self._weight_axes
        # A convolution with groups has only in_channels / groups columns.
        features = consumer.weight.shape[in_axis] * getattr(consumer, "groups", 1)
        size = self._size(module, layers[-1].weight.shape[out_axis], features)
        if not size:
            return None  # all units were removed before
        width = features // size

        producers = [
            (name, groups or part_at(module, name).weight.shape[out_axis] // features)
            for name, groups in self.producers
        ]
        cuts = [cut for name, groups in producers for cut in _producer_cuts(module, name, out_axis, groups, size)]
        order = (1, width) if self.features.layout == "unit-major" else (width, 1)
        cuts.append(Cut(f"{self.consumer}.weight", in_axis, *order))
        cuts += [
            _cut_of(part_at(module, name), name, axis, size)
            for name, axis in self.also.tensors
            if _is_tensor_at(module, name)
        ]
        for layer in (*self.also.layers, self.also.norm):
            tensors = _tensors(part_at(module, layer) if layer else None)
            cuts += [_cut_of(tensor, f"{layer}.{name}", 0, size) for name, tensor in tensors.items()]

        # `_cut_of` rounds down. A length that does not divide means that the module is not what the entry describes.
        if any(part_at(module, c.tensor).shape[c.axis] % (c.groups * size) for c in cuts) or features % size:
            return None

        # timm puts an nn.Identity where it has no norm. That one has no statistics.
        normed = bool(self.also.norm) and any(True for _ in part_at(module, self.also.norm).parameters())
        counts = (self.count,) if self.count else ()
        attributes = (*counts, *(name for name in self.also.attributes if _is_number_at(module, name)))
        owner = f"{path}.{self.scope.inner}" if self.scope.inner else path
        return Site(
            name=owner,
            kind=self.kind,
            size=size,
            width=width,
            layout=self.features.layout,
            consumers=(f"{path}.{self.consumer}",),
            axes=(_feature_axis(consumer),),
            cuts=tuple(Cut(f"{path}.{cut.tensor}", cut.axis, cut.groups, cut.width) for cut in cuts),
            module=owner if self.scope.whole else "",
            adapter=self.name,
            norms=(f"{path}.{self.also.norm}",) if normed else (),
            attributes=tuple(f"{path}.{name}" for name in attributes),
        )

    def stream_parts(self, path: str, module: nn.Module) -> StreamParts | None:
        """Returns the parts of a module that shrink with the residual stream, or None if it has no site.

        The module reads the stream in the columns of its producers. It writes to the stream in the rows of its consumer
        and in the consumer's bias. `Stream` adds the other parts.
        """
        if self.site(path, module) is None:
            return None
        in_axis, out_axis = self._weight_axes
        parts = [(name, part_at(module, name)) for name, _ in self.producers]
        # A bare bias makes features too, but it has no axis of the stream.
        makers = [
            (name, part)
            for name, part in parts
            if part is not None and not (isinstance(part, Tensor) and part.dim() == 1)
        ]
        extra = [(name, axis) for name, axis in self.stream.tensors if _is_tensor_at(module, name)]
        reads = [(name if isinstance(part, Tensor) else f"{name}.weight", in_axis) for name, part in makers] + extra
        writes = [(f"{self.consumer}.weight", out_axis), (f"{self.consumer}.bias", 0)]
        writes += [(f"{layer}.{name}", 0) for layer in self.stream.after for name in _tensors(part_at(module, layer))]

        # A layer between the stream and a producer adds a bias or a norm to channels that are gated to 0. The producer
        # would then read something else than 0. So each layer that reads the stream is gated, not the module's input.
        inside = dict.fromkeys(name.rpartition(".")[0] for name, axis in reads if axis == in_axis) if extra else {}
        gated_layers = [(f"{path}.{name}", _feature_axis(part_at(module, name))) for name in inside]
        return StreamParts(
            tuple((f"{path}.{name}", axis) for name, axis in reads),
            tuple((f"{path}.{name}", axis) for name, axis in writes if _is_tensor_at(module, name)),
            tuple(gated_layers) or ((path, _feature_axis(makers[0][1])),),
            tuple(f"{path}.{name}" for name in self.stream.attributes if _is_number_at(module, name)),
        )

    @property
    def _weight_axes(self) -> tuple[int, int]:
        """Returns the axes (in, out) of the weights of producers and consumer."""
        return (0, 1) if self.features.transposed else (1, 0)

    def _size(self, module: nn.Module, rows: int, features: int) -> int:
        """Returns the number of units.

        With `Features.width` it is the number of the last producer's rows divided by the features of a unit. Otherwise
        it is the value of the attribute `count`. Without such an attribute it is the consumer's number of input
        features.
        """
        if self.features.width:
            return rows // (self.producers[-1][1] * int(part_at(module, self.features.width)))
        return int(part_at(module, self.count)) if self.count else features

    def _is_known_layer(self, layer: Any) -> bool:
        """True if the entry can read the layer's weight: a linear layer, a convolution or a transposed matrix."""
        known = isinstance(layer, (nn.Linear, nn.Conv2d))
        if not self.features.transposed:
            return known
        # transformers' Conv1D. Weights of torch's own layers are (out, in), so they do not fit a transposed entry.
        weight = getattr(layer, "weight", None)
        return not known and isinstance(weight, Tensor) and weight.dim() == 2

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """Gives the module its `pruned` class, notes the kept units in `Forwards.built` and empties caches.

        Args:
            module: The module, whose tensors and attributes are cut already.
            site: The site before the cut: the module's own units, or the channels of a stream that the module reads or
                writes.
            keep: Indices of the units of the site that stay.
        """
        super().resize(module, site, keep)
        # A residual stream's site has no adapter: it removes channels and leaves this module's own units as they are.
        if self.forwards.built and site.adapter == self.name:
            before = getattr(module, self.forwards.built, None)
            # A second pruning counts from the units that the first one kept. The attribute counts from the first model.
            setattr(module, self.forwards.built, tuple(before[i] for i in keep) if before else tuple(keep))
        for name in self.also.caches:
            getattr(module, name).clear()


Units.__init__ = accept_old_keywords(Units.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Sized(Adapter):
    """Describes a module that has no units of its own but stores lengths of the residual stream.

    An example is a scale that calls `self.scale.view(self.shape)`. When channels of the stream are removed, the tensors
    are found and cut without an adapter. The stored numbers are not, so this adapter lists them.

    Args:
        name: Name of the adapter.
        classes: Qualified names of the classes that are served, see `Units`.
        attributes: Attributes that hold the number of channels or a multiple of it. "shape.0" is the first entry of the
            tuple `shape`.

    Example:
        >>> block = nn.Module()
        >>> block.hidden_size = 8
        >>> stream = Site("stream", "channel", size=8, width=1, consumers=("norm",))
        >>> Sized("mine", ("my_package.Block",), ("hidden_size",)).resize(block, stream, keep=(0, 1, 5))
        >>> block.hidden_size
        3
    """

    name: str
    classes: tuple[str, ...]
    attributes: tuple[str, ...]

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Returns None: the module has no units."""
        return None

    def stream_parts(self, path: str, module: nn.Module) -> StreamParts:
        """Returns empty parts. They say that the module is known, so that `resize` is called."""
        return StreamParts((), (), ())

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """Multiplies the attributes by the fraction of channels that are kept."""
        for name in self.attributes:
            set_attribute(module, name, attribute_at(module, name) * len(keep) // site.size)


def _is_number_at(module: nn.Module, path: str) -> bool:
    """True if there is a whole number other than 0 at the path, otherwise False."""
    try:
        return bool(attribute_at(module, path))
    except AttributeError:
        return False


def _tensors(layer: nn.Module | None) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a layer that have an axis, by name. Scalars have none."""
    named = (*layer.named_parameters(), *layer.named_buffers()) if layer is not None else ()
    return {name: tensor for name, tensor in named if tensor.dim()}


def _is_tensor_at(module: nn.Module, path: str) -> bool:
    """True if there is a tensor at the path, otherwise False."""
    return isinstance(part_at(module, path), Tensor)


def _feature_axis(layer: Any) -> int:
    """Returns the axis of the features in the layer's input: 1 for maps of convolutions, otherwise the last."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def _producer_cuts(module: nn.Module, name: str, axis: int, groups: int, size: int) -> Sequence[Cut]:
    """Returns the cuts of a producer's weight along `axis`, and of its bias. The producer may be a bare weight."""
    candidates = [(name, axis), (f"{name}.weight", axis), (f"{name}.bias", 0)]
    return [
        _cut_of(part_at(module, tensor), tensor, cut_axis, size, groups)
        for tensor, cut_axis in candidates
        if _is_tensor_at(module, tensor)
    ]


def _cut_of(tensor: Tensor, name: str, axis: int, size: int, groups: int = 1) -> Cut:
    """Returns the cut of a tensor whose axis has the order (groups, size, width). The width follows from its length."""
    return Cut(name, axis, groups, tensor.shape[axis] // (groups * size))
