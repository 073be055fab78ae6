"""The class `OnTarget`: the latency table of a model on a target, and the measured times of its pruned models."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.costs import Costs
from xprune.core.latency_table import LatencyTable
from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.core.target import Target
from xprune.core.times import Times
from xprune.costs.profile import measure_table
from xprune.costs.profile_cache import ProfileCache
from xprune.costs.stopwatch import Stopwatch
from xprune.modules.copies import shared_copy
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.cut import remove_units
from xprune.training.runtime import from_main

SECONDS = 10.0
"""How long the dense model and a pruned model are measured in turn, in seconds. At least `ROUNDS` rounds are made."""

ROUNDS = 7


class OnTarget:
    """Predicts and measures how long a model takes on a target with fewer units.

    The table is measured, or read from the file of the target, when it is needed for the first time.

    Args:
        model: The dense model. It is not changed.
        inputs: One batch. The target may ask for another number of samples.
        target: The target. None means `Target()`: as the model is, with the batch as it is.
        batch_axis: The axis of the inputs along which samples lie. None means that it is found.
        told: A function that is called with (measured groups, all groups) while a table is measured.

    Example:
        >>> import torch, xprune
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)), nn.Linear(8, 2))
        >>> x = torch.randn(2, 8)
        >>> sites = xprune.find_sites(model, x)
        >>> on_target = OnTarget(model, x, Target(batch=16, threads=1))
        >>> costs = on_target.costs(xprune.measure_costs(model, sites, x))
        >>> sorted(costs.by_resource)
        ['latency', 'macs', 'params']
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        target: Target | None = None,
        batch_axis: int | None = None,
        told: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.target = target or Target()
        self._model, self._inputs, self._axis, self._told = model, inputs, batch_axis, told
        self._tables: dict[tuple[Site, ...], LatencyTable] = {}

    @property
    def here(self) -> bool:
        """True if this computer is the target, so that pruned models can be measured. False for a table of a file."""
        return self.target.table is None

    @cached_property
    def watch(self) -> Stopwatch:
        """The stopwatch of the target. It is made at the first access, which raises TargetError for a bad target."""
        return Stopwatch(self.target, self._model, self._inputs, self._axis)

    @undisturbed()
    def table(self, sites: Sequence[Site]) -> LatencyTable:
        """Returns the latency table of some sites. It is measured once, or read from the file of the target."""
        key = tuple(sites)
        if key not in self._tables:
            self._tables[key] = from_main(lambda: self._table(sites))
        return self._tables[key]

    def _table(self, sites: Sequence[Site]) -> LatencyTable:
        """Measures the latency table of some sites, or reads it from the file of the target."""
        if self.target.table is not None:
            return LatencyTable.read(self.target.table)
        return measure_table(self._model, sites, self.watch, cache=ProfileCache.of_user(), told=self._told)

    def costs(self, costs: Costs) -> Costs:
        """Returns the same costs together with the latency of the same sites."""
        latency = self.table(costs.sites).cost(costs.sites)
        return replace(costs, by_resource={**costs.by_resource, "latency": latency})

    @undisturbed()
    def times(self, plan: Plan) -> Times:
        """Measures the dense model and the model that a plan leaves, in turn. See `Stopwatch.compare`."""
        pruned = remove_units(shared_copy(self._model), plan, ADAPTERS)
        return from_main(lambda: self.watch.compare(pruned, SECONDS, ROUNDS))
