"""The class `UnitKind`: a kind of unit, such as heads, and how units of this kind are found, gated and cut."""

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
    """The result of a search for the units of one kind. `UnitKind.find` returns it.

    Args:
        sites: The sites that were found, by their names.
        left: The reason for each module that was left alone, by the path of the module. Such a module has units of this
            kind but gives no site.
        closed: Modules that the search for later kinds does not look into, by their paths. Each has a site that
            describes it. The first cut of this site has to be a tensor that reads the residual stream. `axes[0]` of
            this site is the feature axis of the module's output.

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

    `find_sites` starts a search with the sites that adapters describe. Then it calls `UnitKind.find` of one unit kind
    after the other.

    Args:
        sites: The sites that were found so far, by their names.
        left: The reason for each module that was left alone, by the path of the module.
        closed: Modules that the search for later kinds does not look into, see `Found`.
        model: The model. A unit kind must not change it, and works on a copy.
        example_inputs: Inputs of the model, on the model's device.
        record: What discovery saw in one forward pass of the model, see `xprune.discovery.watch.Record`. None if it has
            not looked yet.

    Example:
        >>> import torch
        >>> search = Search(model=nn.Linear(4, 4), example_inputs=torch.zeros(2, 4))
        >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> list(search.after(Found({site.name: site})).sites)
        ['mlp']
    """

    model: nn.Module = field(default_factory=nn.Module)
    example_inputs: Any = None
    record: Any = None

    def after(self, found: Found) -> "Search":
        """Returns a new search to which the results for one more kind are added."""
        return replace(
            self,
            sites={**self.sites, **found.sites},
            left={**self.left, **found.left},
            closed={**self.closed, **found.closed},
        )


class GateHooks(Protocol):
    """Attaches the gates of one site to a model. `UnitKind.gate` gets an object with these methods.

    Every module that a gate is attached to has to run in every forward pass. If a module does not run, a GateError is
    raised at the end of the forward pass.
    """

    def on_input(self, path: str, axis: int) -> None:
        """Multiplies the input of the module at `path` by the gates. `axis` of the input holds the units."""

    def on_output(self, path: str, axis: int) -> None:
        """Multiplies the first tensor in the output of the module at `path` by the gates, along its axis `axis`."""

    def on_norm(self, path: str) -> None:
        """Makes the norm layer at `path` compute its statistics over the kept units only."""


class UnitKind(ABC):
    """Base class of unit kinds. It says how units of one kind are found, gated and cut, and how reports show them.

    A subclass sets the attributes and implements `find`. It may override the other methods. Reports show the first line
    of the subclass's docstring to explain the kind.

    Attributes:
        name: The name in the table `xprune.UNIT_KINDS`, as in `Site.kind` and `find_sites(units=[name])`.
        plural: The name of several units, for messages, tables and legends.
        by_default: True if `find_sites` looks for these units when the caller gives no `units=`. False if a caller has
            to ask for them.
        needs: The names of the kinds that have to be found before this kind.
        order: The place of this kind in surgery. Kinds with a lower number are cut first. If a kind cuts tensors of
            modules which another kind may replace, it needs the lower number.
        crosses: True if the units also cut tensors of other sites, along another axis. The channels of a residual
            stream do this. The costs then contain pairs of sites, and the adapter of every module that is cut resizes
            the module. False if the units cut only tensors of their own site.
        attends: True if the units are heads of an attention. Reports can then draw attention maps for them. False if
            not.
        singly: True if reports draw each unit. False if there are too many units for that. Reports then draw bars and
            bins.
        line: The line style of a site of this kind in plots, in the notation of matplotlib.
        found_by: The text that tables show for the way in which a site was found, if no adapter describes it.

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
            search: The model and its inputs, together with the sites that adapters describe and the sites of the kinds
                that came before.

        Returns:
            The sites of this kind, and the modules that were left alone with the reasons.
        """

    def gate(self, site: Site, hooks: GateHooks) -> None:
        """Attaches the gates of a site to a model.

        This implementation multiplies the input of each consumer of the site by the gates. It also attaches the gates
        to the norm layers of the site.

        Args:
            site: The site.
            hooks: An object whose methods attach gates to modules of the model.
        """
        for path, axis in zip(site.consumers, site.axes, strict=True):
            hooks.on_input(path, axis)
        for path in site.norms:
            hooks.on_norm(path)

    def cut(self, model: nn.Module, site: Site, keep: Sequence[int], by_cuts: Callable[[], None]) -> None:
        """Removes units of one site from a model. It changes the model.

        This implementation calls `by_cuts` and does nothing else. A subclass may do more before or after the call.

        Args:
            model: The model. It is changed.
            site: The site. It was checked before that the site fits the model.
            keep: The indices of the units that stay.
            by_cuts: A function that cuts every tensor of `site.cuts` and updates the attributes. If no unit stays, it
                replaces the module.
        """
        by_cuts()

    @property
    def about(self) -> str:
        """One sentence that explains the kind: the first line of the docstring of its class."""
        return (type(self).__doc__ or self.plural).strip().splitlines()[0]

    def many(self, count: int) -> str:
        """Returns a number of units as text, such as "1 head" or "3 heads"."""
        return f"{count:,} {self.name if count == 1 else self.plural}"


def kinds_of(sites: Iterable[Any]) -> list[UnitKind]:
    """Returns the unit kinds of some sites. Each kind occurs once, in the order in which the sites mention it."""
    return [unit_kind(name) for name in dict.fromkeys(site.kind for site in sites)]


def unit_kind(name: str) -> UnitKind:
    """Returns the unit kind with this name. Raises PlanError if there is none. The message lists the known names."""
    kind: UnitKind = named("unit_kinds", name, "kind of unit", PlanError)
    return kind
