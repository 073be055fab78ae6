"""The stages of pruning, in order: find sites, score, select, cut, fine-tune, measure.

The class `Run` holds one model with its data, and has a method for each stage. It does work that several stages need
only once. The functions `score` and `select` do one stage without a `Run`.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from torch import nn

from xprune.core.budget import Budget
from xprune.core.checkpoint import Checkpoint
from xprune.core.costs import Costs
from xprune.core.coverage import Coverage
from xprune.core.interfaces import Context, Criterion, Selected, Selection
from xprune.core.latency_table import LatencyTable
from xprune.core.plan import Plan
from xprune.core.record import Metrics
from xprune.core.registry import resolve
from xprune.core.resource import resource
from xprune.core.scores import Scores
from xprune.core.site import Site, Sites
from xprune.core.target import Target
from xprune.core.task import Task, batch_axis_of, check_distillation, fitting_example_of
from xprune.costs.count import count_resources
from xprune.costs.measure import measure_costs
from xprune.costs.on_target import OnTarget
from xprune.costs.widths import rounded
from xprune.criteria import CRITERIA
from xprune.discovery.find import find_sites
from xprune.errors import BudgetError, ModelError, PluginError, TargetError
from xprune.modules.copies import shared_copy, unwrap
from xprune.modules.part import Part
from xprune.modules.refused import CUT, TRAIN, refuse, refuse_frozen
from xprune.selections import SELECTIONS
from xprune.selections.selecting import selected
from xprune.surgery.apply import apply
from xprune.tasks.classification import Classification
from xprune.training.evaluate import evaluate
from xprune.training.finetune import Finetune, finetune
from xprune.training.master import half_dtypes, in_float32, widen
from xprune.training.runtime import (
    accelerator,
    check_loader,
    first_batch,
    from_main,
    is_main_process,
    stage,
    task_and_first_batch,
)


class Run:
    """One dense model with its data, and the stages of pruning as methods.

    Several stages need the same things: the first batch of each loader, the sites, the costs of the sites, and the
    metrics of the dense model. A run gets each of these when it is needed for the first time, and stores it. So several
    criteria and budgets can share one run. `Pruner`, `compare` and the demo of the command line use a run.

    Each stage returns an immutable value, which is an argument of the next stage: first scores, then a plan, then a
    model.

    Args:
        model: The dense model. It is not changed.
        train: Training batches. The criterion, the selection and fine-tuning use them.
        held_out: Batches on which the loss and the metric are measured. None means that they are measured on the
            training batches. The metrics then say so.
        task: Reads batches and computes the loss and the metric. None means classification of (inputs, labels).
        sites: The sites that may lose units. None means the sites that `find_sites` finds with the first training
            batch.
        units: The unit kinds to find. None means the kinds that `find_sites` finds by default. This argument is used
            only if `sites` is None.
        exclude: Patterns of the names of sites that keep all units. This argument is used only if `sites` is None.
        inside: Patterns of the part of the model to prune, such as ["vision_model.*"], see `find_sites`. The rest of
            the model keeps all units. With `Budget(of="part")`, the budget is a fraction of the cost of this part. If
            you give `sites`, do not give `inside`: the part is then the one that the sites were found in.
        latency: If True, `measure` also measures the time of a forward pass on the first training batch. If False, it
            does not.
        resources: The names of resources that budgets will limit, in addition to those that every run measures.
        target: Where and how the models run when `measure` measures their time. `Target()` is the device and the dtype
            of the model, and the whole first training batch. The `table` of a target is not used here.

    Attributes:
        model: The dense model, taken out of wrappers such as `torch.compile`.
        task: The task. It knows the sample axis of the inputs.
        first: (inputs, targets) of the first training batch.
        first_held_out: (inputs, targets) of the first held-out batch. It is equal to `first` if there are no held-out
            batches.
        example: The inputs of a few samples of the first training batch. Sites, costs and the proof are computed with
            them.
        timed: True if `measure` measures the time of a forward pass, else False.
        target: Where and how the models run when their time is measured, as it was given.

    Raises:
        DataError: A loader is empty, can be read only once, or does not fit the task.
        ModelError: The model cannot be pruned in its present form, for example because PEFT has wrapped it. Or a
            pattern of `inside` matches no module. Or both `sites` and `inside` are given.

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
        inside: str | Sequence[str] = (),
        latency: bool = True,
        resources: Sequence[str] = (),
        target: Target = Target(),  # noqa: B008 - immutable
    ) -> None:
        self.model, self.train, self.held_out = unwrap(model), train, held_out
        self.timed, self.target = latency, target
        refuse(self.model, CUT)
        task = (task or Classification()).with_dense(self.model)
        self._sites, self._units, self._exclude, self._resources = sites, units, exclude, _not_timed(resources)
        self._targets: dict[Target, OnTarget] = {}
        if inside and sites is not None:
            raise ModelError(
                "sites= and inside= were both given, but the sites say already which part of the model is pruned. Give "
                "one of the two: inside= alone, or sites=find_sites(..., inside=...)."
            )
        # A pattern that matches no module is an error now, before any batch is read.
        self._inside = Part.of(self.model, inside).patterns if inside else ()
        self._told = False
        # Axis 0 of the inputs may hold tokens instead of samples. If the first batch shows this, the returned task is a
        # copy that knows the sample axis.
        self.task, self.first = task_and_first_batch(train, task, self.model)
        self.first_held_out = first_batch(held_out, self.task) if held_out is not None else self.first
        self.example = fitting_example_of(self.task, self.model, *self.first)

    @property
    def data(self) -> Iterable[Any]:
        """The batches that the loss and the metric are measured on: the held-out ones, or else the training batches."""
        return self.train if self.held_out is None else self.held_out

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites that may lose units.

        They are the sites that the constructor got. If it got none, `find_sites` finds them at the first access.
        """
        if self._sites is not None:
            return tuple(self._sites)
        axis = batch_axis_of(self.task)
        return find_sites(
            self.model,
            self.example,
            units=self._units,
            exclude=self._exclude,
            inside=self._inside,
            batch_axis=axis,
        )

    @property
    def inside(self) -> tuple[str, ...]:
        """The patterns of the part of the model that is pruned. Empty if it is the whole model."""
        return self._inside if self._sites is None else getattr(self._sites, "inside", ())

    @cached_property
    def costs(self) -> Costs:
        """The costs of the units of all sites, for each resource that this run measures.

        They are measured at the first access.
        """
        return measure_costs(
            self.model,
            self.sites,
            self.example,
            self._resources,
            batch_axis=batch_axis_of(self.task),
            inside=self.inside,
        )

    def costs_for(self, budget: Budget) -> Costs:
        """Returns the costs that a budget needs: `costs`, and the latency on its target if it limits the latency.

        The latency table of a target is measured once.

        Raises:
            TargetError: The target of the budget cannot be used.
        """
        return self.on_target(_target_of(budget)).costs(self.costs) if "latency" in budget.limited else self.costs

    def on_target(self, target: Target) -> OnTarget:
        """Returns what measures times on a target. Each target has its own, which is made once."""
        if target not in self._targets:
            # The time is measured for the whole first batch. `example` has too few samples for that.
            axis = batch_axis_of(self.task)
            self._targets[target] = OnTarget(self.model, self.first[0], target, axis, _tell_profile)
        return self._targets[target]

    @cached_property
    def coverage(self) -> Coverage:
        """The share of the model's MACs that the units cover, and the modules that were left alone.

        It is computed from `costs`. If the constructor got sites that are not a result of `find_sites`, nobody knows
        which modules were left alone.
        """
        found = self.sites if self._sites is None else self._sites
        return Coverage.of(self.costs, getattr(found, "left", None), self.inside)

    def tell_coverage(self) -> None:
        """Prints the coverage as one line. A second call prints nothing."""
        if not self._told and is_main_process():
            get_console().print(self.coverage.text, highlight=False, markup=False, soft_wrap=True)
        self._told = True

    @cached_property
    def dense(self) -> Metrics:
        """The metrics of the dense model. They are measured at the first access."""
        return self.measure(self.model)

    def updates(self, settings: Finetune | None) -> int:
        """Returns how many updates of the weights fine-tuning makes, see `Finetune.updates`.

        Args:
            settings: The settings of fine-tuning. None means that the run does not fine-tune. The result is then 0.

        Raises:
            DataError: The training loader is empty, or it has no length and `settings.steps` is None.
        """
        return settings.updates(self.train) if settings is not None else 0

    def check(self, budget: Budget, selection: str | Selection = "global", settings: Finetune | None = None) -> None:
        """Checks settings that `select` would refuse, so that the user learns it before hours of scoring.

        Args:
            budget: The budget that will be given to `select`.
            selection: The selection: a name from `xprune.SELECTIONS`, or an instance.
            settings: The settings of the fine-tuning that will follow. None means that the run does not fine-tune.

        Raises:
            BudgetError: No plan can meet the budget.
            PluginError: The selection is unknown, or needs more updates than fine-tuning makes.
            DataError: The run fine-tunes, but the training loader has no length, and `settings.steps` is None. Or it
                distils, and the task has no distillation.
            ModelError: The run fine-tunes, but the model cannot be trained, for example because all its weights are
                frozen.
        """
        if settings is not None:
            refuse(self.model, TRAIN)
            refuse_frozen(self.model)
        chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        chosen.updates(self.updates(settings))
        if settings is not None and settings.distill:
            check_distillation(self.task)
        costs = self.costs_for(budget)
        costs.limits(rounded(budget, costs, self.model))

    @stage()
    def score(
        self,
        criterion: str | Criterion = "xpruner",
        budget: Budget | None = None,
        *,
        seed: int = 0,
        checkpoint_dir: Path | Checkpoint | None = None,
    ) -> Scores:
        """Scores the units of all sites.

        Args:
            criterion: A name from `xprune.CRITERIA`, or an instance.
            budget: The budget that the plan will have to meet. Criteria that learn for one budget need it. None means
                that it is not known.
            seed: The seed of all random choices.
            checkpoint_dir: The folder where a criterion that learns saves its progress. None means that nothing is
                saved.

        Returns:
            The scores, which hold a number for each unit of `sites`. Units with higher scores stay.

        Raises:
            PluginError: The criterion is unknown, or does not return scores of exactly these sites.
        """
        chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
        return checked_scores(chosen, self._context_at(budget, seed, checkpoint_dir), self.sites)

    @stage()
    def estimate(
        self, criterion: str | Criterion = "xpruner", budget: Budget | None = None, *, seed: int = 0
    ) -> float | None:
        """Estimates how long `score` will take, in seconds, see `Criterion.estimate`. None if it is not known.

        Args:
            criterion: A name from `xprune.CRITERIA`, or an instance.
            budget: The budget that the plan will have to meet.
            seed: The seed of all random choices.
        """
        chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
        return chosen.estimate(self._context_at(budget, seed, None), self.sites)

    @stage()
    def select(
        self,
        scores: Scores,
        budget: Budget,
        selection: str | Selection = "global",
        settings: Finetune | None = None,
        *,
        seed: int = 0,
        checkpoint_dir: Path | Checkpoint | None = None,
    ) -> Selected:
        """Selects the units that stay.

        Args:
            scores: The scores of the units of this run's sites.
            budget: How much the pruned model may cost.
            selection: A name from `xprune.SELECTIONS`, or an instance.
            settings: The settings of the fine-tuning that will follow. A selection that trains weights may use some of
                its updates. None means that the run does not fine-tune, so the selection cannot train weights.
            seed: The seed of all random choices.
            checkpoint_dir: The folder where a selection that learns saves its progress. None means that nothing is
                saved.

        Returns:
            A `Selected` object. Its plan meets the budget. If the selection trained weights, the object also holds the
            trained model and the number of updates. If not, `model` is None and `updates` is 0.

        Raises:
            BudgetError: No plan can meet the budget.
            PluginError: The selection is unknown, or its plan does not fit the sites or the budget.
        """
        chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        costs = self.costs_for(budget)
        context = replace(self._context(seed, checkpoint_dir), updates=self.updates(settings), costs=costs)
        on_target = self.on_target(_target_of(budget)) if "latency" in budget.limited else None
        return selected(self.model, context, scores, costs, rounded(budget, costs, self.model), chosen, on_target)

    def cut(self, selected: Selected) -> nn.Module:
        """Removes the units that the plan does not keep. This is surgery with its proof, see `xprune.apply`.

        Args:
            selected: The result of `select`.

        Returns:
            The pruned model, in eval mode. It is cut from the model that the selection trained. If the selection
            trained no weights, it is cut from the dense model.
        """
        return apply(self.model if selected.model is None else selected.model, selected.plan, self.example)

    def finetune(
        self,
        model: nn.Module,
        settings: Finetune,
        *,
        taken: int = 0,
        seed: int = 0,
        checkpoint_dir: Path | Checkpoint | None = None,
    ) -> nn.Module:
        """Fine-tunes a copy of a model on the training batches. See `xprune.finetune`.

        Args:
            model: The pruned model. It is not changed.
            settings: The settings of fine-tuning. If they ask for distillation, the dense model of this run is the
                teacher.
            taken: The number of updates that the selection has used already. Fine-tuning makes this number of updates
                less.
            seed: The seed for the order of the batches, dropout and drop path.
            checkpoint_dir: The folder where fine-tuning saves its progress. None means that nothing is saved.

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
        """Measures the loss, the metric and the costs of a model.

        The loss and the metric are measured on the held-out batches, or on the training batches if there are no
        held-out ones. The time is measured on the first training batch. A pruned model and the dense model then run in
        turn, so that a busy computer slows both of them and their ratio stays right.

        Args:
            model: The model. It is not changed.
            like: The metrics of a model whose weights have the same shapes. The costs and the times are then copied
                from these metrics, because they are equal. None means that they are measured.

        Returns:
            The metrics of the model.
        """
        found = evaluate(model, self.data, task=self.task, data="training" if self.held_out is None else "validation")
        if like is not None:
            return replace(found, **{name: getattr(like, name) for name in ("macs", "params", "resources", *_TIMES)})
        axis = batch_axis_of(self.task)
        costs: dict[str, Any] = count_resources(model, self.example, self._resources, batch_axis=axis)
        found = found.with_costs(**costs)
        return replace(found, **self._times(model)) if self.timed else found

    def _times(self, model: nn.Module) -> dict[str, Any]:
        """Measures the time of a model, and that of the dense model in turn with it.

        Returns:
            The values of the fields `_TIMES` of `Metrics`, by name.
        """
        timing = self.on_target(replace(self.target, table=None))
        if unwrap(model) is self.model:
            target, times = from_main(lambda: (timing.watch.target, timing.watch.alone()))
            return {"latency_ms": times.median(0), "latency_rows": self._rows(target), "target": target}
        target, times = from_main(lambda: (timing.watch.target, timing.watch.compare(model)))
        found = (times.median(1), self._rows(target), times.ratio(0, 1), times.median(0), target)
        return dict(zip(_TIMES, found, strict=True))

    def _rows(self, target: Target) -> int:
        """Returns the number of samples in a forward pass on a target."""
        return target.batch or self.task.size(self.first[1])

    def _context_at(self, budget: Budget | None, seed: int, checkpoint_dir: Path | Checkpoint | None) -> Context:
        """Returns the context for a criterion that may learn for a budget, with the costs that the budget needs."""
        context = self._context(seed, checkpoint_dir)
        if budget is None:
            return context
        costs = self.costs_for(budget)
        return replace(context, budget=rounded(budget, costs, self.model), costs=costs)

    def _context(self, seed: int, checkpoint_dir: Path | Checkpoint | None) -> Context:
        """Returns the context for a criterion or a selection: a copy of the model, the data and the costs."""
        # Gates and hooks are attached to this copy and not to the caller's model. The copy shares the caller's weights.
        copy = _copy_to_score(self.model)
        where = Checkpoint.of(checkpoint_dir)
        folder = None if where is None else where.path
        context = Context(copy, self.example, self.task, self.train, seed, folder, checkpoint=where)
        return replace(context, batch=self.first, costs=self.costs)


