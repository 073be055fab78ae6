"""Measured costs: what the units of each site cost of each resource, by recounting smaller models."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.budget import Budget
from xprune.core.costs import Cost, Costs, LinearCost
from xprune.core.plan import Plan
from xprune.core.resource import Resource, measured_resources
from xprune.core.site import Site
from xprune.core.unit_kind import unit_kind
from xprune.costs.count import by_module, count_resources, number_of_samples
from xprune.errors import BudgetError, ModelError, XPruneError
from xprune.modules.copies import shared_copy, unwrap
from xprune.modules.forward import try_forward
from xprune.modules.paths import tensor_at
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.cut import remove_units


@undisturbed()
def measure_costs(
    model: nn.Module,
    sites: Sequence[Site],
    example_inputs: Any,
    resources: Iterable[str] = (),
    *,
    batch_axis: int | None = None,
) -> Costs:
    """What the units of each site cost of each resource, by recounting.

    The model is recounted as it is, with one unit less at every site, and with as few as can be; with one unit less at
    each site whose units are not all that its module does; and all of these beside one channel less of each stream. It
    is on the meta device where the forward runs there, so that this takes neither time nor memory.

    Args:
        model: The model. It is not changed.
        sites: Whose units are counted.
        example_inputs: What the model is called with.
        resources: Names of resources to measure beside those that every run measures: `budget.shares`.
        batch_axis: Axis of the samples in the inputs. None: found by taking a sample away.

    Raises:
        ModelError: The forward fails, dense or with units gone; or the axis of the samples cannot be told; or a cost is
            not what its resource says, linear in the units of each site and in pairs of sites that meet, which one more
            recount tells.
    """
    model = unwrap(model)
    asked, samples = measured_resources(tuple(resources)), number_of_samples(model, example_inputs, batch_axis)
    try:
        return _measured(model, sites, example_inputs, samples, asked, "meta")
    except XPruneError:
        raise
    except Exception:  # a forward that looks at values does not run on meta
        try_forward(model, example_inputs)
    try:
        return _measured(model, sites, example_inputs, samples, asked, None)
    except XPruneError:
        raise
    except Exception as problem:
        raise ModelError(
            f"costs cannot be measured: with units gone the forward fails: {type(problem).__name__}: {problem}. Were "
            "these sites found on this model? find_sites proves them, find_sites(..., exclude=) leaves some out."
        ) from problem


def check_allocation(
    model: nn.Module,
    plan: Plan,
    costs: Costs,
    budget: Budget,
    example_inputs: Any,
    *,
    batch_axis: int | None = None,
) -> None:
    """BudgetError where a recount of a plan whose costs cannot be told in advance finds more than the budget allows.

    They cannot where a whole attention goes that has layers of its own over a stream, beside its heads, and where a
    cost is no sum of products.
    """
    limits = [limit for limit in costs.limits(budget) if _needs_recount(plan, limit[1])]
    if not limits:
        return
    pruned = remove_units(shared_copy(model), plan, ADAPTERS)
    counted = count_resources(pruned, example_inputs, budget.shares, batch_axis=batch_axis)
    for name, _, allowed in limits:
        if counted[name] > allowed * (1 + 1e-6) + 1:  # MACs of a sample are rounded
            raise BudgetError(
                f"the plan was to cost at most {allowed:.0f} {name} and costs {counted[name]}. Ask for a little less, "
                "or let no attention go as a whole: min_units=1."
            )


def _needs_recount(plan: Plan, cost: Cost) -> bool:
    return not isinstance(cost, LinearCost) or any(unit_kind(site.kind).crosses for site in plan.sites)


Meeting = tuple[int, int, str]
"""Two sites, by their indices, and a tensor that both cut."""
Counts = dict[str, float]
"""What modules cost, by their paths, "" for the model; and what tensors of meetings do, of MACs their layer's."""


def _meetings(model: nn.Module, sites: Sequence[Site]) -> list[Meeting]:
    """Every meeting of two streams, or of two sites that are none; both cut the tensor, along different axes.

    Streams overlap sites in several layers, so their joint cost is measured, not derived.
    """
    by_tensor: dict[int, tuple[str, list[int]]] = {}
    for index, site in enumerate(sites):
        for cut in site.cuts:
            by_tensor.setdefault(id(tensor_at(model, cut.tensor)), (cut.tensor, []))[1].append(index)
    pairs = [(met[0], met[1], name) for name, met in by_tensor.values() if len(met) == 2]
    return [(i, j, name) for i, j, name in pairs if _crosses(sites[i]) == _crosses(sites[j])]


def _crosses(site: Site) -> bool:
    """True for a stream, whose units cross other sites' tensors."""
    return unit_kind(site.kind).crosses


