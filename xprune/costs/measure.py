"""Measures how the cost of a model depends on the units that each site keeps, by counting smaller models.

A smaller model is a copy of the model without some of its units.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.budget import Budget
from xprune.core.costs import Cost, Costs, LinearCost
from xprune.core.plan import Plan
from xprune.core.resource import Resource, measured_resources
from xprune.core.resource import resource as resource_named
from xprune.core.site import Site
from xprune.core.unit_kind import unit_kind
from xprune.costs.count import by_module, count_resources, number_of_samples
from xprune.errors import BudgetError, ModelError, XPruneError
from xprune.modules.copies import shared_copy, unwrap
from xprune.modules.forward import devices_for_shapes, error_text, try_forward
from xprune.modules.part import Part
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
    inside: str | Sequence[str] | None = None,
) -> Costs:
    """Measures the cost of the units of each site in each resource.

    Selections need these costs to find a plan that meets the budget. The costs are found by counting smaller models:

    - the model as it is;
    - the model with one unit less at every site;
    - the model with as few units as possible at every site;
    - for each site that is only a part of its module, the model with one unit less at this site alone;
    - for each residual stream, the models above except the smallest one, with one channel less of this stream;
    - the model with two thirds of all units. The costs that were found have to predict this count.

    Models are counted on the meta device if the forward runs there, which takes little time and memory. Small models
    are counted on their own device, which is faster.

    Args:
        model: The model. It is not changed.
        sites: The sites whose units are measured.
        example_inputs: The inputs that the model is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        resources: The names of further resources to measure, such as those in `budget.shares`. MACs, parameters, and
            other resources that are always measured, need not be named.
        batch_axis: The axis of the inputs along which samples lie. If None, it is found by running the model with one
            sample less.
        inside: The patterns of the part of the model that is pruned, as in `find_sites`. The costs of this part are
            then measured too. None means those that `sites` was found with, if `sites` is the result of `find_sites`.

    Returns:
        The costs in each resource, as functions of the numbers of units that the sites keep.

    Raises:
        ModelError: A pattern of `inside` matches no module. Or the forward fails with all units or with fewer units. Or
            the axis of the samples cannot be found. Or a cost is not linear in the units of each site and in pairs of
            units of two sites, although its resource does not give another cost.
        BudgetError: A resource is unknown.

    Example:
        >>> import torch, xprune
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
        >>> x = torch.randn(3, 4)
        >>> costs = measure_costs(model, xprune.find_sites(model, x), x)
        >>> costs.macs.total([6]), costs.macs.total([3])  # with all 6 neurons, and with 3 of them
        (56.0, 32.0)
    """
    model = unwrap(model)
    # The sites of a plan or of scores may be a plain tuple, which does not know where they were looked for.
    inside = getattr(sites, "inside", ()) if inside is None else inside
    part = Part.of(model, inside) if inside else None
    asked, samples = measured_resources(tuple(resources)), number_of_samples(model, example_inputs, batch_axis)
    first, second = devices_for_shapes(model, example_inputs)
    try:
        return _measured(model, sites, example_inputs, samples, asked, part, first)
    except XPruneError:
        raise
    # A forward whose control flow depends on values of tensors does not run on the meta device.
    except Exception:
        try_forward(model, example_inputs)
    try:
        return _measured(model, sites, example_inputs, samples, asked, part, second)
    except XPruneError:
        raise
    except Exception as problem:
        raise ModelError(
            f"costs cannot be measured: the forward fails if units are removed: {error_text(problem)}. "
            "Were these sites found on this model? find_sites proves its sites, and find_sites(..., exclude=) leaves "
            "some out."
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
    """Checks the budget by counting the pruned model, if the predicted cost of a plan may be wrong.

    The predicted cost may be wrong in two cases. The cost of a resource is not linear. Or a plan prunes a residual
    stream and removes a whole attention: the saved cost depends on the number of channels that the stream keeps.

    Args:
        model: The dense model. It is not changed.
        plan: The units that stay.
        costs: The costs that the plan was made with.
        budget: The budget that the plan has to meet.
        example_inputs: The inputs that the model is called with.
        batch_axis: The axis of the inputs along which samples lie. If None, it is found by running the model with one
            sample less.

    Raises:
        BudgetError: The pruned model costs more than the budget allows.
    """
    limits = [
        (name, cost, allowed)
        for name, cost, allowed in costs.limits(budget)
        # A time is measured on the target, and the plan is corrected by it.
        if _needs_recount(plan, cost) and not resource_named(name).timed
    ]
    if not limits:
        return
    pruned = remove_units(shared_copy(model), plan, ADAPTERS)
    names = [name for name, _, _ in limits]
    counted = count_resources(pruned, example_inputs, names, batch_axis=batch_axis)
    for name, _, allowed in limits:
        # The cost may be rounded to an integer, so one more is allowed.
        if counted[name] > allowed * (1 + 1e-6) + 1:
            raise BudgetError(
                f"the plan may cost at most {allowed:.0f} {name}, but the pruned model costs {counted[name]}. Give a "
                "budget that is a little smaller, or keep a unit at each site, with min_units=1."
            )


def _needs_recount(plan: Plan, cost: Cost) -> bool:
    """Returns True if the cost of this plan may differ from the predicted cost, else False."""
    return not isinstance(cost, LinearCost) or any(unit_kind(site.kind).crosses for site in plan.sites)


Meeting = tuple[int, int, str]
"""A tensor that two sites cut along different axes: (index of a site, index of the other site, path of the tensor)."""
CostByPath = dict[str, float]
"""Path of a module -> its cost. The path "" is the whole model. The tensors of meetings are included by their paths."""


def _meetings(model: nn.Module, sites: Sequence[Site]) -> list[Meeting]:
    """Finds the tensors that two sites cut along different axes, if both sites are residual streams or neither is.

    The cost of such a tensor grows with the product of the numbers of units that the two sites keep. A stream and a
    site of another kind have many tensors in common. Their joint cost is measured instead, see `_linear`.
    """
    by_tensor: dict[int, tuple[str, list[int]]] = {}
    for index, site in enumerate(sites):
        for cut in site.cuts:
            by_tensor.setdefault(id(tensor_at(model, cut.tensor)), (cut.tensor, []))[1].append(index)
    pairs = [(both[0], both[1], name) for name, both in by_tensor.values() if len(both) == 2]
    return [(i, j, name) for i, j, name in pairs if _crosses(sites[i]) == _crosses(sites[j])]


def _crosses(site: Site) -> bool:
    """Returns True for a residual stream, whose channels cut tensors of other sites along another axis. Else False."""
    return unit_kind(site.kind).crosses


def _measured(
    model: nn.Module,
    sites: Sequence[Site],
    example_inputs: Any,
    samples: int,
    resources: Sequence[Resource],
    part: Part | None,
    device: str | None,
) -> Costs:
    """Counts all smaller models on a device, and finds the costs that explain these counts.

    Args:
        model: The model. It is not changed.
        sites: The sites.
        example_inputs: The inputs that the model is called with.
        samples: The number of samples in the inputs.
        resources: The resources to measure.
        part: The part of the model whose costs are measured too. None for no part.
        device: "meta", or None for the device of the model.

    Raises:
        ModelError: The costs that were found do not predict the count of one more smaller model.
    """

    def with_counts(kept: Sequence[int], device: str | None = None) -> nn.Module:
        """Returns a copy of the model that keeps these numbers of units. The cost does not depend on which units."""
        plan = Plan(tuple(sites), tuple(tuple(range(units)) for units in kept))
        return remove_units(shared_copy(model, requires_grad=True, device=device), plan, ADAPTERS)

    # A resource may give its own function of the units as cost. The cost of any other resource is taken to be linear.
    own_costs = {resource.name: resource.cost(sites, example_inputs, samples, with_counts) for resource in resources}
    linear = [resource for resource in resources if own_costs[resource.name] is None]
    meetings, full = _meetings(model, sites), [site.size for site in sites]
    streams = [index for index, site in enumerate(sites) if _crosses(site) and site.size > 1]
    # In `least` and `one_less`, streams keep all channels. `and_thinner` removes one channel of a stream.
    least = [site.size if _crosses(site) else 0 if site.module else 1 for site in sites]
    one_less = [max(size - 1, low) for size, low in zip(full, least, strict=True)]

    def count(kept: Sequence[int]) -> dict[str, CostByPath]:
        """Counts a model with these numbers of units.

        Returns:
            Name of a resource -> its costs by the paths of modules, and of the tensors that two sites cut.
        """
        smaller, found = with_counts(kept, device), {}
        # Parameters of removed modules are missing here.
        tensors = dict(smaller.named_parameters(remove_duplicate=False))
        for resource in linear:
            counted = by_module(resource, smaller, example_inputs, samples)
            of_tensors = {name: resource.of_tensor(counted, name, tensors.get(name)) for _, _, name in meetings}
            found[resource.name] = {**counted, **of_tensors}
        return found

    def and_thinner(kept: Sequence[int]) -> list[dict[str, CostByPath]]:
        """Counts a model with these numbers of units, and then, for each stream, with one channel less of it."""
        return [count([n - (index == thinner) for index, n in enumerate(kept)]) for thinner in (None, *streams)]

    whole, everywhere, smallest = and_thinner(full), and_thinner(one_less), count(least)
    # The cost of a site that is a whole module can be read from the cost of that module. So one count, with one unit
    # less everywhere, serves all such sites. Any other site needs a count in which no other site changes, because only
    # the cost of the whole model shows the cost of its units.
    smaller = {
        index: everywhere if site.module else and_thinner([*full[:index], one_less[index], *full[index + 1 :]])
        for index, site in enumerate(sites)
        if not _crosses(site)
    }
    two_thirds = [max(1, (2 * size) // 3) for size in full]
    control = count(two_thirds)
    costs: dict[str, Cost] = {}
    for resource in resources:
        name, own = resource.name, own_costs[resource.name]
        if own is not None:
            costs[name] = own
            continue
        costs[name] = _linear(
            sites,
            streams,
            meetings,
            [counted[name] for counted in whole],
            {index: [counted[name] for counted in found] for index, found in smaller.items()},
            smallest[name],
        )
        predicted, got = costs[name].total(two_thirds), control[name][""]
        if abs(predicted - got) > 1e-6 * got + 1:
            raise ModelError(
                f"{resource.label} of smaller models cannot be predicted here: {predicted:.0f} predicted, {got:.0f} "
                "counted. Leave 'channel', and other kinds whose units cut tensors of other sites, out of units=. If "
                "the resource is your own and not linear in the kept units, override Resource.cost."
            )
    # The dense model was counted already, module by module.
    of_part = {each.name: each.of_part(whole[0][each.name], model, part) for each in linear} if part else None
    return Costs(tuple(sites), costs, of_part)


def _linear(
    sites: Sequence[Site],
    streams: Sequence[int],
    meetings: Sequence[Meeting],
    whole: Sequence[CostByPath],
    smaller: Mapping[int, Sequence[CostByPath]],
    least: CostByPath,
) -> LinearCost:
    """Finds the linear cost that explains the measured costs of one resource.

    `whole`, and each value of `smaller`, is a list of measured costs. For the first cost of a list, all streams keep
    all channels. For each further cost, one stream has one channel less. These costs have the order of `streams`.

    Args:
        sites: The sites.
        streams: The indices of the sites that are residual streams.
        meetings: The tensors that two sites cut.
        whole: Measured costs with all units at each site that is not a stream.
        smaller: For the index of each site that is not a stream, measured costs with one unit less at this site.
        least: The measured cost with as few units as possible at each site that is not a stream.
    """
    full, sizes = whole[0], [site.size for site in sites]
    pairs = [(i, j, full[name] / (sizes[i] * sizes[j])) for i, j, name in meetings]
    unit, fixed = [0.0] * len(sites), [0.0] * len(sites)
    for index, fewer in smaller.items():
        site, names = sites[index], [name for i, j, name in meetings if index in (i, j)]
        owners = site.modules if site.module else ("",)

        def alone(counts: CostByPath, owners: Sequence[str] = owners, names: Sequence[str] = names) -> float:
            """Returns the cost of the modules of the site, without the tensors that another site cuts too."""
            return sum(counts.get(path, 0) for path in owners) - sum(counts[name] for name in names)

        # The cost of one unit, with all channels (`step`) and with one channel less of each stream (`thinner`). If a
        # channel changes the cost of a unit, both cut the same layers. The change is then the cost of one unit together
        # with one channel.
        step, *thinner = (alone(a) - alone(b) for a, b in zip(whole, fewer, strict=True))
        crossed = [(index, stream, step - less) for stream, less in zip(streams, thinner, strict=True) if step != less]
        pairs += crossed
        unit[index] = step - sum(each * sizes[stream] for _, stream, each in crossed)
        # The cost that is saved, in addition to that of the units, if the module loses all its units. An example is the
        # cost of a norm layer that all heads share.
        fixed[index] = alone(full) - alone(least) - step * site.size if site.module else 0.0
    # The cost of a channel is the difference between two counts of the model, without the cost of pairs, which is known
    # by now.
    shared = LinearCost(0.0, tuple(fixed), tuple(unit), tuple(pairs))
    for stream, thinner_whole in zip(streams, whole[1:], strict=True):
        unit[stream] = full[""] - thinner_whole[""] + shared.step(sizes, stream, sizes[stream] - 1)
    # The rest of the model's cost does not depend on any unit.
    found = LinearCost(0.0, tuple(fixed), tuple(unit), tuple(pairs))
    return replace(found, base=full[""] - found.total(sizes))
