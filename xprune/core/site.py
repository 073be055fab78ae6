"""The classes `Site` and `Cut`: where a model has units, and how its tensors shrink when units are removed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xprune.core.registry import named
from xprune.errors import PlanError

LAYOUTS = ("unit-major", "width-major")
"""The allowed values of `Site.layout`: the orders of units and their features in the input of a consumer."""


@dataclass(frozen=True)
class Cut:
    """One tensor and the axis along which it loses entries when units are removed.

    Along this axis the tensor has groups * size * width entries, in the order (groups, size, width). `size` is the
    number of units of the site that contains the cut. If the axis is divided in another way, `segments` says how.

    Args:
        tensor: The path of the parameter or buffer, such as "blocks.0.attn.qkv.weight".
        axis: The axis that shrinks. The first axis is 0.
        groups: How many times the axis contains all units of the site. It is 3 for a fused qkv weight with rows in the
            order (3, heads, head size). It is 1 for the first layer of an MLP.
        width: The number of entries of one unit in one group: the head size for heads, 1 for neurons.
        segments: The parts of an axis that is not divided evenly, in their order. A positive number n is a part in which
            each unit has n entries. A negative number -n is a part of n entries that all units share, and that stays.
            An empty tuple means that `groups` and `width` describe the axis. Otherwise `groups` and `width` are 1.

    Example:
        The fused qkv weight of an attention with 3 heads of head size 2 has 3 * 3 * 2 = 18 rows. If we keep heads 0 and
        2, these rows stay:

        >>> qkv = Cut("attn.qkv.weight", axis=0, groups=3, width=2)
        >>> qkv.index([0, 2], size=3)
        tensor([ 0,  1,  4,  5,  6,  7, 10, 11, 12, 13, 16, 17])

        If all 3 query heads share one head of keys and one head of values, the last 4 rows always stay:

        >>> Cut("attn.qkv.weight", axis=0, segments=(2, -4)).index([0, 2], size=3)
        tensor([0, 1, 4, 5, 6, 7, 8, 9])
    """

    tensor: str
    axis: int
    groups: int = 1
    width: int = 1
    segments: tuple[int, ...] = ()

    @staticmethod
    def of_segments(tensor: str, axis: int, segments: Sequence[int]) -> "Cut":
        """Returns the cut of an axis that is divided into these segments.

        If all segments have the same number of entries for each unit, the cut has groups and a width instead.
        """
        if len(set(segments)) == 1 and segments[0] > 0:
            return Cut(tensor, axis, len(segments), segments[0])
        return Cut(tensor, axis, segments=tuple(segments))

    @property
    def parts(self) -> tuple[int, ...]:
        """The segments of the axis, also if they are even. See the argument `segments`."""
        return self.segments or (self.width,) * self.groups

    @property
    def per_unit(self) -> int:
        """The number of entries along the axis that one unit has."""
        return sum(part for part in self.parts if part > 0)

    def length(self, size: int) -> int:
        """Returns the number of entries along the axis if the site has `size` units."""
        return sum(part * size if part > 0 else -part for part in self.parts)

    def units(self, size: int) -> Tensor:
        """Returns the entries that each unit has along the axis, int64 (units, entries of one unit)."""
        blocks, start = [], 0
        for part in self.parts:
            if part > 0:
                blocks.append(torch.arange(start, start + size * part).view(size, part))
            start += part * size if part > 0 else -part
        return torch.cat(blocks, 1)

    def index(self, keep: Sequence[int], size: int) -> Tensor:
        """Returns the indices of the entries along `axis` that stay.

        Args:
            keep: The indices of the units that stay.
            size: The number of units before the cut.

        Returns:
            An int64 tensor with `length(len(keep))` indices. They are in ascending order if `keep` is.
        """
        kept, found, start = torch.as_tensor(list(keep), dtype=torch.long), [], 0
        for part in self.parts:
            length = part * size if part > 0 else -part
            every = torch.arange(start, start + length)
            # A shared segment stays as it is.
            found.append(every.view(size, part)[kept].reshape(-1) if part > 0 else every)
            start += length
        return torch.cat(found)


@dataclass(frozen=True)
class Site:
    """A place in a model that holds units of one kind, such as the heads of one attention.

    `find_sites` returns sites. Authors of adapters and unit kinds create sites with this constructor. A site holds no
    tensors, only the paths and numbers that surgery needs to cut the units out of a model.

    Args:
        name: The name of the site. It is unique in the model. For most sites it is the path of the module that contains
            the units.
        kind: The name of the unit kind: "head", "neuron", "channel", or another name in the table `xprune.UNIT_KINDS`.
        size: The number of units.
        width: The number of features of one unit in the input of the consumers.
        consumers: The paths of the layers whose input is the units. Gates are applied to this input. An empty path
            means that the adapter does not know the layer. `find_sites` then finds the layer in the model. The path of
            a parameter means that no layer holds it, and that its owner multiplies by it. Gates then act on this
            parameter.
        axes: For each consumer, the axis of its input that holds the features: -1 for `nn.Linear`, 1 for a convolution.
            For a parameter, the axis of the parameter.
            An empty tuple means -1 for every consumer.
        layout: The order of the features in the input of the consumers. "unit-major": all features of the first unit
            come first, then all features of the second unit, and so on. "width-major": the first feature of every unit
            comes first, then the second feature of every unit, and so on.
        cuts: All tensors that shrink when units are removed.
        module: The path of the module that is replaced if all its units are removed. By default its replacement returns
            the bias of its last layer, see `Adapter.removed`. An empty path means that no module can be replaced,
            because the module does other things too. Such a site keeps at least one unit.
        adapter: The name of the adapter in the table `xprune.ADAPTERS`. It is empty if the site was found without an
            adapter.
        norms: The paths of norm layers that compute their statistics over the units. While gates are attached, these
            layers use the kept units only.
        attributes: The paths of attributes whose value is a multiple of the number of units, such as `num_heads` or
            `attn_dim`. They are updated after a cut.
        batch: The sample axis of the input of the consumers: 0, or 1 if tokens come first. -1 if it is not known.
        lists: The paths of lists of modules that hold one module for each unit, such as an `nn.ModuleList` of heads.
        rewrites: How the forward of the owner changes when units are removed, see `DerivedForward`. Empty if it stays.

    Raises:
        PlanError: A field is out of range, or two fields contradict each other.

    Example:
        The site of the hidden neurons of an MLP with the layers `fc1` and `fc2`:

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
    lists: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise PlanError(f"{self.name}: layout={self.layout!r} is not known. Give one of: {', '.join(LAYOUTS)}.")
        if self.size < 1 or self.width < 1:
            raise PlanError(
                f"{self.name}: size={self.size} and width={self.width} have to be at least 1. A site without units is "
                "left out."
            )
        # A string is a sequence of letters. Without this check, each letter would be taken for a path.
        if not self.consumers or isinstance(self.consumers, str):
            raise PlanError(
                f"{self.name}: consumers={self.consumers!r}. Give a tuple of the paths of layers that read the units, "
                'with "" for a layer that is not known.'
            )
        if not self.axes:
            # A frozen dataclass refuses plain assignment, even in its __post_init__.
            object.__setattr__(self, "axes", (-1,) * len(self.consumers))
        if len(self.axes) != len(self.consumers):
            raise PlanError(
                f"{self.name}: there are {len(self.axes)} axes for {len(self.consumers)} consumers. Give one axis for "
                "each consumer, or none."
            )

    @property
    def owner(self) -> str:
        """The path of the module that the adapter serves. It is `module`, or `name` if `module` is empty."""
        return self.module or self.name

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules whose cost depends on the number of units. `measure_costs` adds up their costs.

        If the site has an adapter or a `module`, the first path is `owner`. The modules outside the owner that hold a
        tensor of the cuts follow. In any other case, the result contains every module that holds a tensor of the cuts.
        """
        holders = dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in self.cuts)
        if not self.module and not self.adapter:
            return tuple(holders)
        outside = (path for path in holders if not f"{path}.".startswith(f"{self.owner}."))
        return (self.owner, *outside)

    def to_json(self) -> dict[str, Any]:
        """Returns the site as a dict of tuples, dicts, strings and numbers. `Site.from_json` reads the dict."""
        # Saved files use the keys of the first release. "layer" and "axis" describe the first consumer. "feeds" and
        # "axes" describe all consumers. "counts" holds the attributes.
        data = asdict(self)
        consumers, axes, attributes = data.pop("consumers"), data.pop("axes"), data.pop("attributes")
        for cut in data["cuts"]:
            # Most cuts have no segments. Files of older releases have no such key.
            if not cut["segments"]:
                del cut["segments"]
        for name in ("lists", "rewrites"):
            if not data[name]:
                del data[name]
        return {**data, "layer": consumers[0], "axis": axes[0], "feeds": consumers, "axes": axes, "counts": attributes}

    @staticmethod
    def from_json(data: Any) -> "Site":
        """Makes a site from the dict that `to_json` returned. It also reads sites of older releases.

        Raises:
            PlanError: A field is missing, unknown or of the wrong type, or the unit kind is not known.
        """
        try:
            fields = dict(data)
            fields["cuts"] = tuple(_cut(dict(cut)) for cut in fields["cuts"])
            # In older files a site has at most one norm layer. Its key is "norm".
            norm = fields.pop("norm", "")
            fields.setdefault("norms", (norm,) if norm else ())
            layer, axis = fields.pop("layer"), fields.pop("axis", -1)
            if type(layer) is not str or type(axis) is not int:
                raise TypeError(f"layer is {layer!r} and axis is {axis!r}, wanted a str and an int")
            # If a site has one consumer, older files contain only "layer" and "axis".
            fields["consumers"] = _paths(fields.pop("feeds", ())) or (layer,)
            axes = tuple(int(axis) for axis in fields.get("axes", ()))
            fields["axes"] = axes or (axis,) * len(fields["consumers"])
            fields["attributes"] = _paths(fields.pop("counts", ()))
            fields["norms"] = _paths(fields.get("norms", ()))
            fields["lists"] = _paths(fields.get("lists", ()))
            fields["rewrites"] = _paths(fields.get("rewrites", ()))
            site: Site = _checked(Site, fields)
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(f"not a site: {data!r} ({error}). Give what Site.to_json returned.") from error
        # This check is outside of the try block, because its message should reach the user unchanged. It lists the
        # known kinds.
        named("unit_kinds", site.kind, "kind of unit", PlanError)
        return site


class Sites(tuple[Site, ...]):
    """A tuple of the sites of a model. It also says which modules were left alone, and why.

    Attributes:
        left: The reason for each module that was left alone, by the path of the module. Such a module looks like an
            attention or an MLP but gives no site.
        inside: The patterns of the part of the model that was searched, see `find_sites`. Empty if the whole model was
            searched.

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
    inside: tuple[str, ...]

    def __new__(
        cls, sites: Iterable[Site] = (), left: Mapping[str, str] | None = None, inside: Iterable[str] = ()
    ) -> "Sites":
        """Creates the tuple.

        Args:
            sites: The sites, in the order of the model.
            left: The reason for each module that was left alone, by the path of the module. None means that there is no
                such module.
            inside: The patterns of the part of the model that was searched. Empty for the whole model.
        """
        instance = super().__new__(cls, sites)
        instance.left, instance.inside = dict(left or {}), tuple(inside)
        return instance


