"""Provenance: the plan that led from the original architecture to a pruned model, carried on the model itself."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from xprune.core.plan import Plan

_ATTRIBUTE = "_xprune_provenance"


@dataclass(frozen=True)
class Arch:
    """The name of an architecture in a library and what builds it: keyword arguments, or the items of its config."""

    name: str
    kwargs: tuple[tuple[str, Any], ...] = ()
    library: str = "timm"


@dataclass(frozen=True)
class Provenance:
    """Where a pruned model comes from: all plans so far as one, and the original architecture where it is known."""

    plan: Plan
    arch: Arch | None = None


def provenance(model: nn.Module) -> Provenance | None:
    """The model's provenance, None for a model that was never pruned."""
    found: Provenance | None = getattr(model, _ATTRIBUTE, None)
    return found


def record(model: nn.Module, plan: Plan, arch: Arch | None) -> None:
    """Writes the provenance on the model; a deep copy keeps it."""
    object.__setattr__(model, _ATTRIBUTE, Provenance(plan, arch))


def inherit(dense: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Records on `pruned` the plan that led to `dense`, if any, followed by `plan`."""
    before = provenance(dense)
    record(pruned, before.plan.then(plan) if before else plan, before.arch if before else None)
