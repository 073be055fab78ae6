"""The base classes of plug-ins (Criterion, Selection, Adapter), and the values that their methods get and return."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from xprune.core.budget import Budget
from xprune.core.checkpoint import Checkpoint
from xprune.core.costs import Costs
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.core.site import Site, StreamParts
from xprune.core.task import Task
from xprune.errors import DataError


@dataclass(frozen=True)
class Context:
    """The inputs of a criterion or a selection: the model, the data and the settings of the run.

    xprune creates a context and passes it to `Criterion.score` and `Selection.select`. A plug-in reads the fields and
    does not change them.

    Args:
        model: A copy of the dense model that shares the caller's weights. It is in eval mode, and its parameters need
            no gradient. A selection that trains weights gets a copy with separate weights instead, see
            `Selection.updates`.
        example_inputs: Inputs of a few samples, in the form in which `Task.unpack` returns inputs.
        task: Reads batches and computes the loss.
        loader: Training batches. None if the caller gave no loader.
        seed: The seed of every random choice.
        checkpoint_dir: The folder where a criterion or selection that learns may save its progress. None means that
            nothing is saved.
        budget: The budget that the plan will have to meet. A criterion that learns for one budget needs it. None if it
            is not known.
        updates: The number of gradient updates that the run plans for fine-tuning. A selection may use some of them to
            train weights.
        batch: (inputs, targets) of the loader's first batch. None if the batch was not read yet. Call `first` to get it
            in both cases.
        costs: The measured costs of the sites. None if they were not measured yet. Call `measured` to get them only if
            they fit your sites.
        checkpoint: How often progress is saved, and in which folder. None means every ten minutes in `checkpoint_dir`.

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
    checkpoint: Checkpoint | None = None

    @property
    def keeping(self) -> Checkpoint | None:
        """Where and how often progress is saved. None means that nothing is saved."""
        return self.checkpoint or Checkpoint.of(self.checkpoint_dir)

    def data(self, who: str) -> Iterable[Any]:
        """Returns the loader. A plug-in that needs data calls this method instead of reading `loader`.

        Args:
            who: The name of the plug-in. It is used in the error message.

        Raises:
            DataError: There is no loader. The message tells the user to give one.
        """
        if self.loader is None:
            raise DataError(f"{who} needs data: give a loader of batches, for example loader=train_loader.")
        return self.loader

    def first(self, who: str) -> tuple[Any, Any]:
        """Returns (inputs, targets) of the loader's first batch.

        If the run has read this batch already, the batch is not read again.

        Args:
            who: The name of the plug-in. It is used in the error message.

        Raises:
            DataError: There is no loader.
        """
        if self.batch is not None:
            return self.batch
        return self.task.unpack(next(iter(self.data(who))))

    def measured(self, sites: Sequence[Site]) -> Costs | None:
        """Returns the measured costs if they are the costs of exactly these sites, else None."""
        # Costs find a site by its position. So costs of other sites would give wrong numbers without an error.
        return self.costs if self.costs is not None and self.costs.sites == tuple(sites) else None


@dataclass(frozen=True)
class Selected:
    """The result of a selection that also trained the weights of the model.

    A selection that trains no weights returns only a `Plan`.

    Args:
        plan: The units that stay.
        model: The model with the trained weights, with all its units. Surgery cuts this model. None means that surgery
            cuts the model that the caller gave.
        updates: The number of gradient updates that trained these weights. Fine-tuning then makes this number of
            updates less.

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
    """Base class of criteria. A criterion computes a score for each unit, and units with higher scores stay.

    A subclass is a frozen dataclass. Its fields are the settings of the criterion. On the command line, a user sets
    them as in `--criterion name,field=value`.

    Attributes:
        name: The name of the criterion, as in `Pruner(criterion=name)`.
        at_budget: True if the scores depend on `context.budget`. `compare` then computes the scores again for each
            budget. False if the scores are the same for all budgets. See `budget_key`.
        needs: What `score` needs of the model. `prune_folder` has one block of the model in memory at a time, and so
            refuses a criterion that needs gradients. "nothing": only the sizes of the sites. "weights": only the
            tensors that the sites cut, and the scores of a site do not depend on other sites. `score` is then called
            once for each block. "forward": forwards of `context.model` without gradients. Hooks and gates work, but the
            criterion must not copy the model or read weights, since a layer has its weights only while it runs.
            "gradients": anything else. It is the default.

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
        >>> xprune.score(model, sites, criterion=FirstUnits()).values[0]
        tensor([-0., -1.])
    """

    name: ClassVar[str]
    at_budget: ClassVar[bool] = False
    needs: ClassVar[str] = "gradients"

    def budget_key(self, budget: Budget) -> str:
        """Returns what the scores read of a budget, as a text. Budgets with equal texts have equal scores.

        `compare` and `frontier` compute the scores once for all budgets with the same text. This implementation returns
        the name of the budget if `at_budget` is True, and "" if not. Override it if a setting decides whether the
        scores depend on the budget.
        """
        return budget.name if self.at_budget else ""

    def estimate(self, context: Context, sites: Sequence[Site]) -> float | None:
        """Estimates how long `score` will take, in seconds, without doing the work.

        `frontier` prints the estimate before it starts. This implementation returns None: it is not known. Override it
        if the work consists of many equal steps: measure a few of them.

        Args:
            context: The inputs that `score` will get.
            sites: The sites that `score` will get.
        """
        return None

    @abstractmethod
    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Computes the scores of the units of all sites.

        Two calls with the same `context.seed` have to return the same scores. The method may attach gates or hooks to
        `context.model`, and has to remove them before it returns.

        Args:
            context: The model, the data and the settings.
            sites: The sites whose units are scored.

        Returns:
            The scores, which hold one finite number for each unit. Units with higher scores stay. `Scores.scale` says
            whether scores of different sites can be compared.
        """


