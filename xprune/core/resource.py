"""Resources: what a budget can limit, such as MACs and parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from xprune.core.costs import Cost
from xprune.core.registry import named, registered
from xprune.core.site import Site
from xprune.errors import BudgetError


class Resource(ABC):
    """One resource. A subclass sets the attributes and measures a model; the rest has defaults.

    The first line of its docstring explains it to readers of a report.

    Attributes:
        name: As in `Budget(resources={name: share})`.
        label: The name in tables and plots.
        unit: Of the numbers, "" for plain counts.
        always: True where it is measured in every run; False where only a budget that asks for it pays for measuring.

    Example:
        See `docs/adapters.md` for a resource that counts the activations of a forward pass.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    unit: ClassVar[str] = ""
    always: ClassVar[bool] = True

    @abstractmethod
    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """Measures a model and each of its modules.

        Args:
            model: A copy, which may be on the meta device.
            example_inputs: What the model is called with, on any device.
            samples: How many samples they hold.

        Returns:
            Path of a module -> its cost with all that is in it; "" -> that of the whole model. What costs nothing may
            be left out. What depends on the inputs is of one sample.
        """

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """What of the cost grows with both axes of a tensor that two sites cut, one along each. Here: nothing.

        Args:
            by_module: What `by_module` gave.
            path: Of the tensor.
            tensor: The tensor; None where it went with its module.
        """
        return 0.0

    def cost(
        self,
        sites: Sequence[Site],
        example_inputs: Any,
        samples: int,
        with_counts: Callable[[Sequence[int]], nn.Module],
    ) -> Cost | None:
        """How the cost depends on the units that each site keeps.

        Args:
            sites: The sites.
            example_inputs: What the model is called with.
            samples: How many samples they hold.
            with_counts: Gives a copy of the model with so many units kept at each site.

        Returns:
            Here None: it is linear in the units of each site and in pairs of sites that meet, and a few recounts tell
            the factors. A recount of one more model proves that it is.
        """
        return None

    @property
    def about(self) -> str:
        """What it is, in one sentence."""
        return (type(self).__doc__ or self.label).strip().splitlines()[0]


def resource(name: str) -> Resource:
    """The resource of that name; BudgetError, with the names that are known, where there is none."""
    found: Resource = named("resources", name, "resource", BudgetError)
    return found


def measured_resources(more: Sequence[str] = ()) -> list[Resource]:
    """The resources that every run measures, in the order of their table, and those asked for by name."""
    asked = {name: resource(name) for name in more}
    return [kind for name, kind in registered("resources").items() if kind.always or name in asked]
