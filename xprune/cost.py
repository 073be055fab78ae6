"""Costs: MACs by torch's FlopCounterMode, parameters, latency; and what each unit contributes."""

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
from xprune.structure import alias, carve, reference_device


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

    On the meta device where the forward runs there, so that it costs neither time nor memory.
    """
    try:
        counts = [_count(model, sites, example_inputs, less, "meta") for less in (0, 1, None)]
    except (NotImplementedError, RuntimeError):  # a forward that looks at values
        counts = [_count(model, sites, example_inputs, less, None) for less in (0, 1, None)]
    return Costs(tuple(sites), *(_linear(sites, [count[index] for count in counts]) for index in (0, 1)))


def _count(
    model: nn.Module, sites: Sequence[Site], example_inputs: Any, less: int | None, device: str | None
) -> tuple[dict[str, int], dict[str, int]]:
    """(MACs, parameters) by module with `less` units less at every site, None: as few as can be; "" is the model."""
    dense = alias(model, requires_grad=True, device=device)
    keeps = []
    for site in sites:
        least = 0 if site.module else 1
        keeps.append(tuple(range(least if less is None else max(site.size - less, least))))
    smaller = carve(dense, Plan(tuple(sites), tuple(keeps)), ADAPTERS)
    params = {"": count_params(smaller)}
    for site in sites:
        params[site.name] = sum(count_params(smaller.get_submodule(path)) for path in site.modules)
    macs = _macs(smaller, example_inputs)
    by_site = {site.name: sum(macs.get(path, 0) for path in site.modules) for site in sites}
    return {"": macs[""], **by_site}, params


def _linear(sites: Sequence[Site], counts: list[dict[str, int]]) -> LinearCost:
    full, less, least = counts
    unit = [float(full[s.name] - less[s.name]) for s in sites]  # 0 where a site's only unit has to stay
    fixed = [
        float(full[s.name] - least[s.name]) - u * s.size if s.module else 0.0 for s, u in zip(sites, unit, strict=True)
    ]
    base = full[""] - sum(f + u * s.size for f, u, s in zip(fixed, unit, sites, strict=True))
    return LinearCost(float(base), tuple(fixed), tuple(unit))


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
