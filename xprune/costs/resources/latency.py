"""The resource "latency": the time of a forward pass on a target."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from xprune.core.costs import Cost
from xprune.core.resource import Resource
from xprune.core.site import Site
from xprune.core.target import Target
from xprune.costs.profile import measure_table
from xprune.costs.profile_cache import ProfileCache
from xprune.costs.stopwatch import Stopwatch


class Latency(Resource):
    """The time of a forward pass of a batch, measured on the device where the model will run.

    A run measures it on the `target` of the budget. If `measure_costs` is asked for it, it is measured where the model
    is, with the example inputs as they are.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> Latency().by_module(model, torch.randn(3, 4), samples=3)[""] > 0
        True
    """

    name = "latency"
    label = "latency"
    unit = "ms"
    always = False
    timed: ClassVar[bool] = True

    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """Returns the time of the whole model, in milliseconds, under the path "". See Resource.by_module."""
        return {"": Stopwatch(Target(), model, example_inputs).alone(0.5).median(0)}

    def cost(
        self,
        sites: Sequence[Site],
        example_inputs: Any,
        samples: int,
        with_counts: Callable[[Sequence[int]], nn.Module],
    ) -> Cost:
        """Measures the times of all sites. See Resource.cost."""
        dense = with_counts([site.size for site in sites])
        table = measure_table(dense, sites, Stopwatch(Target(), dense, example_inputs), cache=ProfileCache.of_user())
        return table.cost(sites)
