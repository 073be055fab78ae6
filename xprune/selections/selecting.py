"""selected: runs a selection, checks its plan, and corrects it until the measured latency meets the budget."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.interfaces import Context, Selected, Selection
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.core.task import batch_axis_of
from xprune.core.times import Times
from xprune.costs.measure import check_allocation
from xprune.costs.on_target import OnTarget
from xprune.costs.realised import corrected
from xprune.errors import PluginError
from xprune.modules.copies import reference_device, shared_copy, unshare, unwrap
from xprune.training.master import in_float32, narrow, widen


def selected(
    model: nn.Module,
    context: Context,
    scores: Scores,
    costs: Costs,
    budget: Budget,
    chosen: Selection,
    on_target: OnTarget | None = None,
) -> Selected:
    """Runs a selection. If the budget limits the latency, corrects the plan until the measured latency meets it.

    Args:
        model: The dense model. It is not changed.
        context: The context of the selection.
        scores: The scores of all units.
        costs: The costs of the sites of these scores.
        budget: The budget that the plan has to meet.
        chosen: The selection.
        on_target: Measures the latency on the target of the budget. None if the budget does not limit the latency.

    Returns:
        The plan. If the selection trained weights, also the trained model, on the device of `model`.
    """
    if on_target is None:
        return _once(model, context, scores, costs, budget, chosen)
    asked, least = costs.share(budget, "latency"), costs.least(budget, "latency")
    if not on_target.here:
        found = _once(model, context, scores, costs, budget, chosen)
        note = {"asked": asked, "target": on_target.target.name, "realised": None}
        return _with_info(found, latency=note)
    first: list[Selected] = []
    times: dict[tuple[int, ...], Times] = {}

    def choose(share: float) -> Selected:
        """Returns a plan for a fraction of the dense model's time, as the table predicts it."""
        now = replace(budget, latency=share, latency_ms=None)
        if not first:
            first.append(_once(model, context, scores, costs, now, chosen))
            return first[0]
        # Only the first call may train weights.
        plan = chosen.again(replace(context, updates=0), scores, costs, now, first[0].plan)
        _check(chosen, plan, context.model, context, costs, now)
        return replace(first[0], plan=plan)

    def measure(selected: Selected) -> float:
        """Returns the measured fraction of the dense model's time."""
        counts = selected.plan.counts
        times[counts] = on_target.times(selected.plan)
        return times[counts].relative(1)

    tried = corrected(choose, measure, asked, least, lambda selected: selected.plan.counts)
    best = tried[-1].chosen
    timed = times[best.plan.counts]
    return _with_info(
        best,
        latency={
            "asked": asked,
            "target": on_target.watch.target.name,
            "realised": tried[-1].realised,
            "dense_ms": timed.median(0),
            "pruned_ms": timed.median(1),
            "tried": [[each.share, each.realised] for each in tried],
        },
    )


def _with_info(selected: Selected, **info: Any) -> Selected:
    """Returns the same selection with more notes in the plan's `info`."""
    plan = selected.plan
    return replace(selected, plan=Plan(plan.sites, plan.keeps, {**plan.info, **info}))


def _once(
    model: nn.Module, context: Context, scores: Scores, costs: Costs, budget: Budget, chosen: Selection
) -> Selected:
    """Runs a selection, and checks that its plan fits the sites and the budget.

    Args:
        model: The dense model. It is not changed.
        context: The context of the selection.
        scores: The scores of all units.
        costs: The costs of the sites of these scores.
        budget: The budget that the plan has to meet.
        chosen: The selection.

    Returns:
        The plan. If the selection trained weights, also the trained model, on the device of `model`.
    """
    updates = chosen.updates(context.updates)
    dense = context.model
    dtypes: dict[str, torch.dtype] = {}
    converts = None
    if updates:
        # The context's model shares the caller's weights. So a selection that trains weights gets a copy with separate
        # weights.
        trained = unshare(shared_copy(unwrap(model)), model).to(reference_device(dense))
        # Half-precision weights are trained in float32, as in fine-tuning.
        dtypes = widen(trained)
        converts = in_float32(trained) if dtypes else None
        context = replace(context, model=trained)
    found: Any = chosen.select(context, scores, costs, budget)
    if not isinstance(found, (Plan, Selected)):
        raise PluginError(
            f"{chosen.name}: select returned a {type(found).__name__}, wanted xprune.Plan, or xprune.Selected if the "
            "selection trained weights. Return one of these from Selection.select."
        )
    if isinstance(found, Plan):
        # A selection for an older release returns only the plan, even if it trained weights. Its method `updates` says
        # how many updates it used.
        found = Selected(found, context.model if updates else None, updates)
    _check(chosen, found.plan, dense, context, costs, budget)
    if found.model is None:
        return found
    if converts is not None:
        converts.remove()
    return replace(found, model=narrow(found.model, dtypes).to(reference_device(model)))


def _check(selection: Selection, plan: Plan, dense: nn.Module, context: Context, costs: Costs, budget: Budget) -> None:
    """Checks the plan of a selection: by its predicted cost, and by counting where the prediction may be wrong.

    Raises:
        PluginError: The plan has other sites than the scores, or is predicted to cost more than the budget allows.
        BudgetError: The pruned model costs more than the budget allows.
    """
    if plan.sites != costs.sites:
        raise PluginError(
            f"{selection.name}: the plan is for other sites than the scores. Selection.select has to return a plan for "
            "all sites in scores.sites, in their order."
        )
    for name, cost, allowed in costs.limits(budget):
        spent = cost.total(plan.counts)
        # Costs are sums of floating-point numbers. The margin allows for their rounding errors.
        if spent > allowed * (1 + 1e-6):
            raise PluginError(
                f"{selection.name}: the plan costs {spent:.0f} {name}, and the budget allows {allowed:.0f}. A "
                "selection has to meet the budget: xprune.testing.check_selection tests it."
            )
    axis = batch_axis_of(context.task)
    check_allocation(dense, plan, costs, budget, context.example_inputs, batch_axis=axis)