_TIMES = ("latency_ms", "latency_rows", "speedup", "dense_ms", "target")
"""The fields of `Metrics` that tell of the measured time of a forward pass."""


@stage()
def make_context(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | Checkpoint | None = None,
    budget: Budget | None = None,
    updates: int = 0,
) -> Context:
    """Makes the context for a criterion or a selection that is used without a `Run`.

    Args:
        model: The dense model. It is not changed.
        loader: Training batches. None means that the criterion or selection gets no data.
        example_inputs: Inputs of a few samples. None means that they are taken from the first batch of the loader. If
            there is no loader, the context has no example inputs.
        task: Reads batches and computes the loss. None means classification of (inputs, labels).
        seed: The seed of all random choices.
        checkpoint_dir: The folder where a plug-in that learns saves its progress. None means that nothing is saved.
        budget: The budget that the plan will have to meet. None means that it is not known.
        updates: The number of updates that a selection may use to train weights.

    Returns:
        The context. Its model is a copy that shares the weights of `model`, unless Accelerate chooses another device
        than the model's.

    Raises:
        DataError: The loader is empty, can be read only once, or does not fit the task.
    """
    refuse(unwrap(model), CUT)
    task, batch = (task or Classification()).with_dense(unwrap(model)), None
    if loader is not None and example_inputs is None:
        task, batch = task_and_first_batch(loader, task, unwrap(model))
        example_inputs = fitting_example_of(task, unwrap(model), *batch)
    elif loader is not None:
        # No batch is read here, because it is not needed and may take long. But a loader that can be read only once is
        # refused.
        check_loader(loader)
    copy = _copy_to_score(unwrap(model))
    where = Checkpoint.of(checkpoint_dir)
    folder = None if where is None else where.path
    return Context(copy, example_inputs, task, loader, seed, folder, budget, updates, batch, checkpoint=where)


