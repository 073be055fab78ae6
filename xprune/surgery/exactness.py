"""Exactness: the one tolerance and the one comparison of a pruned model with the gated dense one."""

from typing import Any

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.errors import SurgeryError, XPruneError
from xprune.modules.calls import call, map_tensors, slow_path, tensors_in, to_float
from xprune.modules.copies import alias, reference_device
from xprune.modules.paths import tensor_at
from xprune.surgery.cut import remove_units
from xprune.surgery.gates import Gates

TOLERANCE = 1e-4
"""Largest error allowed, times max(1, largest output), float32, eval mode."""


@torch.no_grad()
def verify(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """The largest error of the pruned against the gated dense model; SurgeryError where it is too large."""
    try:
        error, scale = compare(model, pruned, plan, example_inputs)
    except XPruneError:
        raise
    except Exception as problem:
        raise SurgeryError(f"the pruned forward fails: {problem}. {_blame(model, plan, example_inputs)}") from problem
    if not error <= TOLERANCE * max(1.0, scale):
        raise SurgeryError(
            f"the pruned model is off by {error:.2e} (outputs up to {scale:.2e}). {_blame(model, plan, example_inputs)}"
        )
    return error


def problem(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any) -> str | None:
    """Why the pruned model is not exact, in one sentence; None where it is.

    Args:
        model: The dense model. It is not changed.
        pruned: The model that the plan was carried out on.
        plan: The units that stayed.
        example_inputs: What both are called with.
    """
    try:
        error, scale = compare(model, pruned, plan, example_inputs)
    except XPruneError as refused:
        return str(refused)
    except Exception as failure:  # whatever a forward raises is a reason here
        return f"the pruned forward fails with {type(failure).__name__}: {failure}"
    if error <= TOLERANCE * max(1.0, scale):
        return None
    return f"the pruned model is off by {error:.2e} (outputs up to {scale:.2e})"


@torch.no_grad()
def compare(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any) -> tuple[float, float]:
    """(largest |gated - pruned|, largest |gated|) over the outputs, in float32.

    Where gates need another class of a module, the largest |dense - gated with gates of 1| counts too: that class
    and the pruned one may be wrong alike.
    """
    error, scale = _difference(gated_outputs(model, plan, example_inputs), _outputs(pruned, example_inputs))
    swapped = tuple(s for s in plan.sites if s.adapter in ADAPTERS and ADAPTERS[s.adapter].gated)
    if swapped:
        open_ = gated_outputs(model, Plan.full(swapped), example_inputs)
        other, _ = _difference(_outputs(model, example_inputs), open_)
        error = max(error, other)
    return error, scale


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Outputs in float32, eval mode."""
    model = _float(alias(model))
    inputs = map_tensors(example_inputs, lambda t: to_float(t).to(reference_device(model)))
    with slow_path():
        return tensors_in(call(model, inputs))


def _difference(expected: list[Tensor], got: list[Tensor]) -> tuple[float, float]:
    """(largest |a - b|, largest |a|); SurgeryError where shapes differ."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        raise SurgeryError(
            f"outputs were {[tuple(t.shape) for t in expected]} and are now {[tuple(t.shape) for t in got]}."
        )
    pairs = [(to_float(a), to_float(b)) for a, b in zip(expected, got, strict=True) if a.numel()]
    errors = torch.stack([(a - b).abs().max() for a, b in pairs])
    return float(errors.max()), float(torch.stack([a.abs().max() for a, _ in pairs]).max())


@torch.no_grad()
def gated_outputs(model: nn.Module, plan: Plan, example_inputs: Any) -> list[Tensor]:
    """Outputs of the dense model with the gates of removed units at 0, float32, eval mode."""
    dense = _float(alias(model))
    values = []
    for site, keep in zip(plan.sites, plan.keeps, strict=True):
        value = torch.zeros(site.size)
        value[list(keep)] = 1.0
        values.append(value)
    inputs = map_tensors(example_inputs, lambda t: to_float(t).to(reference_device(model)))
    with Gates(plan.sites, values).attached(dense):
        return tensors_in(call(dense, inputs))


def _float(model: nn.Module) -> nn.Module:
    """The model itself where it is float32 throughout, else a float32 copy."""
    dtypes = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
    return model if dtypes <= {torch.float32} else alias(model).float()


def _blame(model: nn.Module, plan: Plan, example_inputs: Any) -> str:
    """Which sites fail when they are cut alone, and what to do about it."""
    bad = []
    for site, keep in zip(plan.sites, plan.keeps, strict=True):
        alone = Plan((site,), (keep,))
        try:
            error, scale = compare(model, remove_units(alias(model), alone, ADAPTERS), alone, example_inputs)
            exact = error <= TOLERANCE * max(1.0, scale)
        except Exception:
            exact = False
        if not exact:
            shapes = ", ".join(f"{cut.tensor} {tuple(tensor_at(model, cut.tensor).shape)}" for cut in site.cuts[:4])
            bad.append(f"{site.name} ({len(keep)} of {site.size} {site.kind}s kept; {shapes})")
    if not bad:
        return "No site fails alone; together they do. Your model is untouched."
    names = [entry.split(" ")[0] for entry in bad]
    return (
        f"Not exact: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}. Your model is untouched. Leave them out: "
        f"find_sites(..., exclude={names[:5]}), or write an adapter for their class."
    )
