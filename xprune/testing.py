"""Checks for authors of plug-ins: one call tests an adapter, a criterion, a selection or a task.

If the plug-in breaks its contract, a check raises AssertionError, or an error of xprune such as SurgeryError. The
message says what is wrong. The tests of xprune itself use these checks too.
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
from xprune.modules.calls import map_tensors
from xprune.modules.copies import shared_copy, tables_of, tensors
from xprune.pipeline import score, select
from xprune.surgery.apply import apply
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import effect_with, prove_with
from xprune.surgery.outputs import Runs
from xprune.tasks.classification import Classification
from xprune.training.runtime import task_and_first_batch


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Adds noise to every parameter of a model. Call it before a check of a model with fresh weights.

    Fresh weights can hide mistakes. For example, if a layer starts with a weight of zeros, the output does not depend
    on anything before this layer.

    Args:
        model: The model. It is changed.
        seed: The seed of the noise.
        scale: The standard deviation of the noise.

    Returns:
        The same model object, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


def random_plan(sites: Sequence[Site], seed: int, gone: float = 0.15) -> Plan:
    """Returns a random plan for tests.

    Each site keeps one unit, all units but one, or a random number of units. The three cases have the same probability.

    Args:
        sites: The sites.
        seed: The seed of all random choices.
        gone: The probability that a site keeps no unit at all. It applies only to sites that may lose all their units.

    Example:
        >>> site = Site("mlp", "neuron", size=6, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> random_plan([site], seed=0) == random_plan([site], seed=0)
        True
    """
    chance = random.Random(seed)
    keeps = []
    for site in sites:
        # The smallest and the largest count reveal most mistakes, so they are frequent.
        count = chance.choice([1, chance.randint(1, site.size), max(1, site.size - 1)])
        if site.module and chance.random() < gone:
            count = 0
        keeps.append(tuple(sorted(chance.sample(range(site.size), count))))
    return Plan(tuple(sites), tuple(keeps))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Records everything of a model that pruning must not change. `assert_untouched` compares the model with it later.

    Returns:
        A dict. "tensors" holds the values and `requires_grad` of every tensor. "modules" holds the class, the mode and
        the number of hooks of every module.
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
    """Raises AssertionError if a model differs from the `snapshot` that was made of it before.

    Args:
        model: The model.
        before: The result of `snapshot`.

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
    """Cuts a copy of a model by a plan, and checks that the result computes the same as the gated dense model.

    Args:
        model: The dense model. It is not changed.
        plan: The plan.
        example_inputs: Inputs of the model.

    Returns:
        The largest absolute difference between the outputs of the two models.

    Raises:
        AssertionError: The outputs of the two models differ. Or the gates do not change the output, so that equal
            outputs would prove nothing.
    """
    return _checked(Runs(model, example_inputs, twice=True), plan)[0]


def _checked(runs: Runs, plan: Plan) -> tuple[float, nn.Module]:
    """Makes the checks of `check_exact`. Returns the largest difference and the pruned model."""
    # `apply` would prove the cut too, but it does not return the measured difference.
    pruned = remove_units(shared_copy(runs.model), plan, ADAPTERS)
    found = prove_with(runs, pruned, plan)
    assert not found.problem, f"{found.problem}: {plan.counts}"
    if plan.removed:
        moved = effect_with(runs, plan).relative
        # The removed units must change the output by much more than rounding errors do.
        assert moved > 10 * found.difference.relative, "the gated output does not differ from the dense one"
    return found.difference.error, pruned


def check_adapter(
    model: nn.Module,
    example_inputs: Any,
    *,
    adapter: str | None = None,
    seeds: Iterable[int] = range(3),
    units: Sequence[str] | None = None,
) -> tuple[Site, ...]:
    """Checks the adapters that serve the modules of a model.

    It applies random plans to the whole model. Then it applies plans for one site at a time that keep one unit or no
    unit. Each pruned model has to compute the same as the gated dense model. Sites and plans have to be the same after
    they were written to JSON and read back. The model must not change.

    Args:
        model: The model. Call `perturb` on it first.
        example_inputs: Inputs of the model.
        adapter: The name of an adapter that has to give at least one site. None means that any adapter will do.
        seeds: One random plan is made for each of these seeds.
        units: The names of the unit kinds to find, as in `find_sites`. None means the kinds that `find_sites` finds by
            default.

    Returns:
        The sites of the model.

    Raises:
        SurgeryError: A pruned model does not compute the same as the gated dense model.
        AssertionError: Another check fails.

    Example:
        >>> model = perturb(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> sites = check_adapter(model, torch.randn(2, 5, 8), adapter="torch-attention", seeds=[0])
        >>> [site.name for site in sites]
        ['self_attn', 'linear2']
    """
    before = snapshot(model)
    sites = find_sites(model, example_inputs, units=units)
    if adapter is not None:
        assert adapter in {site.adapter for site in sites}, f"no site of adapter {adapter!r}: {sites}"
    for site in sites:
        assert Site.from_json(site.to_json()) == site, f"{site.name} does not survive JSON"
    runs = Runs(model, example_inputs, twice=True)
    for seed in seeds:
        plan = random_plan(sites, seed)
        _, pruned = _checked(runs, plan)
        assert Plan.from_json(plan.to_json()) == plan, "the plan does not survive JSON"
        # `load` rebuilds a saved model on the meta device, without weights. The cut has to give the same shapes there.
        shapes = {n: t.shape for n, t in tensors(pruned).items()}
        rebuilt = {
            n: t.shape for n, t in tensors(remove_units(shared_copy(model, device="meta"), plan, ADAPTERS)).items()
        }
        assert shapes == rebuilt, "the plan cut on the meta device gives other shapes"
    # Each site is also cut alone. Otherwise the cut of another site could hide a mistake.
    for index, site in enumerate(sites):
        one_unit = (site.size - 1,)
        for keep in (one_unit, ()) if site.module else (one_unit,):
            if len(keep) < site.size:
                _checked(runs, Plan((sites[index],), (keep,)))
    assert_untouched(model, before)
    return sites


def check_criterion(
    criterion: str | Criterion, model: nn.Module, loader: Iterable[Any], task: Task | None = None
) -> Scores:
    """Checks a criterion. Its scores must be finite, differ between units, and be the same for the same seed.

    The criterion must not change the model. If it gives class-wise scores, each site needs a table with one column for
    each unit.

    Args:
        criterion: A name in the table `xprune.CRITERIA`, or an instance.
        model: The model.
        loader: Batches to score with.
        task: The task, which reads the batches. None means classification of (inputs, labels).

    Returns:
        The scores.

    Raises:
        AssertionError: One of the checks fails.

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
    """Checks a selection. Its plan must not cost more than the budget allows, and must use most of the budget.

    The pruned model is counted to compare its cost with the predicted cost. The plan uses most of the budget if one of
    two things is true for at least one limited resource. Its cost is at least 99 % of the limit. Or one more unit at
    some site would exceed the limit. A second call has to give the same plan, and the model must not change.

    Args:
        selection: A name in the table `xprune.SELECTIONS`, or an instance.
        model: The model.
        scores: The scores of the model's units.
        loader: Batches, for a selection that learns.
        budget: The budget.
        task: The task, which reads the batches. None means classification of (inputs, labels).

    Returns:
        The plan.

    Raises:
        AssertionError: One of the checks fails.
    """
    before, (example_inputs, axis) = snapshot(model), _example(model, loader, task)
    plan, again = (select(model, scores, budget, selection, loader=loader, task=task) for _ in range(2))
    assert_untouched(model, before)
    assert plan == again, "the plan is not repeatable"
    costs = measure_costs(model, scores.sites, example_inputs, budget.limited, batch_axis=axis)
    pruned = apply(model, plan, example_inputs)
    counted = count_resources(pruned, example_inputs, budget.limited, batch_axis=axis)
    used = []
    for name, cost, allowed in costs.limits(budget):
        got = counted[name]
        # The MACs for one sample are rounded, so a difference of 1 is allowed.
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
    # If a budget limits several resources, only one of them can be used up in most cases.
    assert any(used), f"the budget is wasted: {plan.info}"
    for site, count in zip(plan.sites, plan.counts, strict=True):
        assert count in budget.counts(site), f"{site.name}: {count} units are not allowed by {budget}"
    return plan


def check_task(task: Task, model: nn.Module, loader: Iterable[Any]) -> None:
    """Checks a task with a model, on the first batch of a loader.

    The loss must be finite, depend on the outputs, and be equal for equal outputs. The metric of each sample, the
    metric of the data set and the classes must have the right forms. A distillation must be 0 at the outputs of the
    teacher, and larger for other outputs. A task that refuses distillation passes.

    Args:
        task: The task.
        model: The model, whose outputs the task reads. It is not changed.
        loader: Batches.

    Raises:
        AssertionError: One of the checks fails.

    Example:
        >>> check_task(Classification(), nn.Linear(4, 3), [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))])
    """
    before = snapshot(model)
    task = task.with_dense(model)
    task, (inputs, targets) = task_and_first_batch(loader, task, model)
    outputs = task.forward(shared_copy(model, requires_grad=True), inputs)
    task.check(outputs, targets)
    samples = task.size(targets)
    assert isinstance(samples, int) and samples > 0, f"size gives {samples!r}, wanted the number of samples"
    assert 0 <= task.counted(targets) <= samples, f"counted gives {task.counted(targets)!r}, of {samples} samples"
    _check_losses(task, outputs, targets)
    of_samples = task.metric(outputs, targets)
    if of_samples is not None:
        assert of_samples.shape[:1] == (samples,), f"metric gives {tuple(of_samples.shape)}, wanted ({samples},)"
    metric = task.new_metric(outputs)
    task.update(metric, outputs, targets)
    value = torch.as_tensor(metric.compute())
    assert value.numel() == 1, f"the metric of the data set gives {tuple(value.shape)}, wanted one number"
    found = task.classes(outputs, targets)
    if found is not None:
        _check_classes(task, outputs, targets, *found)
    assert_untouched(model, before)


def _check_losses(task: Task, outputs: Any, targets: Any) -> None:
    """Checks the loss and the distillation of a task. See `check_task`.

    Args:
        task: The task.
        outputs: The outputs of the model for a batch, with gradients.
        targets: The targets of the batch.
    """
    probe = task.probe_loss(outputs, targets)
    for name, loss in (("loss", task.loss(outputs, targets)), ("probe_loss", probe)):
        if loss is not None:
            assert loss.shape == (), f"{name} gives {tuple(loss.shape)}, wanted a tensor with one number and no axes"
            assert bool(loss.isfinite()), f"{name} is {loss.item()}"
            assert loss.requires_grad, f"{name} does not depend on the outputs of the model"
    assert torch.equal(task.loss(outputs, targets), task.loss(outputs, targets)), "two calls of loss differ"
    if type(task).distillation is Task.distillation:
        return
    teacher = map_tensors(outputs, torch.Tensor.detach)
    same = float(task.distillation(teacher, teacher, 1.0))
    assert abs(same) < 1e-5, f"the distillation of a model from itself is {same}, wanted 0"
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor with noise, if it holds numbers with a fraction."""
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        return tensor + noise.to(tensor.dtype) if tensor.is_floating_point() else tensor

    other = float(task.distillation(map_tensors(teacher, moved), teacher, 1.0))
    assert other > abs(same), f"the distillation for other outputs is {other}, not larger than {same}"