def _copy_to_score(model: nn.Module) -> nn.Module:
    """Returns a copy of a model on the device of Accelerate, for a criterion or a selection.

    The copy shares the weights of the model if it can. If the model holds float16, all half-precision tensors of the
    copy are float32, because gradients of float16 become 0 or infinite. bfloat16 has the range of float32, so a
    bfloat16 model stays as it is.
    """
    copy, runner = shared_copy(model, requires_grad=False), accelerator()
    # With FSDP, a criterion that computes with the model moves it to the device in parts.
    copy = copy if runner.is_fsdp2 else copy.to(runner.device)
    if torch.float16 in half_dtypes(copy).values():
        widen(copy)
        in_float32(copy)
    return copy


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
    checkpoint_dir: str | Path | Checkpoint | None = None,
) -> Scores:
    """Scores the units of some sites with a criterion.

    Args:
        model: The dense model. It is not changed.
        sites: The sites to score, as `find_sites` returns them. If they lie in a part of the model
            (`find_sites(inside=)`), the scores remember this part, so that `select` accepts a budget of the part.
        loader: Training batches, for criteria that use data. None means that there are no data.
        criterion: A name from `xprune.CRITERIA`, which may be followed by settings as in "xpruner,steps=200", or an
            instance.
        budget: The budget that the plan will have to meet. Criteria that learn for one budget need it. None means that
            it is not known.
        task: Reads batches and computes the loss. None means classification of (inputs, labels).
        seed: The seed of all random choices.
        checkpoint_dir: The folder where a criterion that learns saves its progress. If the program was killed, a second
            call with the same folder continues from there. None means that nothing is saved.

    Returns:
        The scores, which hold a number for each unit. Units with higher scores stay.

    Raises:
        PluginError: The criterion is unknown, or does not return scores of exactly these sites.
        DataError: The criterion needs data but there is no loader, or the loader does not fit the task.

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
    # `select` reads from the sites of the scores which part of the model they were looked for in.
    sites = sites if isinstance(sites, Sites) else tuple(sites)
    return replace(checked_scores(chosen, context, sites), sites=sites)


def checked_scores(criterion: Criterion, context: Context, sites: Sequence[Site]) -> Scores:
    """Calls a criterion and returns its scores. Raises PluginError if it does not return scores of these sites."""
    found: Any = criterion.score(context, sites)
    if not isinstance(found, Scores):
        raise PluginError(
            f"{criterion.name}: score returned a {type(found).__name__}, wanted xprune.Scores. Criterion.score has to "
            "return Scores(sites, values, name)."
        )
    if found.sites != tuple(sites):
        raise PluginError(
            f"{criterion.name}: the scores are for {len(found.sites)} sites that are not the {len(sites)} sites to "
            "score. Criterion.score has to score all the sites that it gets, in their order."
        )
    if found.note:
        warnings.warn(found.note, stacklevel=4)
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
    checkpoint_dir: str | Path | Checkpoint | None = None,
) -> Plan:
    """Selects the units that stay, so that the pruned model meets a budget.

    Some selections train the weights of the model together with the plan. This function returns only a plan, which
    holds no weights, so it refuses such a selection. `Pruner` and `xprune.pipeline.Run` accept it, because they keep
    the trained weights.

    Args:
        model: The dense model. It is not changed.
        scores: The scores of the model's units, as `score` returns them.
        budget: How much the pruned model may cost.
        selection: A name from `xprune.SELECTIONS`, which may be followed by settings as in "learned,steps=100", or an
            instance.
        example_inputs: Inputs with which costs such as MACs are counted. None means the first samples of the loader.
        loader: Training batches, for selections that learn. None means that there are no data.
        task: Reads batches and computes the loss. None means classification of (inputs, labels).
        seed: The seed of all random choices.
        checkpoint_dir: The folder where a selection that learns saves its progress. If the program was killed, a second
            call with the same folder continues from there. None means that nothing is saved.

    Returns:
        The plan, which holds the indices of the units that stay at each site.

    Raises:
        BudgetError: No plan can meet the budget, or both `example_inputs` and `loader` are None.
        PluginError: The selection is unknown, trains weights, or returns a plan that does not meet the budget.

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
    # No fine-tuning follows, so there are 0 updates to use. A selection that has to train weights raises an error or
    # returns more than 0.
    if chosen.updates(0):
        raise _weights_would_be_lost(chosen)
    context = make_context(
        model, loader, example_inputs=example_inputs, task=task, seed=seed, checkpoint_dir=checkpoint_dir
    )
    axis = batch_axis_of(context.task)
    counted = _not_timed(budget.limited)
    costs = measure_costs(context.model, scores.sites, context.example_inputs, counted, batch_axis=axis)
    on_target = None
    if "latency" in budget.limited:
        inputs = context.example_inputs if context.batch is None else context.batch[0]
        on_target = OnTarget(context.model, inputs, _target_of(budget), axis)
        costs = on_target.costs(costs)
    budget = rounded(budget, costs, context.model)
    found = selected(model, replace(context, costs=costs), scores, costs, budget, chosen, on_target)
    if found.model is not None:
        raise _weights_would_be_lost(chosen)
    return found.plan


