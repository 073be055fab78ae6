"""Units: an adapter said as data, which serves most attention and MLP classes."""

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
    """Units of one attention or MLP class, said as data. Every name is relative to the module.

    Args:
        name: Of the adapter.
        classes: Qualified names of the classes served, subclasses included.
        readers: (layer, groups) of each layer, or bare weight, that makes the features of the units. Its rows come as
            (groups, units, width): 3 groups for a fused qkv in the order (3, heads, head_dim), 1 for a q of its own or
            for rows with heads first, 0 for as often as the input of the writer fits in them.
        writer: The layer that the units feed, which is where they are gated.
        count: Attribute that holds the number of units; "" for as many as the writer has input features.
        kind: Name of the unit kind.
        also: What else shrinks with a unit, see `Also`.
        features: How features lie in the layers, see `Features`.
        forwards: Classes with other forwards, see `Forwards`.
        stream: What lies along the residual stream, see `Stream`.
        scope: Which modules are served, see `Scope`.

    Example:
        >>> Units("mine", ("my.Attention",), (("qkv", 3),), also=Also(norm="norm")).writer
        'proj'
    """

    name: str
    classes: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]
    writer: str = "proj"
    count: str = "num_heads"
    kind: str = "head"
    also: Also = Also()  # noqa: RUF009 - immutable
    features: Features = Features()  # noqa: RUF009 - immutable
    forwards: Forwards = Forwards()  # noqa: RUF009 - immutable
    stream: Stream = Stream()  # noqa: RUF009 - immutable
    scope: Scope = Scope()  # noqa: RUF009 - immutable

    @property
    def pruned(self) -> type[nn.Module] | None:  # type: ignore[override]
        """See Adapter."""
        return self.forwards.class_of("pruned")

    @property
    def gated(self) -> type[nn.Module] | None:  # type: ignore[override]
        """See Adapter."""
        return self.forwards.class_of("gated")

    @property
    def removed(self) -> type[nn.Module] | None:  # type: ignore[override]
        """See Adapter."""
        return self.forwards.class_of("removed")

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """See Adapter."""
        return self.stream.joins

    def site(self, path: str, module: nn.Module) -> Site | None:
        """See Adapter.site; None for other layers or no multiples of the units, and as `scope` says.

        None too where a subclass has a forward of its own and `gated` or `pruned` would put another in its place.
        """
        lacking = [name for name in self.scope.needs if part_at(module, name) is None or part_at(module, name) is False]
        if lacking or (self.scope.unless and part_at(module, self.scope.unless)):
            return None
        writer: Any = part_at(module, self.writer)
        parts = writer, *(part_at(module, name) for name, _ in self.readers)
        layers: list[Any] = [part for part in parts if isinstance(part, nn.Module)]
        if writer is None or not all(self._plain(layer) for layer in layers):
            return None
        if self.count and part_at(module, self.count) is None:
            return None
        ours = self.gated or self.pruned
        if ours and not any(type(module).forward is vars(base).get("forward") for base in ours.__mro__):
            return None
        incoming, outgoing = (0, 1) if self.features.transposed else (1, 0)
        features = writer.weight.shape[incoming] * getattr(writer, "groups", 1)
        size = self._size(module, layers[-1].weight.shape[outgoing], features)
        if not size:
            return None  # its units went before
        width = features // size
        readers = [
            (name, groups or part_at(module, name).weight.shape[outgoing] // features) for name, groups in self.readers
        ]
        cuts = [cut for name, groups in readers for cut in _made(module, name, outgoing, groups, size)]
        order = (1, width) if self.features.layout == "unit-major" else (width, 1)
        cuts.append(Cut(f"{self.writer}.weight", incoming, *order))
        cuts += [
            _along(part_at(module, name), name, axis, size) for name, axis in self.also.tensors if _held(module, name)
        ]
        for layer in (*self.also.layers, self.also.norm):
            held = _tensors(part_at(module, layer) if layer else None)
            cuts += [_along(tensor, f"{layer}.{name}", 0, size) for name, tensor in held.items()]
        if any(part_at(module, c.tensor).shape[c.axis] % (c.groups * size) for c in cuts) or features % size:
            return None
        normed = bool(self.also.norm) and any(True for _ in part_at(module, self.also.norm).parameters())
        counts = (*((self.count,) if self.count else ()), *(n for n in self.also.counts if _counted(module, n)))
        owner = f"{path}.{self.scope.inner}" if self.scope.inner else path
        return Site(
            name=owner,
            kind=self.kind,
            size=size,
            width=width,
            layout=self.features.layout,
            layer=f"{path}.{self.writer}",
            axis=1 if isinstance(writer, nn.Conv2d) else -1,
            cuts=tuple(Cut(f"{path}.{cut.tensor}", cut.axis, cut.groups, cut.width) for cut in cuts),
            module=owner if self.scope.whole else "",
            adapter=self.name,
            norms=(f"{path}.{self.also.norm}",) if normed else (),
            counts=tuple(f"{path}.{name}" for name in counts),
        )

    def along_stream(self, path: str, module: nn.Module) -> StreamParts | None:
        """See Adapter.along_stream; None too where `site` is."""
        if self.site(path, module) is None:
            return None
        incoming, outgoing = (0, 1) if self.features.transposed else (1, 0)
        parts = [(name, part_at(module, name)) for name, _ in self.readers]
        layers = [(n, p) for n, p in parts if p is not None and not (isinstance(p, Tensor) and p.dim() == 1)]  # a bias
        axis = 1 if isinstance(layers[0][1], nn.Conv2d) else -1
        extra = [(name, along) for name, along in self.stream.tensors if _held(module, name)]
        reads = [(name if isinstance(part, Tensor) else f"{name}.weight", incoming) for name, part in layers] + extra
        writes = [(f"{self.writer}.weight", outgoing), (f"{self.writer}.bias", 0)]
        writes += [(f"{layer}.{name}", 0) for layer in self.stream.after for name in _tensors(part_at(module, layer))]
        inside = dict.fromkeys(name.rpartition(".")[0] for name, along in reads if along == incoming) if extra else {}
        feeds = [(f"{path}.{name}", 1 if isinstance(part_at(module, name), nn.Conv2d) else -1) for name in inside]
        return StreamParts(
            tuple((f"{path}.{name}", along) for name, along in reads),
            tuple((f"{path}.{name}", along) for name, along in writes if _held(module, name)),
            tuple(feeds) or ((path, axis),),
            tuple(f"{path}.{name}" for name in self.stream.counts if _counted(module, name)),
        )

    def _size(self, module: nn.Module, rows: int, features: int) -> int:
        """Units: as an attribute says, or as many as fit the last reader's rows, or as the writer has features."""
        if self.features.width:
            return rows // (self.readers[-1][1] * int(part_at(module, self.features.width)))
        return int(part_at(module, self.count)) if self.count else features

    def _plain(self, layer: Any) -> bool:
        known = isinstance(layer, (nn.Linear, nn.Conv2d))
        weight = getattr(layer, "weight", None)
        return not known and isinstance(weight, Tensor) and weight.dim() == 2 if self.features.transposed else known

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """See Adapter.resize; caches are emptied too, and `Forwards.built` says which units are left of those built."""
        super().resize(module, site, keep)
        if self.forwards.built and site.adapter == self.name:
            before = getattr(module, self.forwards.built, None)
            setattr(module, self.forwards.built, tuple(before[i] for i in keep) if before else tuple(keep))
        for name in self.also.caches:
            getattr(module, name).clear()


Units.__init__ = accept_old_keywords(Units.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Sized(Adapter):
    """A module without units that remembers lengths of the residual stream in it, whose layers are seen without it.

    name, classes   see Units
    counts          attributes that hold a multiple of the stream's units; "shape.0" is the first of a tuple
    """

    name: str
    classes: tuple[str, ...]
    counts: tuple[str, ...]

    def site(self, path: str, module: nn.Module) -> Site | None:
        """None: it has no units."""
        return None

    def along_stream(self, path: str, module: nn.Module) -> StreamParts:
        """See Adapter.along_stream."""
        return StreamParts((), (), ())

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """See Adapter.resize."""
        for name in self.counts:
            set_attribute(module, name, attribute_at(module, name) * len(keep) // site.size)


def _counted(module: nn.Module, path: str) -> bool:
    """True where `attribute_at` finds a whole number."""
    try:
        return bool(attribute_at(module, path))
    except AttributeError:
        return False


def _tensors(layer: nn.Module | None) -> dict[str, Tensor]:
    """The parameters and buffers of a layer that have an axis."""
    named = (*layer.named_parameters(), *layer.named_buffers()) if layer is not None else ()
    return {name: tensor for name, tensor in named if tensor.dim()}


def _held(module: nn.Module, path: str) -> bool:
    return isinstance(part_at(module, path), Tensor)


def _made(module: nn.Module, layer: str, axis: int, groups: int, size: int) -> Sequence[Cut]:
    """Cuts of a reader's weight, or of the weight that it is, along the axis of what it makes, and of its bias."""
    found = [(layer, axis), (f"{layer}.weight", axis), (f"{layer}.bias", 0)]
    return [_along(part_at(module, name), name, along, size, groups) for name, along in found if _held(module, name)]


def _along(tensor: Tensor, name: str, axis: int, size: int, groups: int = 1) -> Cut:
    return Cut(name, axis, groups, tensor.shape[axis] // (groups * size))
