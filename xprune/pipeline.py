"""The stages score and select, as functions over the tables of criteria and selections."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from xprune.core.budget import Budget
from xprune.core.interfaces import Context, Criterion, Selection
from xprune.core.plan import Plan
from xprune.core.registry import resolve
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.task import Task
from xprune.costs.measure import check_allocation, measure_costs
from xprune.criteria import CRITERIA
from xprune.errors import BudgetError
from xprune.modules.copies import alias, own, reference_device, unwrap
from xprune.selections import SELECTIONS
from xprune.tasks.classification import Classification
from xprune.training.runtime import accelerator, check_loader


def make_context(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    example_inputs: Any = None,
    task: Task | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    budget: Budget | None = None,
    updates: int = 0,
) -> Context:
    """What criteria and selections look at; without example inputs, the first two rows of the loader."""
    task = task or Classification()
    if loader is not None:
        first = check_loader(loader, task)
        example_inputs = task.example(first) if example_inputs is None else example_inputs
    copy = alias(unwrap(model), requires_grad=False).to(accelerator().device)
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    return Context(copy, example_inputs, task, loader, seed, folder, budget, updates)


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
    """Scores of the units of `sites`, by a criterion's name or an instance; `loader` for those that look at data.

    budget           what the plan will have to meet, for criteria that learn at it
    checkpoint_dir   where a criterion that learns keeps its state, so that a killed run goes on

    Raises PluginError for an unknown name, DataError for a loader that does not fit. The model is not changed.
    """
    chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
    context = make_context(model, loader, task=task, seed=seed, checkpoint_dir=checkpoint_dir, budget=budget)
    return chosen.score(context, tuple(sites))


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
    """A plan that meets the budget, by a selection's name or an instance.

    Needs example inputs, or a loader to take them from, to count MACs; "learned" needs the loader. Raises BudgetError,
    with the least that is reachable, for an impossible budget. The model is not changed: for a selection whose
    weights learn along see `select_trained`.
    """
    if example_inputs is None and loader is None:
        raise BudgetError("select counts the MACs of the real forward: give example_inputs= or loader=.")
    context = make_context(
        model, loader, example_inputs=example_inputs, task=task, seed=seed, checkpoint_dir=checkpoint_dir
    )
    return select_trained(model, context, scores, budget, selection)[0]


def select_trained(
    model: nn.Module, context: Context, scores: Scores, budget: Budget, selection: str | Selection = "global"
) -> tuple[Plan, nn.Module]:
    """(the plan, the model to carry it out on): the one given, or a copy that took `plan.info["updates"]` updates."""
    chosen: Selection = resolve(selection, SELECTIONS, Selection, "selection")
    costs = measure_costs(context.model, scores.sites, context.example_inputs, budget.shares)
    if chosen.updates(context.updates):
        device = reference_device(model)
        model = own(alias(unwrap(model)), model).to(reference_device(context.model))
        plan = chosen.select(replace(context, model=model), scores, costs, budget)
        model = model.to(device)
    else:
        plan = chosen.select(context, scores, costs, budget)
    check_allocation(context.model, plan, costs, budget, context.example_inputs)
    return plan, model