class Selection(ABC):
    """Base class of selections. A selection turns scores into a plan that meets the budget.

    A subclass is a frozen dataclass. Its fields are the settings of the selection.

    Attributes:
        name: The name of the selection, as in `Pruner(selection=name)`.

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
        """Returns how many of fine-tuning's gradient updates `select` will use to train weights.

        This implementation returns 0, which fits a selection that trains no weights. If a subclass returns more than 0,
        `context.model` in `select` is a copy with separate weights, and `select` may train them.

        Args:
            available: The number of gradient updates that the run plans for fine-tuning.
        """
        return 0

    @abstractmethod
    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan | Selected:
        """Chooses the units that stay.

        The cost of the plan must not exceed the budget, and should be close to it. It is close enough if the plan uses
        99 % of the allowed cost, or if one more unit would exceed the budget. `xprune.testing.check_selection` checks
        both.

        Args:
            context: The model, the data and the settings.
            scores: The scores of the units of all sites.
            costs: The costs of the same sites. They compute the cost of any plan.
            budget: How much the pruned model may cost.

        Returns:
            A `Plan`. If the selection trained weights, a `Selected` with the plan, `context.model` and the number of
            updates.

        Raises:
            BudgetError: No plan can meet the budget. The message says the smallest fraction that can be reached.
        """

    def again(self, context: Context, scores: Scores, costs: Costs, budget: Budget, before: Plan) -> Plan:
        """Chooses the units again for a budget that is a little larger or smaller, without training.

        A budget of the latency is met in several tries, see `xprune.costs.realised`. This implementation calls
        `select`. A selection that learns has to override it, and to use what it has learned in the first call.

        Args:
            context: As in `select`, with 0 updates.
            scores: As in `select`.
            costs: As in `select`.
            budget: The new budget.
            before: The plan that `select` has returned, with its `info`.
        """
        found = self.select(context, scores, costs, budget)
        return found.plan if isinstance(found, Selected) else found


class Adapter(ABC):
    """Base class of adapters. An adapter describes the units of one class of attentions or MLPs, so they can be cut.

    It says which tensors of a module shrink when units are removed. Most module classes need no subclass of this class:
    an instance of `xprune.Units` describes them. Write a subclass if `Units` cannot describe your module.

    Attributes:
        name: The name in the table `xprune.ADAPTERS`. Saved plans contain this name.
        classes: The full names of the module classes that the adapter serves, such as "timm.layers.mlp.Mlp". A module
            is served if its class, or a base class of its class, has one of these names. Names are compared as text, so
            an adapter does not import the library.
        pruned: The class that a module gets after units were removed. Give it if the forward of the module's class
            assumes the dense number of units. None means that the module keeps its class.
        gated: The class that a module gets while gates are attached. Give it if the forward of the module's class does
            not call the consumer as a module, because then a hook cannot gate the consumer's input. None means that the
            module keeps its class.
        removed: The class of the module that replaces a module of which all units are removed. It is called with
            (consumer, module). None means `xprune.modules.removed.Removed`, which returns the bias of the consumer. If
            `removed` is the same class as `pruned`, the module is not replaced, because its pruned forward works with
            zero units.
        joins: True if the forward of the module adds its input to its output. Such a module reads and writes the same
            stream. False if another module does the addition.

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
        """Accepts a subclass that defines `along_stream`, the name of `stream_parts` before 0.2, and warns."""
        super().__init_subclass__(**kwargs)
        if "along_stream" in vars(cls):
            cls.stream_parts = vars(cls)["along_stream"]  # type: ignore[method-assign]
            # The warning shows the line of the subclass. Level 2 would show a line of the metaclass, which calls this
            # method.
            warnings.warn(
                f"{cls.__name__}.along_stream is now called stream_parts: rename the method. The next release drops "
                "the old name.",
                DeprecationWarning,
                stacklevel=3,
            )

    @property
    def empties(self) -> bool:
        """True if a module stays in the model after all its units are removed, else False.

        It stays if its pruned forward works with zero units. `removed` is then the same class as `pruned`.
        """
        return self.removed is not None and self.removed is self.pruned

    def serves(self, module: nn.Module) -> bool:
        """Returns True if the class of the module, or one of its base classes, is in `classes`, else False."""
        return any(f"{base.__module__}.{base.__qualname__}" in self.classes for base in type(module).__mro__)

    @abstractmethod
    def site(self, path: str, module: nn.Module) -> Site | None:
        """Describes the units of one module as a site.

        `find_sites` calls this method for every module that the adapter serves.

        Args:
            path: The path of the module in the model.
            module: The module. The method must not change it.

        Returns:
            The site with every tensor that shrinks. All paths in the site are paths in the model, not in the module.
            None if this module cannot be pruned.
        """

    def stream_parts(self, path: str, module: nn.Module) -> StreamParts | None:
        """Describes the tensors of one module that shrink if channels of the residual stream are removed.

        `find_sites` calls this method when it looks for channels. A subclass may override it.

        Args:
            path: The path of the module in the model.
            module: A module that this adapter serves.

        Returns:
            The tensors that shrink, or None if the adapter does not know them. This implementation returns None.
            `find_sites` then derives the tensors from their shapes, and proves the result.
        """
        return None

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """Completes a cut of one module. Surgery calls it after it has cut the tensors and updated the attributes.

        This implementation gives the module the class `pruned`, if there is one. A subclass may also update other
        attributes that depend on the number of units.

        Args:
            module: The module. The method changes it.
            site: The site as it was before the cut. It is the site of this module, or a residual stream that this
                module reads or writes.
            keep: The indices of the units of the site that stay.
        """
        if self.pruned is not None:
            module.__class__ = self.pruned
