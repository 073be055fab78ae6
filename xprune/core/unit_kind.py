"""Unit kinds: what the units of a site are (heads, neurons, channels), and how they are found, gated and cut."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import nn

from xprune.core.registry import named
from xprune.core.site import Site
from xprune.errors import PlanError


@dataclass(frozen=True)
class Found:
    """What one unit kind found in a model. `UnitKind.find` returns it.

    Args:
        sites: The sites by name.
        left: Path and reason of each module that was left alone: it has such units but gives no site.
        closed: Modules that later kinds do not look into, each with a site by its path. The first cut of that site has
            to be of a tensor that reads the stream. `axes[0]` is the feature axis of the module's output.

    Example:
        >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> Found({site.name: site}, left={"head.mlp": "its forward cannot be traced"}).closed
        {}
    """

    sites: Mapping[str, Site] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    closed: Mapping[str, Site] = field(default_factory=dict)


@dataclass(frozen=True)
class Search(Found):
    """The state of a search for sites: the model, and everything that was found so far.

    `find_sites` starts it with the sites that adapters know. Then it asks one kind after the other.

    Args:
        sites: The sites by name.
        left: Path and reason of each module that was left alone.
        closed: Modules that later kinds do not look into, see `Found`.
        model: The model. It must not be changed: work on a copy.
        example_inputs: Inputs of the model, on the model's device.

    Example:
        >>> import torch
        >>> search = Search(model=nn.Linear(4, 4), example_inputs=torch.zeros(2, 4))
        >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> list(search.after(Found({site.name: site})).sites)
        ['mlp']
    """

    model: nn.Module = field(default_factory=nn.Module)
    example_inputs: Any = None

    def after(self, found: Found) -> "Search":
        """Returns the search together with what one more kind found."""
        return replace(
            self,
            sites={**self.sites, **found.sites},
            left={**self.left, **found.left},
            closed={**self.closed, **found.closed},
        )


class GateHooks(Protocol):
    """Attaches the gates of one site to a model. `UnitKind.gate` gets it.

    Every place that a gate is attached to has to be reached in every forward pass. If it is not, the pass ends with a
    GateError.
    """

    def on_input(self, path: str, axis: int) -> None:
        """Multiplies the input of the module at `path` by the gates, along `axis` of the input."""

    def on_output(self, path: str, axis: int) -> None:
        """Multiplies the first tensor in the output of the module at `path` by the gates, along `axis`."""

    def on_norm(self, path: str) -> None:
        """Makes the norm at `path` take its statistics over the kept units only."""


class UnitKind(ABC):
    """One kind of unit: how its units are found, gated and cut, and how reports show them.

    A subclass sets the attributes and gives `find`. The other methods have defaults. Reports show the first line of the
    subclass's docstring as an explanation.

    Attributes:
        name: Name in the table UNIT_KINDS, as in `Site.kind` and `find_sites(units=[name])`.
        plural: Name of several units, for messages, tables and legends.
        by_default: True if `find_sites` looks for these units when `units=` is not given.
        needs: Names of the kinds that are looked for before this one.
        order: Kinds are cut in ascending order. A kind that cuts into modules which another kind replaces comes before
            it.
        crosses: True if the units cut tensors of other sites along another axis, as the channels of a residual stream
            do. Costs then have pairs of sites, and the adapter of each module that is cut resizes the module.
        attends: True if the units are heads of an attention, so attention maps can be drawn for them.
        singly: True if reports draw each unit. False if there are too many, and reports draw bars and bins.
        line: Style of the line of a site in plots, in the notation of matplotlib.
        found_by: How a site was found that no adapter knows, as a text for tables.

    Example:
        >>> class Layer(UnitKind):
        ...     '''The hidden layer of an MLP at the path "mlp", as one unit.'''
        ...
        ...     name, plural = "layer", "layers"
        ...
        ...     def find(self, search):
        ...         size = search.model.mlp[0].out_features
        ...         return Found({"mlp": Site("mlp", self.name, 1, size, ("mlp.2",), module="mlp")})
        >>> Layer().many(3)
        '3 layers'
        >>> model = nn.Module()
        >>> model.mlp = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> Layer().find(Search(model=model)).sites["mlp"].width
        16
    """

    name: ClassVar[str]
    plural: ClassVar[str]
    by_default: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = 0
    crosses: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    singly: ClassVar[bool] = False
    line: ClassVar[str] = "--"
    found_by: ClassVar[str] = "proof"

    @abstractmethod
    def find(self, search: Search) -> Found:
        """Finds the units of this kind in a model.

        Args:
            search: The model, its inputs, the sites that adapters know, and the sites of the kinds before this one.

        Returns:
            The sites of this kind by name, and the modules that were left alone with the reasons.
        """

    def gate(self, site: Site, hooks: GateHooks) -> None:
        """Attaches the gates of a site to a model. By default they multiply the input of each consumer.

        Args:
            site: The site.
            hooks: Attaches gates to modules of the model.
        """
        for path, axis in zip(site.consumers, site.axes, strict=True):
            hooks.on_input(path, axis)
        for path in site.norms:
            hooks.on_norm(path)

    def cut(self, model: nn.Module, site: Site, keep: Sequence[int], by_cuts: Callable[[], None]) -> None:
        """Removes units from a model in place. By default it calls `by_cuts`.

        Args:
            model: The model, which is changed.
            site: The site. It fits the model, which was checked.
            keep: Indices of the units that stay.
            by_cuts: Cuts every tensor of `site.cuts` and updates the attributes. If no unit stays, it replaces the
                module.
        """
        by_cuts()

    @property
    def about(self) -> str:
        """One sentence that explains the kind: the first line of the docstring."""
        return (type(self).__doc__ or self.plural).strip().splitlines()[0]

    def many(self, count: int) -> str:
        """Returns a number of units as text: "1 head", "3 heads"."""
        return f"{count:,} {self.name if count == 1 else self.plural}"


def kinds_of(sites: Iterable[Any]) -> list[UnitKind]:
    """Returns the kinds of these sites without repeats, in the order of the sites."""
    return [unit_kind(name) for name in dict.fromkeys(site.kind for site in sites)]


def unit_kind(name: str) -> UnitKind:
    """Returns the unit kind of a name. Raises PlanError, with the known names, if there is none."""
    kind: UnitKind = named("unit_kinds", name, "kind of unit", PlanError)
    return kind
