"""Costs: MACs by torch's FlopCounterMode, parameters, latency; and what each unit contributes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from xprune.adapters import ADAPTERS
from xprune.budget import Budget, Costs, LinearCost
from xprune.errors import BudgetError, ModelError
from xprune.nest import call, map_tensors, tensors_in
from xprune.plan import Plan
from xprune.site import Site
from xprune.structure import alias, carve, reference_device, tensor_at


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one sample: FlopCounterMode over the real forward / 2, attention products included."""
    return _macs(alias(model, requires_grad=True), example_inputs)[""]


def count_params(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def latency(model: nn.Module, example_inputs: Any, seconds: float = 0.5) -> float:
    """Median milliseconds of a forward pass on the example inputs, on the model's device, eval mode."""
    model = alias(model)
    inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    with torch.inference_mode():
        timer = Timer(
            "call(model, inputs)",
            globals={"call": call, "model": model, "inputs": inputs},
            num_threads=torch.get_num_threads(),
        )
        return float(timer.blocked_autorange(min_run_time=seconds).median * 1e3)


def measure_costs(model: nn.Module, sites: Sequence[Site], example_inputs: Any) -> Costs:
    """What the units of each site cost, by recounting: the model as it is, with one unit less everywhere, with none.

    And, for each stream whose channels may go, with a channel less, alone and beside one unit less elsewhere. On the
    meta device where the forward runs there, so that it costs neither time nor memory. Raises ModelError where costs
    of channels are no sum of products, which one more recount tells.
    """
    try:
        return _measured(model, sites, example_inputs, "meta")
    except (NotImplementedError, RuntimeError):  # a forward that looks at values
        return _measured(model, sites, example_inputs, None)


Counts = dict[str, float]
"""What sites cost, by name; "" for the model; and tensors that two streams cut, of MACs their layers."""


def _measured(model: nn.Module, sites: Sequence[Site], example_inputs: Any, device: str | None) -> Costs:
    streams = [index for index, site in enumerate(sites) if site.kind == "channel"]
    full = [site.size for site in sites]
    least = [1 if index in streams else 0 if site.module else 1 for index, site in enumerate(sites)]
    less = [max(n - (index not in streams), low) for index, (n, low) in enumerate(zip(full, least, strict=True))]
    none = [full[index] if index in streams else low for index, low in enumerate(least)]
    met = _meetings(model, sites, streams)

    def count(kept: Sequence[int]) -> tuple[Counts, Counts]:
        return _count(model, sites, example_inputs, kept, met, device)

    def thinner(kept: Sequence[int], stream: int) -> list[int]:
        return [n - (index == stream) for index, n in enumerate(kept)]

    counts = [count(kept) for kept in (full, less, none)]
    apart = {i: (count(thinner(full, i)), count(thinner(less, i))) for i in streams if full[i] > 1}
    costs = Costs(
        tuple(sites),
        *(
            _linear(
                sites, [found[kind] for found in counts], {i: (a[kind], b[kind]) for i, (a, b) in apart.items()}, met
            )
            for kind in (0, 1)
        ),
    )
    if streams:
        some = [max(1, (2 * n) // 3) for n in full]
        for name, predicted, got in zip(("MACs", "parameters"), _totals(costs, some), count(some), strict=True):
            if abs(predicted - got[""]) > 1e-6 * got[""] + len(sites):  # MACs of a sample are rounded
                raise ModelError(
                    f"{name} of plans with channels cannot be told in advance here: {predicted:.0f} predicted, "
                    f"{got['']:.0f} counted. Leave 'channel' out of units=."
                )
    return costs


def check_landing(model: nn.Module, plan: Plan, costs: Costs, budget: Budget, example_inputs: Any) -> None:
    """BudgetError where a recount of a plan with channels finds more than the budget allows.

    It can where a whole attention goes that has layers of its own over the stream, beside its heads.
    """
    if all(site.kind != "channel" for site in plan.sites):
        return
    pruned = carve(alias(model), plan, ADAPTERS)
    counted = {"macs": count_macs(pruned, example_inputs), "params": count_params(pruned)}
    for name, _, allowed in costs.limits(budget):
        if counted[name] > allowed * (1 + 1e-6) + len(plan.sites):
            raise BudgetError(
                f"the plan was to cost at most {allowed:.0f} {name} and costs {counted[name]}. Ask for a little less, "
                "or let no attention go as a whole: min_units=1."
            )


def _totals(costs: Costs, kept: Sequence[int]) -> tuple[float, float]:
    return costs.macs.total(kept), costs.params.total(kept)


def _meetings(model: nn.Module, sites: Sequence[Site], streams: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Tensors that two streams cut, or one twice: where a layer reads one and writes the other."""
    by_tensor: dict[int, tuple[str, list[int]]] = {}
    for index in streams:
        for cut in sites[index].cuts:
            by_tensor.setdefault(id(tensor_at(model, cut.tensor)), (cut.tensor, []))[1].append(index)
    return {name: (met[0], met[1]) for name, met in by_tensor.values() if len(met) == 2}


def _count(
    model: nn.Module,
    sites: Sequence[Site],
    example_inputs: Any,
    kept: Sequence[int],
    met: Iterable[str],
    device: str | None,
) -> tuple[Counts, Counts]:
    """(MACs, parameters) of the model with so many units kept at each site."""
    plan = Plan(tuple(sites), tuple(tuple(range(count)) for count in kept))
    smaller = carve(alias(model, requires_grad=True, device=device), plan, ADAPTERS)
    held = dict(smaller.named_parameters(remove_duplicate=False))  # what went as a whole is not there
    params: Counts = {"": count_params(smaller)}
    params |= {name: held[name].numel() if name in held else 0 for name in met}
    apart = [site for site in sites if site.kind != "channel"]
    for site in apart:
        params[site.name] = sum(count_params(smaller.get_submodule(path)) for path in site.modules)
    macs = _macs(smaller, example_inputs)
    found: Counts = {site.name: sum(macs.get(path, 0) for path in site.modules) for site in apart}
    return {"": macs[""], **found, **{name: macs.get(name.rpartition(".")[0], 0) for name in met}}, params


def _linear(
    sites: Sequence[Site],
    counts: Sequence[Counts],
    apart: Mapping[int, tuple[Counts, Counts]],
    met: Mapping[str, tuple[int, int]],
) -> LinearCost:
    """From what was counted: of the whole, with one unit less, with none; and for each stream with a channel less."""
    full, less, least = counts
    sizes = [site.size for site in sites]
    others = [(index, site) for index, site in enumerate(sites) if site.kind != "channel"]
    pairs = [(i, j, full[name] / (sizes[i] * sizes[j])) for name, (i, j) in met.items()]
    for stream, (alone, both) in apart.items():
        pairs += [(i, stream, full[s.name] - less[s.name] - alone[s.name] + both[s.name]) for i, s in others]
    pairs = [pair for pair in pairs if pair[2]]
    unit, fixed = [0.0] * len(sites), [0.0] * len(sites)
    for index, site in others:
        step = full[site.name] - less[site.name]  # 0 where a site's only unit has to stay
        fixed[index] = full[site.name] - least[site.name] - step * site.size if site.module else 0.0
        unit[index] = step - sum(each * sizes[j] for i, j, each in pairs if i == index)
    shared = LinearCost(0.0, tuple(fixed), tuple(unit), tuple(pairs))
    for stream, (alone, _) in apart.items():
        unit[stream] = full[""] - alone[""] + shared.step(sizes, stream, sizes[stream] - 1)
    found = LinearCost(0.0, tuple(fixed), tuple(unit), tuple(pairs))
    return replace(found, base=full[""] - found.total(sizes))


def _macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs of one sample by module path; "" is the model. The model is consumed."""
    device = reference_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = map_tensors(example_inputs, lambda t: t.to(device, dtype if t.is_floating_point() else None))
    rows = next((len(t) for t in tensors_in(inputs) if t.dim()), 0)
    if not rows:
        raise ModelError("the example inputs hold no tensor with rows: MACs per sample cannot be counted.")
    counter = FlopCounterMode(display=False)
    # Without gradients nn.TransformerEncoder takes a path that counts as 0; torch <= 2.11 does not count the fused
    # attention of CPUs.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, inputs)
    counts = {"": sum(counter.get_flop_counts()["Global"].values()) // 2 // rows}
    for name, ops in counter.get_flop_counts().items():
        counts.setdefault(name.partition(".")[2], sum(ops.values()) // 2 // rows)
    return counts
