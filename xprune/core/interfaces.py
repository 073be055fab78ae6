"""Base classes of plug-ins (Criterion, Selection, Adapter), and the values that plug-ins take and return."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.core.site import Site, StreamParts
from xprune.core.task import Task
from xprune.errors import DataError


@dataclass(frozen=True)
class Context:
    """The inputs of a criterion or a selection: the model, the data and the settings of the run.

    xprune makes it. A plug-in reads it.

    Args:
        model: A copy of the dense model that shares the caller's weights. It is in eval mode, and its weights are
            frozen. A selection that
            trains weights gets another copy, see `Selection.updates`.
        example_inputs: Inputs of a few samples, in the form in which `Task.unpack` returns inputs.
        task: Reads batches and computes the loss.
        loader: Training batches. None if the caller gave none.
        seed: Seed of every random choice.
        checkpoint_dir: Folder where a long run may keep its state. None if nothing is to be kept.
        budget: The budget that the plan will have to meet, for criteria that learn at it. None if it is not known yet.
        updates: Number of updates of the weights that the run plans for fine-tuning. A selection may take some of them.
        batch: (inputs, targets) of the loader's first batch. None if it has not been read yet: call `first`.
        costs: The measured costs of the units. None if they have not been measured yet: call `measured`.

    Example:
        >>> import torch, xprune
        >>> loader = [(torch.randn(4, 8), torch.tensor([0, 1, 1, 0]))]
        >>> context = Context(nn.Linear(8, 2), torch.randn(2, 8), xprune.Classification(), loader)
        >>> inputs, labels = context.first("my-criterion")
        >>> context.task.forward(context.model, inputs).shape
        torch.Size([4, 2])
    """

    model: nn.Module
    example_inputs: Any
    task: Task
    loader: Iterable[Any] | None = None
    seed: int = 0
    checkpoint_dir: Path | None = None
    budget: Budget | None = None
    updates: int = 0
    batch: tuple[Any, Any] | None = None
    costs: Costs | None = None

    def data(self, who: str) -> Iterable[Any]:
        """Returns the loader, for a plug-in that cannot do without data.

        Args:
            who: Name of the plug-in, for the error message.

        Raises:
            DataError: There is no loader.
        """
        if self.loader is None:
            raise DataError(f"{who} looks at data: give a loader of batches, for example loader=train_loader.")
        return self.loader

    def first(self, who: str) -> tuple[Any, Any]:
        """Returns (inputs, targets) of the loader's first batch. Reads the batch only if the run has not read it.

        Args:
            who: Name of the plug-in, for the error message.

        Raises:
            DataError: There is no loader.
        """
        if self.batch is not None:
            return self.batch
        return self.task.unpack(next(iter(self.data(who))))

    def measured(self, sites: Sequence[Site]) -> Costs | None:
        """Returns the costs of these sites if the run has measured them, else None."""
        # Costs of other sites would be silently wrong: counts are looked up by position.
        return self.costs if self.costs is not None and self.costs.sites == tuple(sites) else None


@dataclass(frozen=True)
class Selected:
    """The result of a selection that also trained the weights.

    A selection that leaves the weights alone returns the `Plan` without this class.

    Args:
        plan: The units that stay.
        model: The model to cut, with the weights that were trained. None: the model that was given.
        updates: Number of updates that these weights have had. Fine-tuning takes so many less.

    Example:
        >>> site = Site("mlp", "neuron", size=4, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> selected = Selected(Plan((site,), ((0, 2),)), model=nn.Linear(4, 4), updates=100)
        >>> selected.plan.counts, selected.updates
        ((2,), 100)
    """

    plan: Plan
    model: nn.Module | None = None
    updates: int = 0


class Criterion(ABC):
    """Computes a score for each unit. Units with higher scores stay.

    A subclass is a frozen dataclass. Its fields are its settings, which users give on the command line as
    `--criterion name,field=value`.

    Attributes:
        name: Name of the criterion, as in `Pruner(criterion=name)`.
        at_budget: True if the scores depend on `context.budget`. `compare` then computes them for each budget. False if
            one set of scores serves all budgets.

    Example:
        >>> import torch, xprune
        >>> @dataclass(frozen=True)
        ... class FirstUnits(Criterion):
        ...     name = "first-units"
        ...
        ...     def score(self, context, sites):
        ...         values = tuple(-torch.arange(float(site.size)) for site in sites)
        ...         return xprune.Scores(tuple(sites), values, self.name)
        >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> sites = xprune.find_sites(model, torch.randn(2, 5, 8))
        >>> xprune.score(model, sites, criterion=FirstUnits()).values
        (tensor([-0., -1.]),)
    """

    name: ClassVar[str]
    at_budget: ClassVar[bool] = False

    @abstractmethod
    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Scores the units of the sites.

        The same `context.seed` has to give the same scores. `context.model` has to be as it was when the method
        returns.

        Args:
            context: The model, the data and the settings.
            sites: The sites whose units are scored.

        Returns:
            A finite score for each unit. Units with higher scores stay. `Scores.scale` says how sites compare.
        """


class Selection(ABC):
    """Turns scores into a plan that meets the budget.

    A subclass is a frozen dataclass whose fields are its settings.

    Attributes:
        name: Name of the selection, as in `Pruner(selection=name)`.

    Example:
        >>> import xprune
        >>> @dataclass(frozen=True)
        ... class FromTheLast(Selection):
        ...     name = "from-the-last"
        ...
        ...     def select(self, context, scores, costs, budget):
        ...         kept = [site.size for site in costs.sites]
        ...         for index in reversed(range(len(kept))):
        ...             while kept[index] > budget.floor(costs.sites[index]) and any(
        ...                 cost.total(kept) > allowed for _, cost, allowed in costs.limits(budget)
        ...             ):
        ...                 kept[index] -= 1
        ...         return Plan(costs.sites, tuple(tuple(range(count)) for count in kept))
        >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> costs = Costs((site,), {"macs": xprune.LinearCost(base=0.0, fixed=(0.0,), unit=(10.0,))})
        >>> FromTheLast().select(None, None, costs, Budget(macs=0.5)).counts
        (8,)
    """

    name: ClassVar[str]

    def updates(self, available: int) -> int:
        """Returns how many updates of the weights `select` takes from fine-tuning. By default 0: it trains no weights.

        If it takes any, `context.model` is a copy that owns its weights, and `select` may train them.

        Args:
            available: Number of updates that the run plans for fine-tuning.
        """
        return 0

    @abstractmethod
    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan | Selected:
        """Chooses the units that stay.

        The plan has to cost at most the budget. It should use 99 % of the budget, or so much that one more unit exceeds
        it. `xprune.testing.check_selection` checks both.

        Args:
            context: The model, the data and the settings.
            scores: The scores of all units.
            costs: The costs of the same sites.
            budget: What the pruned model may cost.

        Returns:
            The plan. If weights were trained: `Selected`, with the plan, `context.model` and the number of updates.

        Raises:
            BudgetError: The budget cannot be met. The message states the least fraction.
        """


class Adapter(ABC):
    """Knows one class of attentions or MLPs: which units its modules have, and what shrinks when units are removed.

    Most classes need no subclass: `Units` describes them as data. Write a subclass where `Units` cannot say it.

    Attributes:
        name: Name in the table ADAPTERS. Saved plans hold it.
        classes: Qualified names of the classes that are served. They are compared as text with every base class of a
            module, so an adapter does not import the library.
        pruned: Class that a module gets after units were removed. It is needed if the forward of the module's own class
            assumes the dense number of units. None: the module keeps its class.
        gated: Class that a module gets while gates are attached. It is needed if the forward of the module's own class
            does not call the consumer as a module: then no hook can gate the input. None: the module keeps its class.
        removed: Class of the module that replaces this one when all units are removed. It is called with (consumer,
            module). None: `Removed`, which returns the bias of the consumer. If it is the class `pruned`, the module is
            not replaced and runs without any units.
        joins: True if the module adds its input to its output. It then reads and writes the same stream.

    Example:
        >>> from xprune import Cut
        >>> class TwoLayers(Adapter):
        ...     name = "two-layers"
        ...     classes = ("torch.nn.modules.container.Sequential",)
        ...
        ...     def site(self, path, module):
        ...         last = f"{path}.2"
        ...         cuts = (Cut(f"{path}.0.weight", 0), Cut(f"{path}.0.bias", 0), Cut(f"{last}.weight", 1))
        ...         size = module[0].out_features
        ...         return Site(path, "neuron", size, 1, (last,), cuts=cuts, module=path, adapter=self.name)
        >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> TwoLayers().serves(mlp), TwoLayers().site("blocks.0.mlp", mlp).size
        (True, 16)
    """

    name: str
    classes: tuple[str, ...]
    pruned: type[nn.Module] | None = None
    gated: type[nn.Module] | None = None
    removed: type[nn.Module] | None = None
    joins: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Accepts `along_stream`, the name of `stream_parts` before 0.2, with a DeprecationWarning."""
        super().__init_subclass__(**kwargs)
        if "along_stream" in vars(cls):
            cls.stream_parts = vars(cls)["along_stream"]  # type: ignore[method-assign]
            # Level 3 is the line of the class: between it and this line there is the metaclass.
            warnings.warn(
                f"{cls.__name__}.along_stream is now called stream_parts: rename the method. The next release drops "
                "the "
                "old name.",
                DeprecationWarning,
                stacklevel=3,
            )

    @property
    def empties(self) -> bool:
        """True if the module stays when all its units are removed, since its pruned forward runs without any."""
        return self.removed is not None and self.removed is self.pruned

    def serves(self, module: nn.Module) -> bool:
        """Returns True if the module is of one of `classes` or inherits from one."""
        return any(f"{base.__module__}.{base.__qualname__}" in self.classes for base in type(module).__mro__)

    @abstractmethod
    def site(self, path: str, module: nn.Module) -> Site | None:
        """Describes the units of one module.

        Args:
            path: Path of the module in the model.
            module: A module that this adapter serves. It must not be changed.

        Returns:
            The site, with every cut. Its paths are paths in the model. None if this module cannot be pruned.
        """

    def stream_parts(self, path: str, module: nn.Module) -> StreamParts | None:
        """Describes the parts of one module that shrink with the residual stream, so that channels can be removed.

        Args:
            path: Path of the module in the model.
            module: A module that this adapter serves.

        Returns:
            The parts. By default None: they are not known. `find_sites` then guesses them from the shapes of the
            tensors and proves its guess.
        """
        return None

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """Completes a cut on one module, after its tensors are cut and its attributes are updated.

        By default the module gets the class `pruned`, if there is one.

        Args:
            module: The module, which is changed.
            site: The site as it was before the cut. It is the module's own site, or a stream that `stream_parts` knows.
            keep: Indices of the units of the site that stay.
        """
        if self.pruned is not None:
            module.__class__ = self.pruned
