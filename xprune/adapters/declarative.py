"""Two adapters that describe a class as data: `Units` for attentions and MLPs, `Sized` for modules without units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xprune.adapters.old_keywords import accept_old_keywords
from xprune.adapters.parts import Also, Features, Forwards, Scope, Stream
from xprune.core.interfaces import Adapter
from xprune.core.site import Cut, Site, StreamParts
from xprune.modules.paths import attribute_at, input_axis, part_at, set_attribute


@dataclass(frozen=True)
class Units(Adapter):
    """Describes the units of one attention or MLP class, as data.

    An attention or MLP has this form::

        input -> producers (qkv, or q, k, v, or fc1) -> units -> consumer (proj, or fc2) -> output

    A unit consists of some rows of the weight and bias of each producer, plus some columns of the weight of the
    consumer. Gates act on the input of the consumer. An instance of `Units` names the producers, the consumer and the
    attribute that holds the number of units. These are enough if the forward of the class reads the number of units
    from the module. Otherwise, give one or more of the fields `also`, `features`, `forwards`, `stream` and `scope`.

    All names are relative to the module, such as "proj" or "output.dense". `site` checks that the lengths of the
    tensors of a module fit this description. If they do not fit, the module gets no site.

    Args:
        name: Name of the adapter. Saved plans contain this name.
        classes: Full names of the classes that the adapter describes, such as "timm.layers.attention.Attention". The
            adapter describes their subclasses too. xprune compares the names as text, so it imports no library.
        producers: Pairs (name, groups), one for each layer whose output is the units. The name may also be that of a
            weight or bias that belongs to no layer. The rows of a producer have the order (groups, units, width).
            groups is 3 for a fused qkv whose rows are all queries, then all keys, then all values. groups is 1 for a
            separate q, and for a layer in which all rows of one head are next to each other. groups may be 0 if the
            producer is a layer. Then `site` computes groups as the number of rows divided by the consumer's number of
            input features: 3 for a fused qkv, 2 for a fused kv.
        consumer: The layer whose input is the units.
        count: Attribute that holds the number of units. "" if each input feature of the consumer is one unit, or if
            `Features.width` determines the number of units.
        kind: Name of the unit kind, such as "head" or "neuron".
        also: Other tensors and attributes that shrink when a unit is removed, see `Also`.
        features: How the features of the units are ordered in the layers, see `Features`.
        forwards: Classes that replace the class of a module if its forward does not work with removed units or with
            gates, see `Forwards`.
        stream: Tensors and attributes that shrink when channels of the residual stream are removed, see `Stream`.
        scope: Conditions on the modules that the adapter describes, see `Scope`.

    Example:
        `site` needs only a module with these names. Here it is a `ModuleDict` with 4 heads of 2 features.

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
        """Returns `Forwards.pruned`: the class of a module after units were removed. None if the class stays."""
        return self.forwards.class_of("pruned")

    @property
    def gated(self) -> type[nn.Module] | None:  # type: ignore[override]
        """Returns `Forwards.gated`: the class of a module while gates are attached. None if the class stays."""
        return self.forwards.class_of("gated")

    @property
    def removed(self) -> type[nn.Module] | None:  # type: ignore[override]
        """Returns `Forwards.removed`: the class that replaces a module after all its units were removed, or None."""
        return self.forwards.class_of("removed")

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Returns `Stream.joins`: True if the module adds its own input to its output, otherwise False."""
        return self.stream.joins

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Returns the site of a module with all cuts, or None if this adapter does not fit the module.

        The adapter does not fit in these cases:

        - A layer is missing, or its type is unknown.
        - `scope` excludes the module.
        - The length of a tensor is not a multiple of the number of units.
        - All units of the module were already removed.
        - The class of the module is a subclass that defines another forward. `Forwards.gated` or `Forwards.pruned`
          would replace this forward.
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
        # The weight of a convolution with groups has only in_channels / groups columns.
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

        # `_cut_of` rounds down. If a length is not a multiple of the number of units, this adapter does not fit the
        # module.
        if any(part_at(module, c.tensor).shape[c.axis] % (c.groups * size) for c in cuts) or features % size:
            return None

        # timm uses an nn.Identity if a model has no norm layer. An nn.Identity computes no mean and no variance.
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
            axes=(input_axis(consumer),),
            cuts=tuple(Cut(f"{path}.{cut.tensor}", cut.axis, cut.groups, cut.width) for cut in cuts),
            module=owner if self.scope.whole else "",
            adapter=self.name,
            norms=(f"{path}.{self.also.norm}",) if normed else (),
            attributes=tuple(f"{path}.{name}" for name in attributes),
        )

    def stream_parts(self, path: str, module: nn.Module) -> StreamParts | None:
        """Returns the parts of a module that shrink with the residual stream, or None if the module has no site.

        When a channel of the stream is removed, the producers lose a column, and the consumer loses a row and an entry
        of its bias. The field `stream` of this adapter lists the other parts.
        """
        if self.site(path, module) is None:
            return None
        in_axis, out_axis = self._weight_axes
        parts = [(name, part_at(module, name)) for name, _ in self.producers]
        # A bias that is a producer without a layer has one axis, that of the units. It has no axis of the stream.
        makers = [
            (name, part)
            for name, part in parts
            if part is not None and not (isinstance(part, Tensor) and part.dim() == 1)
        ]
        extra = [(name, axis) for name, axis in self.stream.tensors if _is_tensor_at(module, name)]
        reads = [(name if isinstance(part, Tensor) else f"{name}.weight", in_axis) for name, part in makers] + extra
        writes = [(f"{self.consumer}.weight", out_axis), (f"{self.consumer}.bias", 0)]
        writes += [(f"{layer}.{name}", 0) for layer in self.stream.after for name in _tensors(part_at(module, layer))]

        # A layer between the stream and a producer may add a bias to a channel whose gate is 0. Then the producer would
        # not read 0 for this channel. So the gates act on the input of each layer that reads the stream, and not on the
        # module's input.
        inside = dict.fromkeys(name.rpartition(".")[0] for name, axis in reads if axis == in_axis) if extra else {}
        gated_layers = [(f"{path}.{name}", input_axis(part_at(module, name))) for name in inside]
        return StreamParts(
            tuple((f"{path}.{name}", axis) for name, axis in reads),
            tuple((f"{path}.{name}", axis) for name, axis in writes if _is_tensor_at(module, name)),
            tuple(gated_layers) or ((path, input_axis(makers[0][1])),),
            tuple(f"{path}.{name}" for name in self.stream.attributes if _is_number_at(module, name)),
        )

    @property
    def _weight_axes(self) -> tuple[int, int]:
        """Returns (input axis, output axis) of the weights of the producers and the consumer."""
        return (0, 1) if self.features.transposed else (1, 0)

    def _size(self, module: nn.Module, rows: int, features: int) -> int:
        """Returns the number of units.

        If `Features.width` is given, the number is `rows` divided by the number of features of one unit, for each
        group. If `count` is given, it is the value of this attribute. Otherwise, each input feature of the consumer is
        one unit.

        Args:
            module: The module.
            rows: The number of rows in the weight of the last producer.
            features: The number of input features of the consumer.
        """
        if self.features.width:
            return rows // (self.producers[-1][1] * int(part_at(module, self.features.width)))
        return int(part_at(module, self.count)) if self.count else features

    def _is_known_layer(self, layer: Any) -> bool:
        """Returns True if the axes of the layer's weight are known: for a linear layer, a convolution or a Conv1D."""
        known = isinstance(layer, (nn.Linear, nn.Conv2d))
        if not self.features.transposed:
            return known
        # A transposed weight (in, out) is that of transformers' Conv1D. The layers of torch store (out, in), so they do
        # not fit.
        weight = getattr(layer, "weight", None)
        return not known and isinstance(weight, Tensor) and weight.dim() == 2

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """Changes the class of the module to `pruned`, stores the kept units, and empties caches.

        Args:
            module: The module. Its tensors and attributes were already cut.
            site: The site before the cut. It holds either the units of this module, or the channels of a stream that
                the module reads or writes.
            keep: Indices of the units of the site that stay.
        """
        super().resize(module, site, keep)
        # The site of a residual stream has no adapter. Its removal takes channels away, but no units of this module.
        if self.forwards.built and site.adapter == self.name:
            before = getattr(module, self.forwards.built, None)
            # If the module was pruned before, `keep` holds indices into the units that stayed then. The attribute has
            # to hold indices into the units of the dense model.
            setattr(module, self.forwards.built, tuple(before[i] for i in keep) if before else tuple(keep))
        for name in self.also.caches:
            getattr(module, name).clear()


