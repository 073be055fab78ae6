"""The stages of pruning, in order: find sites, score, select, cut, fine-tune, measure.

`Run` holds one model with its data, and does work that several stages need only once. `score` and `select` are the same
stages as functions, for callers who want one stage and no run.
"""

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
    """One dense model with its data, and the stages of pruning as methods.

    Several stages need the same things: the first batch of each loader, the sites, their costs, the metrics of the
    dense model. A run reads, finds or measures each of these once, when it is needed for the first time, and keeps it.
    So one run can serve several criteria and budgets. `Pruner`, `compare` and the demo use a run.

    Each stage returns an immutable value, which the next stage takes: scores, then a plan, then a model.

    Args:
        model: The dense model. It is not changed.
        train: Batches that the criterion, the selection and fine-tuning look at or learn from.
        held_out: Batches on which loss and metric are measured. None: the training batches. The metrics then say that
            they were measured on training data.
        task: Reads a batch, and computes the loss and the metric. None: classification of (inputs, labels).
        sites: The sites that may lose units. None: those that `find_sites` finds with the first training batch.
        units: Unit kinds to look for. None: those that `find_sites` looks for by default. Used only if `sites` is None.
        exclude: Patterns of names of sites that keep all units. Used only if `sites` is None.
        latency: True: `measure` also times a forward pass on the first training batch. False: it does not.
        resources: Names of resources that budgets will limit, in addition to those that every run measures.

    Attributes:
        model: The dense model, without wrappers such as `torch.compile`.
        task: The task. It knows the sample axis of the inputs.
        first: Inputs and targets of the first training batch.
        first_held_out: Inputs and targets of the first held-out batch. The same as `first` if nothing is held out.
        example: A few samples of the first training batch, on which sites, costs and the proof are computed.
        timed: True if `measure` times a forward pass, else False.

    Raises:
        DataError: A loader is empty, can be read only once, or does not fit the task.
        ModelError: The model cannot be pruned in its present form, for example inside a PEFT wrapper.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> from xprune.pipeline import Run
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
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
        # Axis 0 of the inputs may be tokens. The first batch shows it, and the task is then a copy that knows the axis.
        self.task, self.first = task_and_first_batch(train, task, self.model)
        self.first_held_out = first_batch(held_out, self.task) if held_out is not None else self.first
        self.example = example_of(self.task, *self.first)

    @property
    def data(self) -> Iterable[Any]:
        """The batches that loss and metric are measured on: the held-out ones, or the training ones without these."""
        return self.train if self.held_out is None else self.held_out

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites that may lose units: those that were given, or those that `find_sites` finds."""
        if self._sites is not None:
            return tuple(self._sites)
        axis = batch_axis_of(self.task)
        return find_sites(self.model, self.example, units=self._units, exclude=self._exclude, batch_axis=axis)

    @cached_property
    def costs(self) -> Costs:
        """The costs of the units of all sites, for each resource that is measured."""
        return measure_costs(self.model, self.sites, self.example, self._resources, batch_axis=batch_axis_of(self.task))

    @cached_property
    def dense(self) -> Metrics:
        """The metrics of the dense model."""
        return self.measure(self.model)

    def updates(self, settings: Finetune | None) -> int:
        """Returns how many updates of the weights fine-tuning makes, which is one for each batch of each epoch.

        Args:
            settings: Settings of fine-tuning. None: there is no fine-tuning, and the number is 0.

        Raises:
            DataError: The training loader has no length, or is empty.
        """
        return settings.epochs * length(self.train, "fine-tuning") if settings is not None else 0

    def check(self, budget: Budget, selection: str | Selection = "global", settings: Finetune | None = None) -> None:
        """Checks settings that `select` would refuse, before the criterion and fine-tuning use hours.

        Args:
            budget: The budget to come.
            selection: A name from `xprune.SELECTIONS`, or an instance.
            settings: Settings of the fine-tuning to come. None: there is none.

        Raises:
            BudgetError: The budget cannot be met.
            PluginError: The selection is unknown, or takes more updates than fine-tuning has.
            DataError: There is fine-tuning, but the training loader has no length.
        """
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
        """Scores the units of all sites.

        Args:
            criterion: A name from `xprune.CRITERIA`, or an instance.
            budget: The budget that the plan will have to meet, for criteria that learn at a budget. None: not known.
            seed: Seeds all random choices.
            checkpoint_dir: Folder where a criterion that learns saves its progress. None: nothing is saved.

        Returns:
            A score for each unit of `sites`. Units with higher scores stay.

        Raises:
            PluginError: The criterion is unknown, or returns something that is not the scores of these sites.
        """
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
        """Selects the units that stay.

        Args:
            scores: Scores of the units of this run's sites.
            budget: How much the pruned model may cost.
            selection: A name from `xprune.SELECTIONS`, or an instance.
            settings: Settings of the fine-tuning to come. A selection that trains weights may use some of its updates.
                None: there is no fine-tuning, so no weights can be trained.
            seed: Seeds all random choices.
            checkpoint_dir: Folder where a selection that learns saves its progress. None: nothing is saved.

        Returns:
            A plan that meets the budget. If the selection trained weights, also the trained model and the number of
            updates that it used.

        Raises:
            BudgetError: The budget cannot be met.
            PluginError: The selection is unknown, or returns a plan that does not fit the sites or the budget.
        """
        chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        context = replace(self._context(seed, checkpoint_dir), updates=self.updates(settings))
        return _selected(self.model, context, scores, self.costs, budget, chosen)

    def cut(self, selected: Selected) -> nn.Module:
        """Removes the units that the plan does not keep. This is surgery, with its proof: see `xprune.apply`.

        Args:
            selected: The result of `select`.

        Returns:
            The pruned model, in eval mode. The weights that it is cut from are those that the selection trained, if
            any, else those of the dense model.
        """
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
        """Fine-tunes a copy of a model on the training batches. See `xprune.finetune`.

        Args:
            model: The pruned model. It is not changed.
            settings: Settings of fine-tuning. If they distil, the teacher is the dense model of this run.
            taken: Updates that the selection has used already. Fine-tuning makes this number of updates less.
            seed: Seeds the order of the batches, dropout and drop path.
            checkpoint_dir: Folder where the progress is saved. None: nothing is saved.

        Returns:
            The trained copy, in eval mode.
        """
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
        """Measures loss, metric and costs of a model.

        Args:
            model: The model to measure. It is not changed.
            like: Metrics of a model whose weights have the same shapes. Its costs and latency are copied instead of
                measured. None: they are measured.

        Returns:
            The metrics, on the held-out batches, or on the training batches if there are no held-out ones.
        """
        found = evaluate(model, self.data, task=self.task, data="training" if self.held_out is None else "validation")
        if like is not None:
            return replace(found, **{name: getattr(like, name) for name in ("macs", "params", "resources", *_LATENCY)})
        axis = batch_axis_of(self.task)
        costs: dict[str, Any] = count_resources(model, self.example, self._resources, batch_axis=axis)
        if self.timed:
            # Latency is measured on the whole first batch, not on the few samples of the example.
            inputs, targets = self.first
            costs |= dict(zip(_LATENCY, (latency(model, inputs), self.task.size(targets)), strict=True))
        return found.with_costs(**costs)

    def _context(self, seed: int, checkpoint_dir: Path | None) -> Context:
        """Returns the context of a criterion or a selection: a copy of the model, the data, and the costs."""
        # The copy shares the caller's weights. Gates and hooks are attached to the copy, so the caller sees none.
        copy = shared_copy(self.model, requires_grad=False).to(accelerator().device)
        context = Context(copy, self.example, self.task, self.train, seed, checkpoint_dir, batch=self.first)
        return replace(context, costs=self.costs)