def _check_classes(task: Task, outputs: Any, targets: Any, own: torch.Tensor, count: int) -> None:
    """Checks the classes of the samples of a batch. See `check_task`.

    Args:
        task: The task.
        outputs: The outputs of the model for the batch.
        targets: The targets of the batch.
        own: The class of each sample, as `Task.classes` gave them.
        count: The number of classes.
    """
    samples = task.size(targets)
    assert own.dtype == torch.int64 and own.shape == (samples,), f"classes gives {own.dtype} {tuple(own.shape)}"
    assert int(own.min()) >= 0 and int(own.max()) < count, f"classes go from {int(own.min())} to {int(own.max())}"
    names = task.class_names
    assert names is None or len(names) == count, f"{len(names or ())} names for {count} classes"
    scores = task.class_scores(outputs, targets, own)
    assert scores.shape == (samples,), f"class_scores gives {tuple(scores.shape)}, wanted ({samples},)"
    if count > 1:
        drawn = task.other(targets, own, count)
        assert drawn.shape == own.shape and bool((drawn != own).all()), "other gives the own class of a sample"
        for gone in (False, True):
            loss = task.one_vs_rest(outputs, targets, drawn, gone)
            assert loss.shape == () and not bool(loss.isnan()), f"one_vs_rest gives {loss}"


def _example(model: nn.Module, loader: Iterable[Any], task: Task | None) -> tuple[Any, int | None]:
    """Returns the example inputs for a model, and their sample axis. The axis is None if it is 0 or not known."""
    task, batch = task_and_first_batch(loader, task or Classification(), model)
    return example_of(task, *batch), batch_axis_of(task)
