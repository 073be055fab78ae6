"""Site: a place where interchangeable units meet; Cut: how one tensor shrinks when units go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xprune.core.registry import named
from xprune.errors import PlanError

LAYOUTS = ("unit-major", "width-major")


@dataclass(frozen=True)
class Cut:
    """One tensor that loses slices with a unit.

    The tensor's `axis` has groups * size * width entries in the order (groups, size, width): a fused qkv weight
    of H heads is groups=3, width=head_dim; an `mlp.fc1` weight is groups=1, width=1.
    """

    tensor: str
    axis: int
    groups: int = 1
    width: int = 1

    def index(self, keep: Sequence[int], size: int) -> Tensor:
        """Indices along `axis` that stay, int64 (groups * len(keep) * width,)."""
        every = torch.arange(self.groups * size * self.width).view(self.groups, size, self.width)
        return every[:, torch.as_tensor(list(keep), dtype=torch.long)].reshape(-1)


@dataclass(frozen=True)
class Site:
    """A place where `size` interchangeable units meet.

    name      unique in the model; for most sites the path of the module that owns the units
    kind      name of the unit kind: "head", "neuron", "channel", or one of the table UNIT_KINDS
    size      units
    width     features per unit in the input of the consumers
    consumers paths of the layers whose input the units are; "" where the adapter cannot know one: `find_sites`
              then finds it in the model
    axes      feature axis of the input of each consumer: -1 for Linear, 1 for convolutions; () for -1 everywhere
    layout    "unit-major": a unit's features are contiguous; "width-major": they stride over the units
    cuts      every tensor that shrinks, as data: enough to carry out a plan without tracing the model again
    module    path of the module that is replaced by its bias when every unit goes; "" where it holds
              other things too, so that one unit has to stay
    adapter   name in the table ADAPTERS, "" where the graph found the site
    norms     paths of norms that run over the units themselves: gates then mean statistics over the units
              that are kept
    batch     axis of the samples in that input: 0, or 1 where tokens come first; -1 where it is not known
    attributes  attributes, by their paths, that hold a multiple of the number of units: `num_heads`, `attn_dim`
    """

    name: str
    kind: str
    size: int
    width: int
    consumers: tuple[str, ...]
    axes: tuple[int, ...] = ()
    layout: str = "unit-major"
    cuts: tuple[Cut, ...] = ()
    module: str = ""
    adapter: str = ""
    norms: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    batch: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise PlanError(f"{self.name}: layout {self.layout!r} is not one of {', '.join(LAYOUTS)}.")
        if self.size < 1 or self.width < 1:
            raise PlanError(f"{self.name}: size {self.size} and width {self.width} have to be at least 1.")
        if not self.consumers or isinstance(self.consumers, str):
            raise PlanError(
                f"{self.name}: consumers={self.consumers!r}. Give a tuple of the paths of layers that read the units, "
                'with "" for a layer that is not known.'
            )
        if not self.axes:
            object.__setattr__(self, "axes", (-1,) * len(self.consumers))
        if len(self.axes) != len(self.consumers):
            raise PlanError(
                f"{self.name}: {len(self.axes)} axes for {len(self.consumers)} consumers. Give one for each, or none."
            )

    @property
    def owner(self) -> str:
        """Path of the module that the adapter knows."""
        return self.module or self.name

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules whose cost depends on the units."""
        owners = dict.fromkeys(c.tensor.rpartition(".")[0] for c in self.cuts)
        if not self.module and not self.adapter:
            return tuple(owners)
        return (self.owner, *(path for path in owners if not f"{path}.".startswith(f"{self.owner}.")))

    def to_json(self) -> dict[str, Any]:
        """Plain data, `Site.from_json` is its inverse."""
        # The keys are those of the first files: one layer and its axis came first, then lists of all.
        data = asdict(self)
        consumers, axes, attributes = data.pop("consumers"), data.pop("axes"), data.pop("attributes")
        return {**data, "layer": consumers[0], "axis": axes[0], "feeds": consumers, "axes": axes, "counts": attributes}

    @staticmethod
    def from_json(data: Any) -> "Site":
        """A site from plain data; PlanError where a field is missing, unknown or of the wrong type."""
        try:
            fields = dict(data)
            fields["cuts"] = tuple(_typed(Cut, dict(cut)) for cut in fields["cuts"])
            norm = fields.pop("norm", "")  # of files from before a site could have several
            fields.setdefault("norms", (norm,) if norm else ())
            layer, axis = fields.pop("layer"), fields.pop("axis", -1)
            if type(layer) is not str or type(axis) is not int:
                raise TypeError(f"layer is {layer!r} and axis is {axis!r}, wanted a str and an int")
            # Older files leave the lists out where a site has one consumer.
            fields["consumers"] = _paths(fields.pop("feeds", ())) or (layer,)
            axes = tuple(int(axis) for axis in fields.get("axes", ()))
            fields["axes"] = axes or (axis,) * len(fields["consumers"])
            fields["attributes"] = _paths(fields.pop("counts", ()))
            fields["norms"] = _paths(fields.get("norms", ()))
            site: Site = _typed(Site, fields)
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(f"not a site: {data!r} ({error}).") from error
        named("unit_kinds", site.kind, "kind of unit", PlanError)
        return site


class Sites(tuple[Site, ...]):
    """Sites, and what was left alone.

    left   for each attention or MLP that gave no site, the path of its module -> why, in words
    """

    left: Mapping[str, str]

    def __new__(cls, sites: Iterable[Site] = (), left: Mapping[str, str] | None = None) -> "Sites":
        """A tuple of the sites, with `left`."""
        made = super().__new__(cls, sites)
        made.left = dict(left or {})
        return made


@dataclass(frozen=True)
class StreamParts:
    """What of a module lies along the residual stream.

    reads, writes   (tensor, axis) of what shrinks with the stream that it reads, and with the stream that it writes
    consumers       (path, feature axis) of where the channels are gated: the module, or the layers in it
    attributes      attributes, by their paths, that hold a multiple of the channels
    """

    reads: tuple[tuple[str, int], ...]
    writes: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    attributes: tuple[str, ...] = ()


def _paths(values: Any) -> tuple[str, ...]:
    return tuple(str(path) for path in values)


def _typed(kind: type, fields: dict[str, Any]) -> Any:
    """kind(**fields) after a check of the plain types, since a file may hold anything."""
    for name, value in fields.items():
        wanted = kind.__dataclass_fields__[name].type  # type: ignore[attr-defined]
        if wanted in (int, str) and type(value) is not wanted:
            raise TypeError(f"{name} is {value!r}, wanted {wanted.__name__}")
    return kind(**fields)
