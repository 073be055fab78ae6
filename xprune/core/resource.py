"""The class `Resource`. A resource is something that a budget can limit, such as MACs and parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from xprune.core.costs import Cost
from xprune.core.registry import named, registered
from xprune.core.site import Site
from xprune.errors import BudgetError
from xprune.modules.part import Part


class Resource(ABC):
    """Base class of resources. A model needs an amount of a resource, such as MACs, and a budget can limit this amount.

    A subclass sets the attributes and implements `by_module`. It may override the other methods. Reports show the first
    line of the subclass's docstring to explain the resource.

    Attributes:
        name: The name in the table `xprune.RESOURCES`, as in `Budget(resources={name: 0.5})`.
        label: The name in tables and plots.
        unit: The unit of measurement, such as "ms". An empty string if the resource is a count.
        always: True if every run measures the resource. False if a run measures it only if its budget limits it.
        timed: True if the resource is a time. It is measured on the target of the budget, and differs a little from
            measurement to measurement. So the plan is corrected by the measured time of the pruned model.

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
    timed: ClassVar[bool] = False

    @abstractmethod
    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """Measures the cost of a model and of each of its modules.

        Args:
            model: A copy of the model. It may be on the meta device, where tensors have shapes and no values.
            example_inputs: Inputs of the model, on any device.
            samples: The number of samples in `example_inputs`.

        Returns:
            The cost of each module by its path. The cost of a module includes the modules inside it. The key "" holds
            the cost of the whole model. Modules with a cost of 0 may be left out. If the cost depends on the inputs, it
            is the cost for one sample.
        """

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """Returns the part of the cost that is caused by one tensor which two sites cut along different axes.

        This part of the cost grows with the product of the units that both sites keep. `measure_costs` calls this
        method if both sites are residual streams, or if none of them is.

        Args:
            by_module: The result of `by_module` for the same model.
            path: The path of the tensor.
            tensor: The tensor. None if it was removed together with its module.

        Returns:
            The cost. This implementation returns 0, which means that the cost does not depend on tensors.
        """
        return 0.0

    def of_part(self, by_module: Mapping[str, float], model: nn.Module, part: Part) -> float:
        """Returns the cost of a part of a model, such as the vision tower.

        `measure_costs` calls this method if the sites were found with `find_sites(inside=)`. This implementation adds
        up the costs of the outermost modules of the part. Override it if two modules can have a cost in common.

        Args:
            by_module: The result of `by_module` for the same model.
            model: The model.
            part: The part, which knows the paths of its modules.
        """
        return part.cost(model, by_module)

    def cost(
        self,
        sites: Sequence[Site],
        example_inputs: Any,
        samples: int,
        with_counts: Callable[[Sequence[int]], nn.Module],
    ) -> Cost | None:
        """Returns the cost as a function of the number of units that each site keeps, or None if it is linear.

        `measure_costs` calls this method. Override it if the cost is not linear in the units, as for a measured
        latency.

        Args:
            sites: The sites.
            example_inputs: Inputs of the model.
            samples: The number of samples in `example_inputs`.
            with_counts: A function. Called with one number for each site, it returns a copy of the model in which each
                site keeps that number of units.

        Returns:
            The cost. None, which this implementation returns, means that the cost can be written as a `LinearCost`.
            `measure_costs` then computes the coefficients from a few smaller models, and checks them on one more model.
        """
        return None

    @property
    def about(self) -> str:
        """One sentence that explains the resource: the first line of the docstring of its class."""
        return (type(self).__doc__ or self.label).strip().splitlines()[0]


def resource(name: str) -> Resource:
    """Returns the resource with this name. Raises BudgetError if there is none. The message lists the known names."""
    found: Resource = named("resources", name, "resource", BudgetError)
    return found


def measured_resources(more: Sequence[str] = ()) -> list[Resource]:
    """Returns the resources that a run has to measure, in the order of the table `xprune.RESOURCES`.

    They are the resources that every run measures, plus those in `more`.

    Args:
        more: Names of further resources.

    Raises:
        BudgetError: A name is not known.
    """
    # This line raises BudgetError for an unknown name. The list below would ignore it.
    asked = {name: resource(name) for name in more}
    return [kind for name, kind in registered("resources").items() if kind.always or name in asked]