def _measured(
    model: nn.Module,
    sites: Sequence[Site],
    example_inputs: Any,
    samples: int,
    resources: Sequence[Resource],
    device: str | None,
) -> Costs:
    def with_counts(kept: Sequence[int], device: str | None = None) -> nn.Module:
        plan = Plan(tuple(sites), tuple(tuple(range(units)) for units in kept))
        return remove_units(shared_copy(model, requires_grad=True, device=device), plan, ADAPTERS)

    own = {resource.name: resource.cost(sites, example_inputs, samples, with_counts) for resource in resources}
    linear = [resource for resource in resources if own[resource.name] is None]
    met, full = _meetings(model, sites), [site.size for site in sites]
    streams = [index for index, site in enumerate(sites) if _crosses(site) and site.size > 1]
    least = [site.size if _crosses(site) else 0 if site.module else 1 for site in sites]
    less = [max(size - 1, low) for size, low in zip(full, least, strict=True)]

    def count(kept: Sequence[int]) -> dict[str, Counts]:
        """What modules, and tensors that two sites cut, cost of each resource with so many units kept."""
        smaller, found = with_counts(kept, device), {}
        held = dict(smaller.named_parameters(remove_duplicate=False))  # what went as a whole is not there
        for resource in linear:
            counted = by_module(resource, smaller, example_inputs, samples)
            tensors = {name: resource.of_tensor(counted, name, held.get(name)) for _, _, name in met}
            found[resource.name] = {**counted, **tensors}
        return found

    def row(kept: Sequence[int]) -> list[dict[str, Counts]]:
        """With these units, and then with one channel less of each stream."""
        return [count([n - (index == thinner) for index, n in enumerate(kept)]) for thinner in (None, *streams)]

    whole, everywhere, none = row(full), row(less), count(least)
    smaller = {
        index: everywhere if site.module else row([*full[:index], less[index], *full[index + 1 :]])
        for index, site in enumerate(sites)
        if not _crosses(site)
    }
    told = count([max(1, (2 * size) // 3) for size in full])
    costs: dict[str, Cost] = {}
    for resource in resources:
        name, mine = resource.name, own[resource.name]
        if mine is not None:
            costs[name] = mine
            continue
        costs[name] = _linear(
            sites,
            streams,
            met,
            [counts[name] for counts in whole],
            {index: [counts[name] for counts in found] for index, found in smaller.items()},
            none[name],
        )
        predicted, got = costs[name].total([max(1, (2 * size) // 3) for size in full]), told[name][""]
        if abs(predicted - got) > 1e-6 * got + 1:
            raise ModelError(
                f"{resource.label} of smaller models cannot be told in advance here: {predicted:.0f} predicted, "
                f"{got:.0f} counted. Leave kinds of unit that cross others, such as 'channel', out of units=. A "
                "resource that is not linear in the kept units says how it depends on them in Resource.cost."
            )
    return Costs(tuple(sites), costs)


def _linear(
    sites: Sequence[Site],
    streams: Sequence[int],
    met: Sequence[Meeting],
    whole: Sequence[Counts],
    smaller: Mapping[int, Sequence[Counts]],
    least: Counts,
) -> LinearCost:
    """From what was counted: of the whole, with one unit less of each site that is no stream, with as few as can be.

    Of the whole and with a unit less, the first counts are with all channels, then with one less of each stream.
    """
    full, sizes = whole[0], [site.size for site in sites]
    pairs = [(i, j, full[name] / (sizes[i] * sizes[j])) for i, j, name in met]
    unit, fixed = [0.0] * len(sites), [0.0] * len(sites)
    for index, fewer in smaller.items():
        site, names = sites[index], [name for i, j, name in met if index in (i, j)]
        owners = site.modules if site.module else ("",)

        def alone(counts: Counts, owners: Sequence[str] = owners, names: Sequence[str] = names) -> float:
            return sum(counts.get(path, 0) for path in owners) - sum(counts[name] for name in names)

        step, *thinner = (alone(a) - alone(b) for a, b in zip(whole, fewer, strict=True))
        crossed = [(index, stream, step - less) for stream, less in zip(streams, thinner, strict=True) if step != less]
        pairs += crossed
        unit[index] = step - sum(each * sizes[stream] for _, stream, each in crossed)
        fixed[index] = alone(full) - alone(least) - step * site.size if site.module else 0.0
    shared = LinearCost(0.0, tuple(fixed), tuple(unit), tuple(pairs))
    for stream, thinner_whole in zip(streams, whole[1:], strict=True):
        unit[stream] = full[""] - thinner_whole[""] + shared.step(sizes, stream, sizes[stream] - 1)
    found = LinearCost(0.0, tuple(fixed), tuple(unit), tuple(pairs))
    return replace(found, base=full[""] - found.total(sizes))
