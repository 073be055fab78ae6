"""Sites, which are places in a model where units can be removed, and cuts, which say how each tensor shrinks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xprune.core.registry import named
from xprune.errors import PlanError

LAYOUTS = ("unit-major", "width-major")
"""The orders in which units and their features may lie in the input of a consumer, see `Site.layout`."""


@dataclass(frozen=True)
class Cut:
    """One tensor, with the axis along which it loses entries when units are removed.

    Along that axis the tensor has groups * size * width entries, in the order (groups, size, width). `size` is the
    number of units of the site that the cut belongs to.

    Args:
        tensor: Path of the parameter or buffer: "blocks.0.attn.qkv.weight".
        axis: The axis that shrinks. It is counted from 0.
        groups: How many times the units come one after another along the axis. It is 3 for a fused qkv weight with rows
            in the order (3, heads, head size), and 1 for the first layer of an MLP.
        width: Entries of one unit in one group: the head size for heads, 1 for neurons.

    Example:
        The fused qkv weight of an attention with 3 heads of head size 2 has 3 * 3 * 2 = 18 rows. We keep heads 0 and 2:

        >>> qkv = Cut("attn.qkv.weight", axis=0, groups=3, width=2)
        >>> qkv.index([0, 2], size=3)
        tensor([ 0,  1,  4,  5,  6,  7, 10, 11, 12, 13, 16, 17])
    """

    tensor: str
    axis: int
    groups: int = 1
    width: int = 1

    def index(self, keep: Sequence[int], size: int) -> Tensor:
        """Returns the indices along `axis` that stay.

        Args:
            keep: Indices of the units that stay.
            size: Number of units before the cut.

        Returns:
            int64 (groups * len(keep) * width,), ascending where `keep` is.
        """
        every = torch.arange(self.groups * size * self.width).view(self.groups, size, self.width)
        return every[:, torch.as_tensor(list(keep), dtype=torch.long)].reshape(-1)


@dataclass(frozen=True)
class Site:
    """A place in a model that holds units of one kind, such as the heads of one attention.

    `find_sites` makes sites. Adapters and unit kinds make them with this constructor. A site holds paths and numbers
    only, no tensors. It is enough to cut the units out of the weights without tracing the model again.

    Args:
        name: Name of the site, unique in the model. For most sites it is the path of the module that owns the units.
        kind: Name of the unit kind: "head", "neuron", "channel", or another name in the table UNIT_KINDS.
        size: Number of units.
        width: Features of one unit in the input of the consumers.
        consumers: Paths of the layers whose input is the units. Gates are applied to that input. "" means that the
            adapter does not know the layer: `find_sites` then finds it in the model.
        axes: Feature axis of the input of each consumer: -1 for `nn.Linear`, 1 for convolutions. () means -1 for every
            consumer.
        layout: Order of the features in the input of the consumers. "unit-major": the features of one unit are next to
            each other. "width-major": the first features of all units come first, then their second features, and so
            on.
        cuts: Every tensor that shrinks when units are removed.
        module: Path of the module that is replaced when all its units are removed: by the bias of its last layer, or by
            what `Adapter.removed` says. "" if the module holds other things too. Then at least one unit has to stay.
        adapter: Name in the table ADAPTERS. "" if the site was found without an adapter.
        norms: Paths of norms that normalise over the units themselves. With gates attached, these norms take their
            statistics over the kept units only.
        attributes: Paths of attributes that hold a multiple of the number of units, such as `num_heads` or `attn_dim`.
            They are updated after a cut.
        batch: Sample axis of the input of the consumers: 0, or 1 where tokens come first. -1 if it is not known.

    Raises:
        PlanError: A field is out of range, or the fields do not fit each other.

    Example:
        The hidden neurons of an MLP with layers `fc1` and `fc2`:

        >>> cuts = (Cut("mlp.fc1.weight", 0), Cut("mlp.fc1.bias", 0), Cut("mlp.fc2.weight", 1))
        >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), cuts=cuts, module="mlp")
        >>> site.axes
        (-1,)
        >>> Site.from_json(site.to_json()) == site
        True
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
            raise PlanError(f"{self.name}: layout={self.layout!r} is not known. Give one of: {', '.join(LAYOUTS)}.")
        if self.size < 1 or self.width < 1:
            raise PlanError(
                f"{self.name}: size={self.size} and width={self.width} have to be at least 1. A site without units is "
                "left out."
            )
        # A plain string is a sequence too: without this check its letters would be taken for paths.
        if not self.consumers or isinstance(self.consumers, str):
            raise PlanError(
                f"{self.name}: consumers={self.consumers!r}. Give a tuple of the paths of layers that read the units, "
                'with "" for a layer that is not known.'
            )
        if not self.axes:
            # A frozen dataclass refuses plain assignment, also in its own __post_init__.
            object.__setattr__(self, "axes", (-1,) * len(self.consumers))
        if len(self.axes) != len(self.consumers):
            raise PlanError(
                f"{self.name}: there are {len(self.axes)} axes for {len(self.consumers)} consumers. Give one axis for "
                "each consumer, or none."
            )

    @property
    def owner(self) -> str:
        """Path of the module that the adapter serves: `module`, or `name` if `module` is empty."""
        return self.module or self.name

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules whose cost depends on the number of units.

        A site with an adapter or with `module` has an owner. Then the result is the owner, followed by the modules
        outside of it that hold tensors of the cuts. Without an owner, it is every module that holds a tensor of the
        cuts.
        """
        holders = dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in self.cuts)
        if not self.module and not self.adapter:
            return tuple(holders)
        outside = (path for path in holders if not f"{path}.".startswith(f"{self.owner}."))
        return (self.owner, *outside)

    def to_json(self) -> dict[str, Any]:
        """Returns the site as dicts, tuples, strings and numbers. `Site.from_json` is the inverse."""
        # Saved files keep the keys of the first release: "layer" and "axis" of the first consumer, then "feeds" and
        # "axes" of all consumers. "counts" holds the attributes.
        data = asdict(self)
        consumers, axes, attributes = data.pop("consumers"), data.pop("axes"), data.pop("attributes")
        return {**data, "layer": consumers[0], "axis": axes[0], "feeds": consumers, "axes": axes, "counts": attributes}

    @staticmethod
    def from_json(data: Any) -> "Site":
        """Makes a site from what `to_json` gave, also in a file of an older release.

        Raises:
            PlanError: A field is missing, unknown or of the wrong type, or the unit kind is not known.
        """
        try:
            fields = dict(data)
            fields["cuts"] = tuple(_checked(Cut, dict(cut)) for cut in fields["cuts"])
            # In older files a site has one norm at most, under another key.
            norm = fields.pop("norm", "")
            fields.setdefault("norms", (norm,) if norm else ())
            layer, axis = fields.pop("layer"), fields.pop("axis", -1)
            if type(layer) is not str or type(axis) is not int:
                raise TypeError(f"layer is {layer!r} and axis is {axis!r}, wanted a str and an int")
            # Older files leave out the lists of all consumers and axes where a site has one consumer.
            fields["consumers"] = _paths(fields.pop("feeds", ())) or (layer,)
            axes = tuple(int(axis) for axis in fields.get("axes", ()))
            fields["axes"] = axes or (axis,) * len(fields["consumers"])
            fields["attributes"] = _paths(fields.pop("counts", ()))
            fields["norms"] = _paths(fields.get("norms", ()))
            site: Site = _checked(Site, fields)
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(f"not a site: {data!r} ({error}). Give what Site.to_json returned.") from error
        # Outside of the try block: an unknown kind has another message, which lists the known kinds.
        named("unit_kinds", site.kind, "kind of unit", PlanError)
        return site


class Sites(tuple[Site, ...]):
    """A tuple of the sites of a model, which also knows the modules that were left alone.

    Attributes:
        left: Path and reason of each module that was left alone: it looks like an attention or MLP but gave no site.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> sites = xprune.find_sites(model, torch.randn(2, 5, 8))
        >>> [(site.name, site.kind, site.size) for site in sites]
        [('self_attn', 'head', 2)]
        >>> list(sites.left)
        ['linear2']
    """

    left: Mapping[str, str]

    def __new__(cls, sites: Iterable[Site] = (), left: Mapping[str, str] | None = None) -> "Sites":
        """Makes the tuple.

        Args:
            sites: The sites, in the order of the model.
            left: Path and reason of each module that was left alone. None if there is none.
        """
        instance = super().__new__(cls, sites)
        instance.left = dict(left or {})
        return instance


@dataclass(frozen=True)
class StreamParts:
    """The parts of one module that shrink when channels of the residual stream are removed.

    `Adapter.stream_parts` returns it. Every path is a path in the model, not in the module.

    Args:
        reads: (path of a tensor, axis) of each tensor that shrinks with the stream that the module reads.
        writes: (path of a tensor, axis) of each tensor that shrinks with the stream that the module writes to.
        consumers: (path, feature axis of the input) of each place where channels are gated: the module itself, or
            layers in it.
        attributes: Paths of attributes that hold a multiple of the number of channels.

    Example:
        An MLP with layers `fc1` and `fc2` reads the stream with `fc1` and writes to it with `fc2`:

        >>> reads, writes = (("mlp.fc1.weight", 1),), (("mlp.fc2.weight", 0), ("mlp.fc2.bias", 0))
        >>> StreamParts(reads, writes, consumers=(("mlp", -1),)).attributes
        ()
    """

    reads: tuple[tuple[str, int], ...]
    writes: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    attributes: tuple[str, ...] = ()


def _paths(values: Any) -> tuple[str, ...]:
    """Makes a tuple of strings from the list that a JSON file holds."""
    return tuple(str(path) for path in values)


def _checked(kind: type, fields: dict[str, Any]) -> Any:
    """Makes a `Cut` or a `Site` after checking its int and str fields, since a file may hold anything.

    Raises:
        TypeError: A field is unknown, missing, or of another type than the class says.
    """
    for name, value in fields.items():
        wanted = kind.__dataclass_fields__[name].type  # type: ignore[attr-defined]
        # `isinstance` would let True pass for an int.
        if wanted in (int, str) and type(value) is not wanted:
            raise TypeError(f"{name} is {value!r}, wanted {wanted.__name__}")
    return kind(**fields)