@dataclass(frozen=True)
class StreamParts:
    """The tensors of one module that shrink if channels of the residual stream are removed.

    `Adapter.stream_parts` returns it. Every path is a path in the model, not in the module.

    Args:
        reads: A tuple (path of a tensor, axis) for each tensor that shrinks if the stream that the module reads loses
            channels.
        writes: A tuple (path of a tensor, axis) for each tensor that shrinks if the stream that the module writes to
            loses channels.
        consumers: A tuple (path, feature axis of the input) for each place where gates are applied to the channels. The
            path is that of the module, or of a layer in it.
        attributes: The paths of attributes whose value is a multiple of the number of channels.

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


def _cut(fields: dict[str, Any]) -> Cut:
    """Makes a `Cut` from the fields of a JSON file."""
    segments = fields.pop("segments", ())
    if not isinstance(segments, (tuple, list)) or any(type(part) is not int or part == 0 for part in segments):
        raise TypeError(f"segments is {segments!r}, wanted a list of whole numbers other than 0")
    found: Cut = _checked(Cut, fields)
    return replace(found, segments=tuple(segments))


def _paths(values: Any) -> tuple[str, ...]:
    """Returns the entries of a list from a JSON file as a tuple of strings."""
    return tuple(str(path) for path in values)


def _checked(kind: type, fields: dict[str, Any]) -> Any:
    """Makes a `Cut` or a `Site` from the fields of a JSON file, after it has checked the types of int and str fields.

    Raises:
        TypeError: A field is unknown, missing, or of another type than the class says.
    """
    for name, value in fields.items():
        wanted = kind.__dataclass_fields__[name].type  # type: ignore[attr-defined]
        # `isinstance` would accept True, which is an int in Python.
        if wanted in (int, str) and type(value) is not wanted:
            raise TypeError(f"{name} is {value!r}, wanted {wanted.__name__}")
    return kind(**fields)
