"""Unit kinds: what the units of a site are (heads, neurons, channels), and all that depends on it."""

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
    """What a unit kind found in a model.

    Attributes:
        sites: Site by its name.
        left: For each module that has such units but gives no site, its path -> why, in words.
        closed: Modules that later kinds do not look into: path -> a site that says what the module reads and writes.
    """

    sites: Mapping[str, Site] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    closed: Mapping[str, Site] = field(default_factory=dict)


@dataclass(frozen=True)
class Search(Found):
    """A search for sites so far: the model, and what the kinds before have found.

    Attributes:
        model: The model. It must not be changed: work on a copy.
        example_inputs: What the model is called with, on the model's device.
    """

    model: nn.Module = field(default_factory=nn.Module)
    example_inputs: Any = None

    def after(self, found: Found) -> "Search":
        """The search with what one more kind has found."""
        return replace(
            self,
            sites={**self.sites, **found.sites},
            left={**self.left, **found.left},
            closed={**self.closed, **found.closed},
        )


class GateHooks(Protocol):
    """Where the gates of one site can be attached. Each gate has to be reached in every forward pass."""

    def on_input(self, path: str, axis: int) -> None:
        """Multiplies the input of the module at `path` by the gates, which lie along `axis`."""

    def on_output(self, path: str, axis: int) -> None:
        """Multiplies the first output of the module at `path` by the gates, which lie along `axis`."""

    def on_norm(self, path: str) -> None:
        """Makes the norm at `path` take its statistics over the units that are kept."""


class UnitKind(ABC):
    """One kind of unit. A subclass sets the attributes and says how its units are found; the rest has defaults.

    Attributes:
        name: As in `Site.kind` and in `find_sites(units=...)`.
        plural: The name of many, for messages, tables and legends.
        by_default: True where `find_sites` looks for these units unasked.
        needs: Names of the kinds that are looked for before this one.
        order: Kinds are cut in ascending order. A kind that cuts into modules which another kind removes comes first.
        crosses: True where the units cut tensors of other sites along another axis, as the channels of a residual
            stream do. Costs then have pairs of sites, and the adapter of each module that is crossed resizes it.
        attends: True where the units are heads of an attention, so that attention maps can be drawn of them.
        singly: True where reports draw each unit; False where there are too many, and bars and bins are drawn.
        line: Style of the line of a site in plots, as matplotlib says it.
        found_by: What found a site that no adapter knows, for tables.

    Example:
        See `docs/adapters.md` for a kind that takes neurons in pairs.
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
        """Finds the units of this kind.

        Args:
            search: The model, its inputs, and the sites of the kinds before, those that adapters know among them.

        Returns:
            Sites of this kind, each under its name, and why other modules gave none.
        """

    def gate(self, site: Site, hooks: GateHooks) -> None:
        """Attaches the gates of a site. Here: a factor on the input of each consumer."""
        for path, axis in zip(site.consumers, site.axes, strict=True):
            hooks.on_input(path, axis)
        for path in site.norms:
            hooks.on_norm(path)

    def cut(self, model: nn.Module, site: Site, keep: Sequence[int], by_cuts: Callable[[], None]) -> None:
        """Removes units from a model in place. Here: as the cuts of the site say.

        Args:
            model: The model to cut.
            site: The site, which fits the model.
            keep: Indices of the units that stay.
            by_cuts: Cuts every tensor of `site.cuts`; where no unit stays, replaces the module by what is left of it.
        """
        by_cuts()

    @property
    def about(self) -> str:
        """What it is, in one sentence."""
        return (type(self).__doc__ or self.plural).strip().splitlines()[0]

    def many(self, count: int) -> str:
        """A number of units in words: "1 head", "3 heads"."""
        return f"{count:,} {self.name if count == 1 else self.plural}"


def kinds_of(sites: Iterable[Any]) -> list[UnitKind]:
    """The kinds of these sites, in the order in which they first come."""
    return [unit_kind(name) for name in dict.fromkeys(site.kind for site in sites)]


def unit_kind(name: str) -> UnitKind:
    """The kind of that name; PlanError, with the names that are known, where there is none."""
    kind: UnitKind = named("unit_kinds", name, "kind of unit", PlanError)
    return kind