Units.__init__ = accept_old_keywords(Units.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Sized(Adapter):
    """Describes a module that contains no units but stores the number of channels of the residual stream.

    An example is a layer that calls `self.scale.view(self.shape)`. When channels of the stream are removed, xprune
    finds and cuts the tensor `scale` without an adapter. But it does not know that `shape` holds the number of
    channels. So this adapter names such attributes.

    Args:
        name: Name of the adapter.
        classes: Full names of the classes that the adapter describes, see `Units`.
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
        """Returns None, because the module has no units."""
        return None

    def stream_parts(self, path: str, module: nn.Module) -> StreamParts:
        """Returns empty parts instead of None. So surgery knows that the adapter fits, and calls `resize`."""
        return StreamParts((), (), ())

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """Multiplies each attribute by the fraction of the channels that stay, so that it holds the new number."""
        for name in self.attributes:
            set_attribute(module, name, attribute_at(module, name) * len(keep) // site.size)


def _is_number_at(module: nn.Module, path: str) -> bool:
    """Returns True if the module has an attribute at this path with a value other than 0 and None, else False."""
    try:
        return bool(attribute_at(module, path))
    except AttributeError:
        return False


def _tensors(layer: nn.Module | None) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a layer by name, without scalars, which have no axis to cut."""
    named = (*layer.named_parameters(), *layer.named_buffers()) if layer is not None else ()
    return {name: tensor for name, tensor in named if tensor.dim()}


def _is_tensor_at(module: nn.Module, path: str) -> bool:
    """Returns True if there is a tensor at the path, else False."""
    return isinstance(part_at(module, path), Tensor)


def _producer_cuts(module: nn.Module, name: str, axis: int, groups: int, size: int) -> Sequence[Cut]:
    """Returns the cuts of a producer: its weight along `axis`, and its bias. Or its tensor, if it is no layer."""
    candidates = [(name, axis), (f"{name}.weight", axis), (f"{name}.bias", 0)]
    return [
        _cut_of(part_at(module, tensor), tensor, cut_axis, size, groups)
        for tensor, cut_axis in candidates
        if _is_tensor_at(module, tensor)
    ]


def _cut_of(tensor: Tensor, name: str, axis: int, size: int, groups: int = 1) -> Cut:
    """Returns the cut of a tensor along an axis with the order (groups, size, width). Computes the width."""
    return Cut(name, axis, groups, tensor.shape[axis] // (groups * size))
