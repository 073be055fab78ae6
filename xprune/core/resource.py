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
    """Something that a model costs and a budget can limit, such as MACs or parameters.

    A subclass sets the attributes and gives `by_module`. The other methods have defaults. Reports show the first line
    of the subclass's docstring as an explanation.

    Attributes:
        name: Name in the table RESOURCES, as in `Budget(resources={name: 0.5})`.
        label: Name in tables and plots.
        unit: Unit of the numbers. "" for counts.
        always: True if every run measures it. False if it is measured only when a budget limits it.

    Example:
        >>> class Tensors(Resource):
        ...     '''Number of parameter tensors.'''
        ...
        ...     name, label, always = "tensors", "tensors", False
        ...
        ...     def by_module(self, model, example_inputs, samples):
        ...         return {path: len(list(module.parameters())) for path, module in model.named_modules()}
        >>> Tensors().by_module(nn.Sequential(nn.Linear(2, 2)), None, 1)
        {'': 2, '0': 2}
        >>> Tensors().about
        'Number of parameter tensors.'
    """

    name: ClassVar[str]
    label: ClassVar[str]
    unit: ClassVar[str] = ""
    always: ClassVar[bool] = True

    @abstractmethod
    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """Measures a model and each of its modules.

        Args:
            model: A copy of the model. It may be on the meta device, where tensors have shapes and no values.
            example_inputs: Inputs of the model, on any device.
            samples: Number of samples in `example_inputs`.

        Returns:
            For the path of each module, its cost with everything in it. "" is the path of the whole model. Modules that
            cost nothing may be left out. A cost that depends on the inputs is the cost of one sample.
        """

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """Returns the part of the cost that grows with the product of two axes of a tensor.

        It is called for tensors that two sites cut along different axes: two streams, or two sites without a stream.

        Args:
            by_module: What `by_module` returned for the same model.
            path: Path of the tensor.
            tensor: The tensor. None if it was removed together with its module.

        Returns:
            The cost. By default 0: the cost does not depend on tensors.
        """
        return 0.0

    def cost(
        self,
        sites: Sequence[Site],
        example_inputs: Any,
        samples: int,
        with_counts: Callable[[Sequence[int]], nn.Module],
    ) -> Cost | None:
        """Returns how the cost depends on the number of units that each site keeps.

        Override it for a resource whose cost is not linear in the units, such as a measured latency.

        Args:
            sites: The sites.
            example_inputs: Inputs of the model.
            samples: Number of samples in `example_inputs`.
            with_counts: Returns a copy of the model in which each site keeps the given number of units.

        Returns:
            The cost. By default None: the cost is linear in the units of each site, plus products of the units of two
            sites. `measure_costs` then finds the factors from a few smaller models, and checks them on one more.
        """
        return None

    @property
    def about(self) -> str:
        """One sentence that explains the resource: the first line of the docstring."""
        return (type(self).__doc__ or self.label).strip().splitlines()[0]


def resource(name: str) -> Resource:
    """Returns the resource of a name. Raises BudgetError, with the known names, if there is none."""
    found: Resource = named("resources", name, "resource", BudgetError)
    return found


def measured_resources(more: Sequence[str] = ()) -> list[Resource]:
    """Returns the resources to measure, in the order of their table.

    Args:
        more: Names of resources to measure beside those that every run measures.

    Raises:
        BudgetError: A name is not known.
    """
    # Every name is looked up first: an unknown one would otherwise be ignored below.
    asked = {name: resource(name) for name in more}
    return [kind for name, kind in registered("resources").items() if kind.always or name in asked]
