"""Proposals: the sites that a module may have by its structure, as data, the likelier first. None is proved here."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from xprune.core.site import Cut, Site
from xprune.modules.norms import is_feature_norm

HEADS = ("num_heads", "n_head", "n_heads", "heads", "nhead", "num_attention_heads", "head_count")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
LAYOUTS = ("groups first", "units first", "narrow layers shared")
"""Rows of a layer with features of several kinds: (q/k/v, units, width), or (units, q/k/v, width)."""


class Structure(ABC):
    """How a module looks that holds units of one kind and that no adapter knows.

    Attributes:
        kind: Name of the unit kind.
        called: What the units are called in reasons.
        attributes: Attributes of a module that may hold the number of units.
        normed: True where a norm of the module may run over the units.
        around: True where a module around a known site may still hold units of its own.
    """

    kind: ClassVar[str]
    called: ClassVar[str]
    attributes: ClassVar[tuple[str, ...]] = ()
    normed: ClassVar[bool] = False
    around: ClassVar[bool]

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """True where the module looks like one that holds such units."""

    @abstractmethod
    def sizes(self, module: nn.Module, features: int) -> list[int]:
        """Numbers of units to try, of a module whose last layer reads so many features."""

    @abstractmethod
    def too_few(self, module: nn.Module, layers: int) -> str:
        """Why a module gives no site whose forward calls fewer than two layers; "" where nothing looks like units."""

    @abstractmethod
    def only_one(self) -> str:
        """Why a module of one unit gives no site; "" where nothing looks like units."""

    @abstractmethod
    def plausible(self, features: int, made: Sequence[int]) -> bool:
        """False where layers that make so many features each cannot make the units that `features` are read of."""


def heads_of(module: nn.Module) -> int | None:
    """The number of heads that a module says it has."""
    return next((v for name in HEADS if type(v := vars(module).get(name)) is int and v > 0), None)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """A module's own linear layers: its children, and those in containers of its own."""
    found: dict[str, nn.Linear] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            found[name] = child
        elif isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            found.update({f"{name}.{inner}": layer for inner, layer in linears_of(child).items()})
    return found


def sizes_of(module: nn.Module) -> list[int]:
    """Numbers of units to try: groups of heads that share keys and values come first."""
    heads = heads_of(module) or 1
    shared = [v for name in KV_HEADS if type(v := vars(module).get(name)) is int and 1 < v < heads and heads % v == 0]
    return [*dict.fromkeys((*shared, heads))]


def proposals(
    module: nn.Module, structure: Structure, consumer: str, producers: Sequence[str], sizes: Sequence[int]
) -> Iterator[Site]:
    """Sites that the module may have, the likelier first; paths relative to `Alone`."""
    linears = linears_of(module)
    for size in sizes:
        features = linears[consumer].in_features
        if features % size:
            continue
        width = features // size
        attributes = [n for n in structure.attributes if _is_multiple(module, n, size)]
        dims = [n for n in vars(module) if n not in attributes and _is_multiple(module, n, features)]
        others = [name for name in _others(module, (consumer, *producers), size)]
        norm = next((n for n, m in module.named_children() if structure.normed and _norms(m, features)), "")
        for some, axes, scaled, layout in itertools.product(_choices(others), (0, 1), _choices(dims), LAYOUTS):
            picked = _picked(module, some, size, axes)
            if picked is None:
                continue
            cuts = [c for name in producers for c in _producer_cuts(linears[name], name, size, width, layout)]
            if norm:
                picked = [c for c in picked if not c.tensor.startswith(f"{norm}.")]
                picked += [Cut(f"{norm}.{name}", 0) for name, _ in module.get_submodule(norm).named_parameters()]
            cuts += [Cut(f"{consumer}.weight", 1, 1, width), *picked]
            yield Site(
                name="module",
                kind=structure.kind,
                size=size,
                width=width,
                consumers=(f"module.{consumer}",),
                cuts=tuple(Cut(f"module.{c.tensor}", c.axis, c.groups, c.width) for c in cuts),
                norms=(f"module.{norm}",) if norm else (),
                attributes=tuple(f"module.{name}" for name in (*attributes, *scaled)),
            )


def _choices(names: Sequence[str]) -> list[tuple[str, ...]]:
    """None of them, all of them, each alone."""
    return list(dict.fromkeys(((), tuple(names), *((name,) for name in names))))


def _is_multiple(module: nn.Module, name: str, multiple: int) -> bool:
    value = vars(module).get(name)
    return type(value) is int and value > 0 and value % multiple == 0


def _norms(module: nn.Module, features: int) -> bool:
    weight = getattr(module, "weight", None)
    return is_feature_norm(module) and isinstance(weight, Tensor) and weight.shape == (features,)


def _others(module: nn.Module, layers: Sequence[str], size: int) -> list[str]:
    """Tensors, none of the linear layers', that have an axis of as many entries as units, or a multiple."""
    held = (*module.named_parameters(), *module.named_buffers())
    return [n for n, t in held if n.rpartition(".")[0] not in layers and any(d % size == 0 for d in t.shape if d)]


def _picked(module: nn.Module, names: Sequence[str], size: int, which: int) -> list[Cut] | None:
    """A cut of each tensor along its first or second axis that fits; None where the second is no other choice."""
    cuts, other = [], False
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    for name in names:
        shape = tensors[name].shape
        axes = [a for a, d in enumerate(shape) if d == size] or [a for a, d in enumerate(shape) if d and d % size == 0]
        other = other or len(axes) > 1
        axis = axes[min(which, len(axes) - 1)]
        cuts.append(Cut(name, axis, 1, shape[axis] // size))
    return cuts if other or not which else None


def _producer_cuts(layer: nn.Linear, name: str, size: int, width: int, layout: str) -> list[Cut]:
    """Cuts of a layer that makes features of the units; none where all units share what it makes."""
    rows = layer.out_features
    if rows % size or (layout == "narrow layers shared" and rows < size * width):
        return []
    groups = rows // (size * width) if layout != "units first" and rows % (size * width) == 0 else 1
    parts = [part for part in ("weight", "bias") if getattr(layer, part) is not None]
    return [Cut(f"{name}.{part}", 0, groups, rows // (size * groups)) for part in parts]
