"""Units: an adapter said as data, which serves most attention and MLP classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xprune.interfaces import Adapter
from xprune.site import Along, Cut, Site


@dataclass(frozen=True)
class Units(Adapter):
    """Units of one attention or MLP class, every name relative to the module.

    name      of the adapter
    classes   qualified names of the classes served
    count     attribute that holds the number of units; "": as many as the writer has input features
    readers   (layer, groups) of each layer that makes the units' features: its rows come as (groups, units, width),
              3 for a fused qkv in the order (3, heads, head_dim), 1 for a q of its own or for rows with the heads first
    writer    the layer that the units feed, which is where they are gated
    tensors   (tensor, axis) of whatever else shrinks with a unit, a multiple of the units long along that axis:
              a bias table's column for each head, biases that are no layer's
    counts    attributes that hold a multiple of the units, beside `count`
    norm      a norm that runs over the units themselves
    layers    layers all of whose tensors of one axis shrink: gates, norms over units
    caches    attributes to empty once units have gone
    kind      "head" or "neuron"
    stream    (tensor, axis) of whatever else in the module lies along the residual stream, beside the readers' columns
              and the writer's rows: what runs over the stream before some of the readers
    pruned, gated   see Adapter

    What a module does not have, or has as None, is left out: one entry serves the variants of a class.
    """

    name: str
    classes: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]
    writer: str = "proj"
    count: str = "num_heads"
    tensors: tuple[tuple[str, int], ...] = ()
    layers: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    norm: str = ""
    caches: tuple[str, ...] = ()
    kind: str = "head"
    stream: tuple[tuple[str, int], ...] = ()
    pruned: type[nn.Module] | None = None
    gated: type[nn.Module] | None = None

    def site(self, path: str, module: nn.Module) -> Site | None:
        """See Adapter.site; None where the layers are no linear layers or convolutions."""
        writer: Any = _at(module, self.writer)
        if not _plain(writer) or any(not _plain(_at(module, name)) for name, _ in self.readers if _at(module, name)):
            return None
        features = writer.weight.shape[1] * getattr(writer, "groups", 1)
        size = int(getattr(module, self.count)) if self.count else features
        cuts = [cut for name, groups in self.readers for cut in _rows(module, name, groups, size)]
        cuts.append(Cut(f"{self.writer}.weight", 1, 1, features // size))
        cuts += [_along(_at(module, name), name, axis, size) for name, axis in self.tensors if _held(module, name)]
        for layer in (*self.layers, self.norm):
            held = _at(module, layer) if layer else None
            named = (*held.named_parameters(), *held.named_buffers()) if held is not None else ()
            cuts += [_along(tensor, f"{layer}.{name}", 0, size) for name, tensor in named if tensor.dim()]
        normed = bool(self.norm) and any(True for _ in _at(module, self.norm).parameters())
        counts = (*((self.count,) if self.count else ()), *(name for name in self.counts if hasattr(module, name)))
        return Site(
            name=path,
            kind=self.kind,
            size=size,
            width=features // size,
            layer=f"{path}.{self.writer}",
            axis=-1 if isinstance(writer, nn.Linear) else 1,
            cuts=tuple(Cut(f"{path}.{cut.tensor}", cut.axis, cut.groups, cut.width) for cut in cuts),
            module=path,
            adapter=self.name,
            norms=(f"{path}.{self.norm}",) if normed else (),
            counts=tuple(f"{path}.{name}" for name in counts),
        )

    def along_stream(self, path: str, module: nn.Module) -> Along | None:
        """See Adapter.along_stream."""
        layers = [(name, _at(module, name)) for name, _ in self.readers if _at(module, name) is not None]
        if not layers:
            return None
        extra = [(name, axis) for name, axis in self.stream if _held(module, name)]
        reads = [(f"{name}.weight", 1) for name, _ in layers] + extra
        writes = [(f"{self.writer}.{part}", 0) for part in ("weight", "bias") if _held(module, f"{self.writer}.{part}")]
        inside = dict.fromkeys(name.rpartition(".")[0] for name, axis in reads if axis == 1) if extra else {}
        feeds = [(f"{path}.{name}", -1 if isinstance(_at(module, name), nn.Linear) else 1) for name in inside]
        return Along(
            tuple((f"{path}.{name}", axis) for name, axis in reads),
            tuple((f"{path}.{name}", axis) for name, axis in writes),
            tuple(feeds) or ((path, -1 if isinstance(layers[0][1], nn.Linear) else 1),),
        )

    def resize(self, module: nn.Module) -> None:
        """See Adapter.resize; caches are emptied too."""
        super().resize(module)
        for name in self.caches:
            getattr(module, name).clear()


def _at(module: nn.Module, path: str) -> Any:
    """What stands at a dotted path, None for nothing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _held(module: nn.Module, path: str) -> bool:
    return isinstance(_at(module, path), Tensor)


def _plain(layer: object) -> bool:
    return isinstance(layer, (nn.Linear, nn.Conv2d))


def _rows(module: nn.Module, layer: str, groups: int, size: int) -> Sequence[Cut]:
    """Cuts of a reader's weight and bias."""
    found = [f"{layer}.{part}" for part in ("weight", "bias") if _held(module, f"{layer}.{part}")]
    return [_along(_at(module, name), name, 0, size, groups) for name in found]


def _along(tensor: Tensor, name: str, axis: int, size: int, groups: int = 1) -> Cut:
    return Cut(name, axis, groups, tensor.shape[axis] // (groups * size))
