"""The pipeline: one `Run` that reads, finds and measures each thing once, and the stages score and select alone."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.interfaces import Context, Criterion, Selected, Selection
from xprune.core.plan import Plan
from xprune.core.record import Metrics
from xprune.core.registry import resolve
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.task import Task, batch_axis_of, example_of
from xprune.costs.count import count_resources
from xprune.costs.latency import latency
from xprune.costs.measure import check_allocation, measure_costs
from xprune.criteria import CRITERIA
from xprune.discovery.find import find_sites
from xprune.errors import BudgetError, PluginError
from xprune.modules.copies import reference_device, shared_copy, unshare, unwrap
from xprune.selections import SELECTIONS
from xprune.surgery.apply import apply
from xprune.tasks.classification import Classification
from xprune.training.evaluate import evaluate
from xprune.training.finetune import Finetune, finetune
from xprune.training.loop import length
from xprune.training.runtime import accelerator, check_loader, first_batch, stage, task_and_first_batch


class Run:
    """One model and its data, on their way from sites to a pruned model.

    What several stages need is read, found or measured once, when the first of them asks for it: the first batch of
    each loader, the sites, their costs, the dense model's figures. `Pruner`, `compare` and the demo are thin over it.
    The stages are methods, and each hands on an immutable value.

    Args:
        model: What to prune. It is not changed.
        train: Batches that scores, thresholds and weights learn from.
        held_out: Batches that figures are measured on. None: the training batches, and the figures say so.
        task: How to read a batch, and the loss. None: classification of (inputs, labels).
        sites: What may be pruned. None: what `find_sites` finds on the first training batch.
        units: Kinds of unit to look for, where `sites` is None.
        exclude: Patterns of site names to leave alone, where `sites` is None.
        latency: Time the dense and the pruned model, once each.
        resources: Names of resources that budgets will limit, beside those that every run measures.

    Raises:
        DataError: A loader is empty, can be read only once, or does not fit the task.

    Example:
        >>> import timm, torch, xprune
        >>> from xprune.pipeline import Run
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=3)
        >>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
        >>> run = Run(model, batches, latency=False)
        >>> budget = xprune.Budget(macs=0.5)
        >>> selected = run.select(run.score("magnitude", budget), budget)
        >>> run.measure(run.cut(selected)).macs <= 0.5 * run.dense.macs
        True
    """

    def __init__(
        self,
        model: nn.Module,
        train: Iterable[Any],
        held_out: Iterable[Any] | None = None,
        *,
        task: Task | None = None,
        sites: Sequence[Site] | None = None,
        units: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        latency: bool = True,
        resources: Sequence[str] = (),
    ) -> None:
        self.model, self.train, self.held_out, self.timed = unwrap(model), train, held_out, latency
        task = task or Classification()
        self._sites, self._units, self._exclude, self._resources = sites, units, exclude, tuple(resources)
        self.task, self.first = task_and_first_batch(train, task, self.model)
        self.first_held_out = first_batch(held_out, self.task) if held_out is not None else self.first
        self.example = example_of(self.task, *self.first)

    @property
    def data(self) -> Iterable[Any]:
        """What figures are measured on."""
        return self.train if self.held_out is None else self.held_out

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """What may be pruned."""
        if self._sites is not None:
            return tuple(self._sites)
        axis = batch_axis_of(self.task)
        return find_sites(self.model, self.example, units=self._units, exclude=self._exclude, batch_axis=axis)

    @cached_property
    def costs(self) -> Costs:
        """What the units of the sites cost."""
        return measure_costs(self.model, self.sites, self.example, self._resources, batch_axis=batch_axis_of(self.task))

    @cached_property
    def dense(self) -> Metrics:
        """Figures of the model that was given."""
        return self.measure(self.model)

    def updates(self, settings: Finetune | None) -> int:
        """Updates of the weights that fine-tuning with these settings takes. None: no fine-tuning, 0."""
        return settings.epochs * length(self.train, "fine-tuning") if settings is not None else 0

    def check(self, budget: Budget, selection: str | Selection = "global", settings: Finetune | None = None) -> None:
        """Raises, before any costly stage, what `select` would: BudgetError and PluginError."""
        chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        chosen.updates(self.updates(settings))
        self.costs.limits(budget)

    @stage()
    def score(
        self,
        criterion: str | Criterion = "xpruner",
        budget: Budget | None = None,
        *,
        seed: int = 0,
        checkpoint_dir: Path | None = None,
    ) -> Scores:
        """Scores of the units of all sites. Raises PluginError for an unknown criterion."""
        chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
        return _scored(chosen, replace(self._context(seed, checkpoint_dir), budget=budget), self.sites)

    @stage()
    def select(
        self,
        scores: Scores,
        budget: Budget,
        selection: str | Selection = "global",
        settings: Finetune | None = None,
        *,
        seed: int = 0,
        checkpoint_dir: Path | None = None,
    ) -> Selected:
        """A plan that meets the budget, and the weights that learned along with it, if any.

        Args:
            scores: Of this run's sites.
            budget: What the pruned model may cost.
            selection: A name from SELECTIONS, or an instance.
            settings: Of the fine-tuning to come, whose updates the selection may take some of.
            seed: Of every random choice.
            checkpoint_dir: Where a selection that learns keeps its state.
        """
        chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        context = replace(self._context(seed, checkpoint_dir), updates=self.updates(settings))
        return _selected(self.model, context, scores, self.costs, budget, chosen)

    def cut(self, selected: Selected) -> nn.Module:
        """The smaller model that the plan leaves, in eval mode."""
        return apply(self.model if selected.model is None else selected.model, selected.plan, self.example)

    def finetune(
        self,
        model: nn.Module,
        settings: Finetune,
        *,
        taken: int = 0,
        seed: int = 0,
        checkpoint_dir: Path | None = None,
    ) -> nn.Module:
        """A trained copy of the model; where the settings distil, from the dense model. See `xprune.finetune`."""
        return finetune(
            model,
            self.train,
            settings,
            teacher=self.model if settings.distill else None,
            task=self.task,
            seed=seed,
            checkpoint_dir=checkpoint_dir,
            taken=taken,
        )

    def measure(self, model: nn.Module, like: Metrics | None = None) -> Metrics:
        """Figures of a model on the held-out data.

        Args:
            model: What to measure.
            like: Figures of a model of the same shapes. Its costs are taken over. None: they are measured.
        """
        found = evaluate(model, self.data, task=self.task, data="training" if self.held_out is None else "validation")
        if like is not None:
            return replace(found, **{name: getattr(like, name) for name in ("macs", "params", "resources", *_LATENCY)})
        axis = batch_axis_of(self.task)
        costs: dict[str, Any] = count_resources(model, self.example, self._resources, batch_axis=axis)
        if self.timed:
            inputs, targets = self.first
            costs |= dict(zip(_LATENCY, (latency(model, inputs), self.task.size(targets)), strict=True))
        return found.with_costs(**costs)

    def _context(self, seed: int, checkpoint_dir: Path | None) -> Context:
        """What criteria and selections look at."""
        copy = shared_copy(self.model, requires_grad=False).to(accelerator().device)
        context = Context(copy, self.example, self.task, self.train, seed, checkpoint_dir, batch=self.first)
        return replace(context, costs=self.costs)


_LATENCY = ("latency_ms", "latency_rows")


@stage()
def make_context(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    budget: Budget | None = None,
    updates: int = 0,
) -> Context:
    """What a criterion or a selection looks at that is called alone.

    Without example inputs they are the first rows of the loader's first batch, which is then read.
    """
    task, batch = task or Classification(), None
    if loader is not None and example_inputs is None:
        task, batch = task_and_first_batch(loader, task, unwrap(model))
        example_inputs = example_of(task, *batch)
    elif loader is not None:
        check_loader(loader)
    copy = shared_copy(unwrap(model), requires_grad=False).to(accelerator().device)
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    return Context(copy, example_inputs, task, loader, seed, folder, budget, updates, batch)


@stage()
def score(
    model: nn.Module,
    sites: Sequence[Site],
    loader: Iterable[Any] | None = None,
    criterion: str | Criterion = "xpruner",
    *,
    budget: Budget | None = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
) -> Scores:
    """Scores of the units of `sites`, by a criterion's name or an instance. The model is not changed.

    Args:
        model: The dense model.
        sites: What may be pruned.
        loader: Batches, for criteria that look at data.
        criterion: A name from CRITERIA, or an instance.
        budget: What the plan will have to meet, for criteria that learn at it.
        task: How to read a batch, and the loss. None: classification of (inputs, labels).
        seed: Of every random choice.
        checkpoint_dir: Where a criterion that learns keeps its state, so that a killed run goes on.

    Raises:
        PluginError: The criterion is not known.
        DataError: The loader does not fit.
    """
    chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
    context = make_context(model, loader, task=task, seed=seed, checkpoint_dir=checkpoint_dir, budget=budget)
    return _scored(chosen, context, tuple(sites))


def _scored(criterion: Criterion, context: Context, sites: Sequence[Site]) -> Scores:
    """What the criterion gives; PluginError where it is not what a criterion has to give."""
    found: Any = criterion.score(context, sites)
    if not isinstance(found, Scores):
        raise PluginError(f"{criterion.name}: score gave a {type(found).__name__}, wanted xprune.Scores.")
    if found.sites != tuple(sites):
        raise PluginError(f"{criterion.name}: scores are of {len(found.sites)} sites, asked were these {len(sites)}.")
    return found


@stage()
def select(
    model: nn.Module,
    scores: Scores,
    budget: Budget,
    selection: str | Selection = "global",
    *,
    example_inputs: Any = None,
    loader: Iterable[Any] | None = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
) -> Plan:
    """A plan that meets the budget, by a selection's name or an instance. The model is not changed.

    A plan holds no weights. So a selection whose weights learn along is refused here: `Pruner` and `pipeline.Run`
    carry its plan out on the weights that learned.

    Args:
        model: The dense model.
        scores: Of the units of its sites.
        budget: What the pruned model may cost.
        selection: A name from SELECTIONS, or an instance.
        example_inputs: What MACs are counted on. None: the first rows of the loader.
        loader: Batches, for selections that learn.
        task: How to read a batch, and the loss. None: classification of (inputs, labels).
        seed: Of every random choice.
        checkpoint_dir: Where a selection that learns keeps its state, so that a killed run goes on.

    Raises:
        BudgetError: The budget cannot be met, or there is nothing to count MACs on.
        PluginError: The selection is not known, or its weights learn along.
    """
    if example_inputs is None and loader is None:
        raise BudgetError("select counts the MACs of the real forward: give example_inputs= or loader=.")
    chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
    if chosen.updates(0):
        raise _weights_would_be_lost(chosen)
    context = make_context(
        model, loader, example_inputs=example_inputs, task=task, seed=seed, checkpoint_dir=checkpoint_dir
    )
    axis = batch_axis_of(context.task)
    costs = measure_costs(context.model, scores.sites, context.example_inputs, budget.shares, batch_axis=axis)
    found = _selected(model, replace(context, costs=costs), scores, costs, budget, chosen)
    if found.model is not None:
        raise _weights_would_be_lost(chosen)
    return found.plan


def _check_budget(selection: Selection, plan: Plan, costs: Costs, budget: Budget) -> None:
    """PluginError where the plan is of other sites or costs more than the budget allows."""
    if plan.sites != costs.sites:
        raise PluginError(f"{selection.name}: the plan is of other sites than the scores.")
    for name, cost, allowed in costs.limits(budget):
        spent = cost.total(plan.counts)
        if spent > allowed * (1 + 1e-6):
            raise PluginError(
                f"{selection.name}: the plan costs {spent:.0f} {name}, and the budget allows {allowed:.0f}. A "
                "selection has to meet the budget: xprune.testing.check_selection tests it."
            )


def _weights_would_be_lost(selection: Selection) -> PluginError:
    return PluginError(
        f"{selection.name}: its weights learn along with the plan, and select hands out the plan alone. Use "
        "xprune.Pruner, which keeps them, or a setting under which weights stay as they are."
    )


def _selected(
    model: nn.Module, context: Context, scores: Scores, costs: Costs, budget: Budget, chosen: Selection
) -> Selected:
    """What the selection decides, with weights that learned along on the device of the model that was given."""
    updates = chosen.updates(context.updates)
    dense = context.model
    if updates:
        trained = unshare(shared_copy(unwrap(model)), model).to(reference_device(dense))
        context = replace(context, model=trained)
    found: Any = chosen.select(context, scores, costs, budget)
    if not isinstance(found, (Plan, Selected)):
        raise PluginError(
            f"{chosen.name}: select gave a {type(found).__name__}, wanted xprune.Plan, or xprune.Selected where "
            "weights learned along."
        )
    if isinstance(found, Plan):  # a selection that says what it takes in `updates` alone
        found = Selected(found, context.model if updates else None, updates)
    _check_budget(chosen, found.plan, costs, budget)
    axis = batch_axis_of(context.task)
    check_allocation(dense, found.plan, costs, budget, context.example_inputs, batch_axis=axis)
    if found.model is None:
        return found
    return replace(found, model=found.model.to(reference_device(model)))