@stage()
def profile(
    model: nn.Module,
    example_inputs: Any,
    target: Target | str | None = None,
    *,
    sites: Sequence[Site] | None = None,
    units: Sequence[str] | None = None,
    batch_axis: int | None = None,
) -> LatencyTable:
    """Measures how long a model takes on a target with fewer units at each site.

    Save the table with `table.save(FILE)`. On another computer, `Budget(latency=0.5, target=Target(table=FILE))` prunes
    for the computer where it was measured. For the computer where a run is, it is not needed: a run measures its own.

    Args:
        model: The dense model. It is not changed.
        example_inputs: One batch, with which the model is called.
        target: The device, the dtype, the batch and so on, as a `Target` or a text such as "batch=1,threads=2". None
            means the device and dtype of the model, and the batch as it is.
        sites: The sites. None means those that `find_sites` finds.
        units: The unit kinds to find. It is used only if `sites` is None.
        batch_axis: The axis of the inputs along which samples lie. None means that it is found.

    Returns:
        The table.

    Raises:
        TargetError: This computer does not have the target, or the model does not run on it.
        ModelError: The forward of the model fails.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)), nn.Linear(8, 2))
        >>> table = profile(model, torch.randn(4, 8), "batch=32,threads=1")
        Measuring the latency of 1 kind of module with fewer units, a few seconds each.
        >>> table.sites, table.curves[0].counts[-1]
        ((('0', 'neuron', 64),), 64)
    """
    target = Target.of(target) if isinstance(target, str) else target
    if target is not None and target.table is not None:
        raise TargetError(f"profile measures a table, but the target is the table {target.table!r}. Leave table= out.")
    if sites is None:
        sites = find_sites(model, example_inputs, units=units, batch_axis=batch_axis)
    return OnTarget(unwrap(model), example_inputs, target, batch_axis, _tell_profile).table(sites)


def _weights_would_be_lost(selection: Selection) -> PluginError:
    """Returns the error for a selection that trains weights in a call of `select`, which returns only the plan."""
    return PluginError(
        f"{selection.name}: this selection trains weights too, but select returns only the plan. Use xprune.Pruner, "
        "which keeps the weights, or settings with which the weights are not trained."
    )


def _target_of(budget: Budget) -> Target:
    """Returns the target of a budget. `Budget` has turned a text into a target."""
    return budget.target if isinstance(budget.target, Target) else Target()


def _not_timed(resources: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the resources that can be counted, in contrast to the latency, which is measured."""
    return tuple(name for name in resources if not resource(name).timed)


def _tell_profile(done: int, total: int) -> None:
    """Prints a line before the first measurement of a latency table. The measurement may take a minute."""
    if done == 0 and is_main_process():
        kinds = "1 kind of module" if total == 1 else f"{total} kinds of modules"
        text = f"Measuring the latency of {kinds} with fewer units, a few seconds each."
        get_console().print(text, highlight=False, markup=False, soft_wrap=True)