_LATENCY = ("latency_ms", "latency_rows")
"""Fields of `Metrics` that hold the measured time and the number of samples that it was measured with."""


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
    """Makes the context for a criterion or a selection that is used outside a `Run`.

    Args:
        model: The dense model. It is not changed.
        loader: Training batches. None: there are none.
        example_inputs: A few samples in the form that the model is called with. None: the first samples of the loader's
            first batch, which is then read. None without a loader: there are none.
        task: Reads a batch, and computes the loss. None: classification of (inputs, labels).
        seed: Seeds all random choices.
        checkpoint_dir: Folder where loops save their progress. None: nothing is saved.
        budget: The budget that the plan will have to meet. None: not known.
        updates: Updates of the weights that a selection may use.

    Returns:
        The context. Its model is a copy that shares the weights, on the device that Accelerate chooses.

    Raises:
        DataError: The loader is empty, can be read only once, or does not fit the task.
    """
    task, batch = task or Classification(), None
    if loader is not None and example_inputs is None:
        task, batch = task_and_first_batch(loader, task, unwrap(model))
        example_inputs = example_of(task, *batch)
    elif loader is not None:
        # Reading a batch may take long, so it is not read without need. An iterator is refused all the same.
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
    """Scores the units of sites with a criterion.

    Args:
        model: The dense model. It is not changed.
        sites: The sites to score, as `find_sites` returns them.
        loader: Training batches, for criteria that look at data. None: there are none.
        criterion: A name from `xprune.CRITERIA`, also with settings such as "xpruner,steps=200", or an instance.
        budget: The budget that the plan will have to meet, for criteria that learn at a budget. None: not known.
        task: Reads a batch, and computes the loss. None: classification of (inputs, labels).
        seed: Seeds all random choices.
        checkpoint_dir: Folder where a criterion that learns saves its progress. A run that was killed continues from
            there. None: nothing is saved.

    Returns:
        A score for each unit. Units with higher scores stay.

    Raises:
        PluginError: The criterion is unknown, or returns something that is not the scores of these sites.
        DataError: The criterion needs data and there is no loader, or the loader does not fit the task.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> sites = xprune.find_sites(model, torch.randn(3, 4, 8))
        >>> scores = xprune.score(model, sites, criterion="magnitude")
        >>> [(site.kind, len(values)) for site, values in zip(scores.sites, scores.values)]
        [('head', 2), ('neuron', 16)]
    """
    chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
    context = make_context(model, loader, task=task, seed=seed, checkpoint_dir=checkpoint_dir, budget=budget)
    return _scored(chosen, context, tuple(sites))


