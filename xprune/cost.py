"""Costs: MACs by torch's FlopCounterMode, parameters, latency; and what each unit contributes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from xprune.adapters import ADAPTERS
from xprune.budget import Costs, LinearCost
from xprune.errors import ModelError
from xprune.nest import call, map_tensors, tensors_in
from xprune.plan import Plan
from xprune.site import Site
from xprune.structure import alias, carve, reference_device, tensor_at


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one sample: FlopCounterMode over the real forward / 2, attention products included.

    A sample is a row of the first input: an image, a sentence; for a graph, a node. Message passing costs one for
    each feature of each edge that is summed up, or two operations, as a matrix product with the adjacency would.
    """
    return round(_macs(alias(model, requires_grad=True), example_inputs)[""])


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

    And with one unit less at each site whose units are not all that its module does. On the meta device where the
    forward runs there, so that it costs neither time nor memory.
    """
    met = _meetings(model, sites)
    try:
        counted = _recounts(model, sites, example_inputs, met, "meta")
    except (NotImplementedError, RuntimeError):  # a forward that looks at values
        counted = _recounts(model, sites, example_inputs, met, None)
    return Costs(tuple(sites), *(_linear(sites, [counts[index] for counts in counted], met) for index in (0, 1)))


Meeting = tuple[int, int, str]
"""Two sites, by their indices, and a tensor that both cut."""
Counts = dict[str, float]
"""What modules cost, by their paths, "" for the model; and what tensors of meetings do, of MACs their layer's."""


def _meetings(model: nn.Module, sites: Sequence[Site]) -> list[Meeting]:
    """Every meeting; the two cut along different axes, which `find_sites` has seen to."""
    by_tensor: dict[int, tuple[str, set[int]]] = {}
    for index, site in enumerate(sites):
        for cut in site.cuts:
            by_tensor.setdefault(id(tensor_at(model, cut.tensor)), (cut.tensor, set()))[1].add(index)
    return [(min(met), max(met), name) for name, met in by_tensor.values() if len(met) == 2]


def _recounts(
    model: nn.Module, sites: Sequence[Site], example_inputs: Any, met: Sequence[Meeting], device: str | None
) -> list[tuple[Counts, Counts]]:
    """(MACs, parameters) of the model as it is, with one unit less everywhere, with as few as can be, and then with
    one unit less at each site without a module."""

    def count(kept: Sequence[int]) -> tuple[Counts, Counts]:
        plan = Plan(tuple(sites), tuple(tuple(range(units)) for units in kept))
        smaller = carve(alias(model, requires_grad=True, device=device), plan, ADAPTERS)
        held = dict(smaller.named_parameters(remove_duplicate=False))  # what went as a whole is not there
        paths = ("", *(path for site in sites if site.module for path in site.modules))
        params: Counts = {path: count_params(smaller.get_submodule(path)) for path in paths}
        params |= {name: held[name].numel() if name in held else 0 for _, _, name in met}
        macs = _macs(smaller, example_inputs)
        return {**macs, **{name: macs.get(name.rpartition(".")[0], 0) for _, _, name in met}}, params

    full = [site.size for site in sites]
    least = [0 if site.module else 1 for site in sites]
    less = [max(size - 1, floor) for size, floor in zip(full, least, strict=True)]
    alone = [[*full[:i], less[i], *full[i + 1 :]] for i, site in enumerate(sites) if not site.module]
    return [count(kept) for kept in (full, less, least, *alone)]


def _linear(sites: Sequence[Site], counts: list[Counts], met: Sequence[Meeting]) -> LinearCost:
    full, less, least, *alone = counts
    pairs = tuple((i, j, full[name] / (sites[i].size * sites[j].size)) for i, j, name in met)
    unit, fixed, apart = [], [], iter(alone)
    for index, site in enumerate(sites):
        names = [name for i, j, name in met if index in (i, j)]
        if site.module:
            whole, one, none = (
                sum(c.get(path, 0) for path in site.modules) - sum(c[name] for name in names)
                for c in (full, less, least)
            )
            unit.append(whole - one)
            fixed.append(whole - none - unit[-1] * site.size)
        else:
            unit.append(full[""] - next(apart)[""] - sum(full[name] for name in names) / site.size)
            fixed.append(0.0)
    base = full[""] - sum(f + u * s.size for f, u, s in zip(fixed, unit, sites, strict=True))
    return LinearCost(float(base - sum(full[name] for _, _, name in met)), tuple(fixed), tuple(unit), pairs)


def _macs(model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """MACs of one sample by module path; "" is the model. The model is consumed."""
    device = reference_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = map_tensors(example_inputs, lambda t: t.to(device, dtype if t.is_floating_point() else None))
    rows = next((len(t) for t in tensors_in(inputs) if t.dim()), 0)
    if not rows:
        raise ModelError("the example inputs hold no tensor with rows: MACs per sample cannot be counted.")
    summed = {operation: _summed for operation in (torch.ops.aten.scatter_add_, torch.ops.aten.scatter_add)}
    counter = FlopCounterMode(display=False, custom_mapping=summed)
    # Without gradients nn.TransformerEncoder takes a path that counts as 0; torch <= 2.11 does not count the fused
    # attention of CPUs.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, inputs)
    counts = {"": sum(counter.get_flop_counts()["Global"].values()) / 2 / rows}
    for name, ops in counter.get_flop_counts().items():
        counts.setdefault(name.partition(".")[2], sum(ops.values()) / 2 / rows)
    return counts


def _summed(_into: Any, _dim: Any, _index: Any, source: Sequence[int], **_: Any) -> int:
    """FLOPs of messages of this shape, each weighted and added to its node."""
    return 2 * math.prod(source)
