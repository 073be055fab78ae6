"""What a plug-in author writes: Criterion, Selection, Adapter, one abstract method each; and what they are given."""

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
    """What a criterion or a selection may look at.

    Args:
        model: A copy of the structure that shares the caller's weights: eval mode, weights frozen.
        example_inputs: A few rows of real input, as the task unpacks them.
        task: How to read a batch, and the loss.
        loader: Training batches. None where the caller gave none.
        seed: Of every random choice.
        checkpoint_dir: Where a long run may keep its state. None for nowhere.
        budget: What the plan will have to meet, for criteria that learn at it. None where it is not known yet.
        updates: Updates of the weights that the run has for fine-tuning, of which a selection may take some.
        batch: (inputs, targets) of the loader's first batch, where the run has read it: see `first`.
        costs: What the units cost, where the run has measured it: see `measured`.
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
        """The loader; DataError naming `who` needs it where there is none."""
        if self.loader is None:
            raise DataError(f"{who} looks at data: give a loader of batches.")
        return self.loader

    def first(self, who: str) -> tuple[Any, Any]:
        """(inputs, targets) of the loader's first batch: what the run has read, or read now.

        Raises DataError, naming `who`, where there is no loader.
        """
        return self.batch if self.batch is not None else self.task.unpack(next(iter(self.data(who))))

    def measured(self, sites: Sequence[Site]) -> Costs | None:
        """What the units of these sites cost, where the run has measured it. None where it has not."""
        return self.costs if self.costs is not None and self.costs.sites == tuple(sites) else None


@dataclass(frozen=True)
class Selected:
    """What a selection decided.

    Args:
        plan: The units that stay.
        model: What to carry the plan out on, where weights learned along. None: the model that was given.
        updates: Updates that these weights have had. Fine-tuning takes as many less.
    """

    plan: Plan
    model: nn.Module | None = None
    updates: int = 0


class Criterion(ABC):
    """Scores units. A subclass is a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]
    at_budget: ClassVar[bool] = False
    """True where scores differ with `context.budget`."""

    @abstractmethod
    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """A score per unit, higher = keep. Leaves `context.model` as it was; deterministic under `context.seed`."""


class Selection(ABC):
    """Turns scores into a plan that meets a budget. A subclass is a frozen dataclass."""

    name: ClassVar[str]

    def updates(self, available: int) -> int:
        """Updates of the weights that `select` takes of those available for fine-tuning; 0: weights stay as they are.

        Where it takes any, `context.model` is a copy of its own, whose weights `select` may change.
        """
        return 0

    @abstractmethod
    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan | Selected:
        """A plan whose cost is at most the budget, and within 1 % of it or the cost of one unit.

        Returns:
            The plan. Where weights learned along: `Selected`, with the plan, `context.model` and the updates taken.

        Raises:
            BudgetError: The budget cannot be met. The message states the least that is reachable.
        """


class Adapter(ABC):
    """Knows one attention or MLP class: its units, and what shrinks with them. `Units` says most of them as data."""

    name: str
    classes: tuple[str, ...]
    """Qualified names of the classes served, compared with every base class of a module, so nothing is imported."""
    pruned: type[nn.Module] | None = None
    """The class that a module gets once units have gone, where its own forward assumes all of them; None: its own."""
    gated: type[nn.Module] | None = None
    """The class it has while gates are attached, where its own forward does not call the layer that units feed."""
    removed: type[nn.Module] | None = None
    """The class of what stands in its place once all units have gone, made from (layer, module).

    None: `Removed`, the bias of the layer. The class `pruned` itself: the module stays and runs without any units.
    """
    joins: bool = False
    """True where the module adds its input to what its units write: the stream it reads is the one it writes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Accepts the name that `stream_parts` had before 0.2, for one release."""
        super().__init_subclass__(**kwargs)
        if "along_stream" in vars(cls):
            cls.stream_parts = vars(cls)["along_stream"]  # type: ignore[method-assign]
            warnings.warn(
                f"{cls.__name__}.along_stream is now called stream_parts. The next release drops the old name.",
                DeprecationWarning,
                stacklevel=3,  # past the metaclass, to the line of the class
            )

    @property
    def empties(self) -> bool:
        """True where the module stays when all units have gone, since its pruned forward runs without any."""
        return self.removed is not None and self.removed is self.pruned

    def serves(self, module: nn.Module) -> bool:
        """True where the module is of one of `classes` or inherits from one."""
        return any(f"{base.__module__}.{base.__qualname__}" in self.classes for base in type(module).__mro__)

    @abstractmethod
    def site(self, path: str, module: nn.Module) -> Site | None:
        """The site of the module at `path`, or None where this one cannot be pruned. Every cut is declared in it."""

    def stream_parts(self, path: str, module: nn.Module) -> StreamParts | None:
        """What of the module lies along the residual stream; None, as here: not known, so that channels are refused."""
        return None

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """What is left to do on the module once its tensors are cut and its counts are set.

        site   as it was before the cut, of which the units `keep` are left: the module's own, or the channels of a
               stream that `stream_parts` knows of

        Here: the class whose forward fits.
        """
        if self.pruned is not None:
            module.__class__ = self.pruned