def _scored(criterion: Criterion, context: Context, sites: Sequence[Site]) -> Scores:
    """Returns the scores of a criterion. Raises PluginError if they are not scores of these sites."""
    found: Any = criterion.score(context, sites)
    if not isinstance(found, Scores):
        raise PluginError(
            f"{criterion.name}: score gave a {type(found).__name__}, wanted xprune.Scores. Criterion.score has to "
            "return Scores(sites, values, name)."
        )
    if found.sites != tuple(sites):
        raise PluginError(
            f"{criterion.name}: scores are of {len(found.sites)} sites, asked were these {len(sites)}. Score the sites "
            "that are given, all of them and in their order."
        )
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
    """Selects the units that stay, such that the pruned model meets a budget.

    Some selections train the weights together with the plan. A plan holds no weights, so this function refuses such a
    selection. `Pruner` and `xprune.pipeline.Run` accept it, because they keep the trained weights.

    Args:
        model: The dense model. It is not changed.
        scores: Scores of the units of its sites, as `score` returns them.
        budget: How much the pruned model may cost.
        selection: A name from `xprune.SELECTIONS`, also with settings such as "learned,steps=100", or an instance.
        example_inputs: Inputs on which costs such as MACs are counted. None: the first samples of the loader.
        loader: Training batches, for selections that learn. None: there are none.
        task: Reads a batch, and computes the loss. None: classification of (inputs, labels).
        seed: Seeds all random choices.
        checkpoint_dir: Folder where a selection that learns saves its progress. A run that was killed continues from
            there. None: nothing is saved.

    Returns:
        The plan: the indices of the units that stay at each site.

    Raises:
        BudgetError: The budget cannot be met, or both `example_inputs` and `loader` are None.
        PluginError: The selection is unknown, trains weights, or returns a plan that misses the budget.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> model, inputs = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), torch.randn(3, 4, 8)
        >>> scores = xprune.score(model, xprune.find_sites(model, inputs), criterion="random")
        >>> plan = xprune.select(model, scores, xprune.Budget(macs=0.5), "uniform", example_inputs=inputs)
        >>> plan.counts  # of 2 heads and 16 neurons
        (1, 8)
    """
    if example_inputs is None and loader is None:
        raise BudgetError("select counts the MACs of a forward pass: give it inputs with example_inputs= or loader=.")
    chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
    # With no updates to use, a selection that insists on training weights says so here or raises.
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
    """Raises PluginError if the plan has other sites than the scores, or costs more than the budget allows."""
    if plan.sites != costs.sites:
        raise PluginError(
            f"{selection.name}: the plan is of other sites than the scores. Return a plan of scores.sites, all of them "
            "and in their order."
        )
    for name, cost, allowed in costs.limits(budget):
        spent = cost.total(plan.counts)
        # The margin is for rounding: costs are sums of floating-point numbers.
        if spent > allowed * (1 + 1e-6):
            raise PluginError(
                f"{selection.name}: the plan costs {spent:.0f} {name}, and the budget allows {allowed:.0f}. A "
                "selection has to meet the budget: xprune.testing.check_selection tests it."
            )


def _weights_would_be_lost(selection: Selection) -> PluginError:
    """Returns the error for a selection that trains weights, in a function that returns the plan only."""
    return PluginError(
        f"{selection.name}: the weights learn along with the plan, but select returns only the plan. Use "
        "xprune.Pruner, which keeps the weights, or settings that leave the weights unchanged."
    )


def _selected(
    model: nn.Module, context: Context, scores: Scores, costs: Costs, budget: Budget, chosen: Selection
) -> Selected:
    """Runs a selection, and checks its plan against the sites and the budget.

    Args:
        model: The dense model. It is not changed.
        context: The context of the selection.
        scores: Scores of all units.
        costs: Costs of the sites of these scores.
        budget: The budget to meet.
        chosen: The selection.

    Returns:
        The plan. If the selection trained weights, also the trained model, on the device of `model`.
    """
    updates = chosen.updates(context.updates)
    dense = context.model
    if updates:
        # The context's model shares the caller's weights. A selection that trains weights gets a separate copy.
        trained = unshare(shared_copy(unwrap(model)), model).to(reference_device(dense))
        context = replace(context, model=trained)
    found: Any = chosen.select(context, scores, costs, budget)
    if not isinstance(found, (Plan, Selected)):
        raise PluginError(
            f"{chosen.name}: select gave a {type(found).__name__}, wanted xprune.Plan, or xprune.Selected if the "
            "selection trained weights. Return one of these from Selection.select."
        )
    if isinstance(found, Plan):
        # An older selection returns only the plan. Its method `updates` still says how many updates it used.
        found = Selected(found, context.model if updates else None, updates)
    _check_budget(chosen, found.plan, costs, budget)
    axis = batch_axis_of(context.task)
    check_allocation(dense, found.plan, costs, budget, context.example_inputs, batch_axis=axis)
    if found.model is None:
        return found
    return replace(found, model=found.model.to(reference_device(model)))
