"""Conformance checks for plug-in authors: one line tests an adapter, a criterion or a selection. Ours use them too."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.budget import Budget
from xprune.core.interfaces import Criterion, Selection
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.task import Task, example_of, known_axis
from xprune.costs.count import count_resources
from xprune.costs.measure import measure_costs
from xprune.discovery.find import find_sites
from xprune.modules.copies import alias, tables_of, tensors
from xprune.pipeline import score, select
from xprune.surgery.apply import apply
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import effect, prove
from xprune.tasks.classification import Classification
from xprune.training.runtime import told_by_first_batch


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Adds noise to every parameter, so that nothing is zero-initialised away; returns the model, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


def random_plan(sites: Sequence[Site], seed: int, gone: float = 0.15) -> Plan:
    """A random plan, different at every site: a random number of units, or one, or (with probability `gone`) none."""
    chance = random.Random(seed)
    keeps = []
    for site in sites:
        count = chance.choice([1, chance.randint(1, site.size), max(1, site.size - 1)])
        if site.module and chance.random() < gone:
            count = 0
        keeps.append(tuple(sorted(chance.sample(range(site.size), count))))
    return Plan(tuple(sites), tuple(keeps))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that pruning must leave alone: bits, modes, gradients' flags, hooks, classes."""
    modules = {
        path: (type(m), m.training, [len(table) for table in tables_of(m)], "forward" in vars(m))
        for path, m in model.named_modules()
    }
    return {
        "tensors": {n: (t.detach().clone(), t.requires_grad) for n, t in tensors(model).items()},
        "modules": modules,
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """AssertionError where the model differs from its snapshot."""
    now = snapshot(model)
    assert now["modules"] == before["modules"], "modules, modes or hooks of the caller's model have changed"
    assert now["tensors"].keys() == before["tensors"].keys(), "tensors of the caller's model came or went"
    for name, (tensor, wants) in before["tensors"].items():
        assert torch.equal(now["tensors"][name][0], tensor), f"{name} of the caller's model has changed"
        assert now["tensors"][name][1] == wants, f"requires_grad of {name} has changed"


def check_exact(model: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """The error of pruned against gated; AssertionError where it is too large, or where nothing changes."""
    pruned = apply(model, plan, example_inputs)
    found = prove(model, pruned, plan, example_inputs)
    assert not found.problem, f"{found.problem}: {plan.counts}"
    if plan.removed:
        moved = effect(model, plan, example_inputs).relative
        assert moved > 10 * found.difference.relative, "the gated output does not differ from the dense one"
    return found.difference.error


def check_adapter(
    model: nn.Module,
    example_inputs: Any,
    *,
    adapter: str | None = None,
    seeds: Iterable[int] = range(3),
    units: Sequence[str] | None = None,
) -> tuple[Site, ...]:
    """Holds the adapters that serve this model to their contract; returns the sites.

    model     randomised (`perturb`); is not changed, which is checked
    adapter   name of an adapter that has to be among those of the sites
    seeds     of the random plans
    units     kinds of unit, as `find_sites` takes them
    """
    before = snapshot(model)
    sites = find_sites(model, example_inputs, units=units)
    if adapter is not None:
        assert adapter in {site.adapter for site in sites}, f"no site of adapter {adapter!r}: {sites}"
    for site in sites:
        assert Site.from_json(site.to_json()) == site, f"{site.name} does not survive JSON"
    for seed in seeds:
        plan = random_plan(sites, seed)
        check_exact(model, plan, example_inputs)
        assert Plan.from_json(plan.to_json()) == plan, "the plan does not survive JSON"
        shapes = {n: t.shape for n, t in tensors(apply(model, plan, example_inputs)).items()}
        rebuilt = {n: t.shape for n, t in tensors(remove_units(alias(model, device="meta"), plan, ADAPTERS)).items()}
        assert shapes == rebuilt, "the plan cut on the meta device gives other shapes"
    for index, site in enumerate(sites):  # every site alone: one unit left, and none
        for keep in ((site.size - 1,), ()) if site.module else ((site.size - 1,),):
            if len(keep) < site.size:
                check_exact(model, Plan((sites[index],), (keep,)), example_inputs)
    assert_untouched(model, before)
    return sites


def check_criterion(
    criterion: str | Criterion, model: nn.Module, loader: Iterable[Any], task: Task | None = None
) -> Scores:
    """Holds a criterion to its contract on a model: finite scores, the same under the same seed, model untouched."""
    example_inputs, axis = _example(model, loader, task)
    sites, before = find_sites(model, example_inputs, batch_axis=axis), snapshot(model)
    first, second = (score(model, sites, loader, criterion, task=task, seed=3) for _ in range(2))
    assert_untouched(model, before)
    assert first.sites == sites, "the scores are not of the sites that were asked for"
    for site, a, b in zip(sites, first.values, second.values, strict=True):
        assert a.dtype == torch.float32 and a.shape == (site.size,), f"{site.name}: {a.dtype} {tuple(a.shape)}"
        assert torch.isfinite(a).all(), f"{site.name}: scores are not finite"
        assert torch.equal(a, b), f"{site.name}: the same seed gives other scores"
        assert site.size == 1 or a.std() > 0, f"{site.name}: all units have the same score"
    for site, table in zip(sites, first.classwise or (), strict=bool(first.classwise)):
        assert len(table.shape) == 2 and table.shape[1] == site.size, f"{site.name}: {tuple(table.shape)} class-wise"
        assert table[0].shape == (site.size,), f"{site.name}: a row of the class-wise scores is {table[0].shape}"
    return first


def check_selection(
    selection: str | Selection,
    model: nn.Module,
    scores: Scores,
    loader: Iterable[Any],
    budget: Budget,
    task: Task | None = None,
) -> Plan:
    """Holds a selection to its contract: never over the budget, and within 1 % of it or one step's cost, recounted."""
    before, (example_inputs, axis) = snapshot(model), _example(model, loader, task)
    plan, again = (select(model, scores, budget, selection, loader=loader, task=task) for _ in range(2))
    assert_untouched(model, before)
    assert plan == again, "the plan is not repeatable"
    costs = measure_costs(model, scores.sites, example_inputs, budget.shares, batch_axis=axis)
    pruned = apply(model, plan, example_inputs)
    counted = count_resources(pruned, example_inputs, budget.shares, batch_axis=axis)
    slack = []
    for name, cost, allowed in costs.limits(budget):
        got = counted[name]
        assert abs(got - cost.total(plan.counts)) <= 1e-6 * got + 1, (
            f"{name}: predicted {cost.total(plan.counts)}, is {got}"
        )
        assert got <= allowed * (1 + 1e-9) + 1, f"{name}: {got} is over the budget of {allowed}"
        steps = []
        for index, (site, count) in enumerate(zip(scores.sites, plan.counts, strict=True)):
            larger = [k for k in budget.counts(site) if k > count]
            if larger:
                steps.append(cost.step(plan.counts, index, larger[0]))
        slack.append(not steps or got >= 0.99 * allowed or got + min(steps) > allowed - 1)
    assert any(slack), f"the budget is wasted: {plan.info}"
    for site, count in zip(plan.sites, plan.counts, strict=True):
        assert count in budget.counts(site), f"{site.name}: {count} units are not allowed by {budget}"
    return plan


def _example(model: nn.Module, loader: Iterable[Any], task: Task | None) -> tuple[Any, int | None]:
    """(example inputs, the axis of the samples in them where the task knows it)."""
    task, batch = told_by_first_batch(loader, task or Classification(), model)
    return example_of(task, *batch), known_axis(task)
