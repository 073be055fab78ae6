"""Units: an adapter said as data, which serves most attention and MLP classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xprune.interfaces import Adapter
from xprune.site import Cut, Site
from xprune.structure import attribute_at


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
    counts    attributes that hold a multiple of the units, beside `count`; "bias_shape.2" is the third of a tuple
    norm      a norm that runs over the units themselves
    layers    layers all of whose tensors of one axis shrink: gates, norms over units
    caches    attributes to empty once units have gone
    needs     what the module has, and not as False, where this entry serves it: variants of a class in other layouts
              have entries of their own
    unless    what is true of the module where its units cannot go
    whole     False where the module gives more than its writer's output, so that one unit has to stay
    kind      "head" or "neuron"
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
    needs: tuple[str, ...] = ()
    unless: str = ""
    whole: bool = True
    kind: str = "head"
    pruned: type[nn.Module] | None = None
    gated: type[nn.Module] | None = None

    def site(self, path: str, module: nn.Module) -> Site | None:
        """See Adapter.site; None for other layers or no multiples of the units, and as `needs`, `unless` say."""
        lacking = [name for name in self.needs if _at(module, name) is None or _at(module, name) is False]
        if lacking or (self.unless and _at(module, self.unless)):
            return None
        writer: Any = _at(module, self.writer)
        if not _plain(writer) or any(not _plain(_at(module, name)) for name, _ in self.readers if _at(module, name)):
            return None
        features = writer.weight.shape[1] * getattr(writer, "groups", 1)
        size = int(_at(module, self.count)) if self.count else features
        cuts = [cut for name, groups in self.readers for cut in _rows(module, name, groups, size)]
        cuts.append(Cut(f"{self.writer}.weight", 1, 1, features // size))
        cuts += [_along(_at(module, name), name, axis, size) for name, axis in self.tensors if _held(module, name)]
        for layer in (*self.layers, self.norm):
            held = _at(module, layer) if layer else None
            named = (*held.named_parameters(), *held.named_buffers()) if held is not None else ()
            cuts += [_along(tensor, f"{layer}.{name}", 0, size) for name, tensor in named if tensor.dim()]
        if any(_at(module, c.tensor).shape[c.axis] % (c.groups * size) for c in cuts) or features % size:
            return None
        normed = bool(self.norm) and any(True for _ in _at(module, self.norm).parameters())
        counts = (*((self.count,) if self.count else ()), *(n for n in self.counts if _counted(module, n)))
        return Site(
            name=path,
            kind=self.kind,
            size=size,
            width=features // size,
            layer=f"{path}.{self.writer}",
            axis=-1 if isinstance(writer, nn.Linear) else 1,
            cuts=tuple(Cut(f"{path}.{cut.tensor}", cut.axis, cut.groups, cut.width) for cut in cuts),
            module=path if self.whole else "",
            adapter=self.name,
            norm=f"{path}.{self.norm}" if normed else "",
            counts=tuple(f"{path}.{name}" for name in counts),
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


def _counted(module: nn.Module, path: str) -> bool:
    """True where `attribute_at` finds a whole number."""
    try:
        return bool(attribute_at(module, path))
    except AttributeError:
        return False


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
