"""Checks for plug-in authors: one call tests an adapter, a criterion or a selection. The tests of xprune use them too.

If the plug-in breaks its contract, a check raises AssertionError, or an error of xprune such as SurgeryError. The
message says what is wrong.
"""

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
from xprune.core.task import Task, batch_axis_of, example_of
from xprune.costs.count import count_resources
from xprune.costs.measure import measure_costs
from xprune.discovery.find import find_sites
from xprune.modules.copies import shared_copy, tables_of, tensors
from xprune.pipeline import score, select
from xprune.surgery.apply import apply
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import effect, prove
from xprune.tasks.classification import Classification
from xprune.training.runtime import task_and_first_batch


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Adds noise to every parameter of a model, in place. Call it before a check.

    Fresh models hide mistakes: a layer that starts at zero removes everything before it from the output.

    Args:
        model: The model, which is changed.
        seed: Seed of the noise.
        scale: Standard deviation of the noise.

    Returns:
        The same model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


def random_plan(sites: Sequence[Site], seed: int, gone: float = 0.15) -> Plan:
    """Returns a random plan for tests. Each site keeps one unit, a random number of units, or all units but one.

    Args:
        sites: The sites.
        seed: Seed of every choice.
        gone: Probability that a site keeps no unit, if it may lose all of them.

    Example:
        >>> site = Site("mlp", "neuron", size=6, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> random_plan([site], seed=0) == random_plan([site], seed=0)
        True
    """
    chance = random.Random(seed)
    keeps = []
    for site in sites:
        # Small and large counts are where mistakes show, so they are frequent.
        count = chance.choice([1, chance.randint(1, site.size), max(1, site.size - 1)])
        if site.module and chance.random() < gone:
            count = 0
        keeps.append(tuple(sorted(chance.sample(range(site.size), count))))
    return Plan(tuple(sites), tuple(keeps))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Notes everything about a model that pruning must not change, for `assert_untouched`.

    Returns:
        The values and `requires_grad` of every tensor. The class, the mode and the hooks of every module.
    """
    modules = {
        path: (type(m), m.training, [len(table) for table in tables_of(m)], "forward" in vars(m))
        for path, m in model.named_modules()
    }
    return {
        "tensors": {n: (t.detach().clone(), t.requires_grad) for n, t in tensors(model).items()},
        "modules": modules,
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """Raises AssertionError if the model differs from its `snapshot`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = snapshot(model)
        >>> assert_untouched(model, before)
    """
    now = snapshot(model)
    assert now["modules"] == before["modules"], "modules, modes or hooks of the caller's model have changed"
    assert now["tensors"].keys() == before["tensors"].keys(), "tensors of the caller's model came or went"
    for name, (tensor, wants) in before["tensors"].items():
        assert torch.equal(now["tensors"][name][0], tensor), f"{name} of the caller's model has changed"
        assert now["tensors"][name][1] == wants, f"requires_grad of {name} has changed"


def check_exact(model: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """Cuts a copy of the model and compares it with the gated dense model.

    Args:
        model: The dense model. It is not changed.
        plan: The plan.
        example_inputs: Inputs of the model.

    Returns:
        The largest absolute difference of the outputs.

    Raises:
        AssertionError: The models differ, or the gates change nothing, so the comparison proves nothing.
    """
    # `apply` proves the cut too, but does not return the difference that its proof measured.
    pruned = remove_units(shared_copy(model), plan, ADAPTERS)
    found = prove(model, pruned, plan, example_inputs, twice=True)
    assert not found.problem, f"{found.problem}: {plan.counts}"
    if plan.removed:
        moved = effect(model, plan, example_inputs).relative
        # Far above rounding: the removed units have to matter.
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
    """Checks the adapters that serve the modules of a model.

    It applies random plans, and plans that leave one unit or none at each site. Each pruned model has to equal the
    gated dense model. Sites and plans have to survive JSON, and the model must not change.

    Args:
        model: The model. Call `perturb` on it before.
        example_inputs: Inputs of the model.
        adapter: Name of an adapter that has to give at least one site. None: any.
        seeds: Seeds of the random plans.
        units: Names of the unit kinds, as in `find_sites`.

    Returns:
        The sites of the model.

    Raises:
        SurgeryError: A pruned model differs from the gated dense model.
        AssertionError: Another check fails.

    Example:
        >>> model = perturb(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> sites = check_adapter(model, torch.randn(2, 5, 8), adapter="torch-attention", seeds=[0])
        >>> [site.name for site in sites]
        ['self_attn']
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
        # A saved model is rebuilt without weights, on the meta device. It has to get the same shapes.
        shapes = {n: t.shape for n, t in tensors(apply(model, plan, example_inputs)).items()}
        rebuilt = {
            n: t.shape for n, t in tensors(remove_units(shared_copy(model, device="meta"), plan, ADAPTERS)).items()
        }
        assert shapes == rebuilt, "the plan cut on the meta device gives other shapes"
    # Each site without the others: a mistake at one site cannot hide behind another.
    for index, site in enumerate(sites):
        one_unit = (site.size - 1,)
        for keep in (one_unit, ()) if site.module else (one_unit,):
            if len(keep) < site.size:
                check_exact(model, Plan((sites[index],), (keep,)), example_inputs)
    assert_untouched(model, before)
    return sites


def check_criterion(
    criterion: str | Criterion, model: nn.Module, loader: Iterable[Any], task: Task | None = None
) -> Scores:
    """Checks a criterion: its scores are finite, differ between units, and are the same under the same seed.

    The criterion must not change the model. Its class-wise scores, if any, have a column for each unit.

    Args:
        criterion: A name in CRITERIA, or an instance.
        model: The model.
        loader: Batches.
        task: Reads the batches. None: classification of (inputs, labels).

    Returns:
        The scores.

    Raises:
        AssertionError: A check fails.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))
        >>> loader = [(torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 0]))]
        >>> check_criterion("magnitude", model, loader).criterion
        'magnitude'
    """
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
    """Checks a selection: its plan never costs more than the budget, and uses the budget well.

    The pruned model is counted again. Its cost has to be what `costs` predicted. For at least one resource of the
    budget, the cost is at least 99 % of the limit, or one more step of a site exceeds the limit. The selection has to
    give the same plan twice, and must not change the model.

    Args:
        selection: A name in SELECTIONS, or an instance.
        model: The model.
        scores: Scores of its units.
        loader: Batches.
        budget: The budget.
        task: Reads the batches. None: classification of (inputs, labels).

    Returns:
        The plan.

    Raises:
        AssertionError: A check fails.
    """
    before, (example_inputs, axis) = snapshot(model), _example(model, loader, task)
    plan, again = (select(model, scores, budget, selection, loader=loader, task=task) for _ in range(2))
    assert_untouched(model, before)
    assert plan == again, "the plan is not repeatable"
    costs = measure_costs(model, scores.sites, example_inputs, budget.shares, batch_axis=axis)
    pruned = apply(model, plan, example_inputs)
    counted = count_resources(pruned, example_inputs, budget.shares, batch_axis=axis)
    used = []
    for name, cost, allowed in costs.limits(budget):
        got = counted[name]
        # MACs of one sample are rounded, so a difference of 1 is allowed.
        assert abs(got - cost.total(plan.counts)) <= 1e-6 * got + 1, (
            f"{name}: predicted {cost.total(plan.counts)}, is {got}"
        )
        assert got <= allowed * (1 + 1e-9) + 1, f"{name}: {got} is over the budget of {allowed}"
        steps = []
        for index, (site, count) in enumerate(zip(scores.sites, plan.counts, strict=True)):
            larger = [k for k in budget.counts(site) if k > count]
            if larger:
                steps.append(cost.step(plan.counts, index, larger[0]))
        used.append(not steps or got >= 0.99 * allowed or got + min(steps) > allowed - 1)
    # A mixed budget is used up in one of its resources, not in all.
    assert any(used), f"the budget is wasted: {plan.info}"
    for site, count in zip(plan.sites, plan.counts, strict=True):
        assert count in budget.counts(site), f"{site.name}: {count} units are not allowed by {budget}"
    return plan


def _example(model: nn.Module, loader: Iterable[Any], task: Task | None) -> tuple[Any, int | None]:
    """Returns the example inputs and their sample axis. The axis is None if samples come first or it is not known."""
    task, batch = task_and_first_batch(loader, task or Classification(), model)
    return example_of(task, *batch), batch_axis_of(task)
