"""Provenance: the plan that led from the original architecture to a pruned model, carried on the model itself.

On the model it is plain data (dicts, lists, strings, numbers), so that a model that is pickled whole can be read in a
process that does not have xprune.
"""

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

    def to_json(self) -> dict[str, Any]:
        """Plain data, as an artefact's header holds it. `Arch.from_json` is the inverse."""
        return {"name": self.name, "kwargs": dict(self.kwargs), "library": self.library}

    @staticmethod
    def from_json(data: Any) -> "Arch":
        """An architecture from plain data.

        Args:
            data: What `to_json` gave. Data without a library are of the time when timm was the only one.

        Raises:
            KeyError, TypeError, AttributeError: The data are of another form.
        """
        return Arch(data["name"], tuple(data["kwargs"].items()), data.get("library", "timm"))


@dataclass(frozen=True)
class Provenance:
    """Where a pruned model comes from.

    plan   all plans so far as one, relative to the original architecture
    arch   the original architecture, None where it is not known
    """

    plan: Plan
    arch: Arch | None = None


def provenance(model: nn.Module) -> Provenance | None:
    """The model's provenance, None for a model that was never pruned."""
    found: Any = getattr(model, _ATTRIBUTE, None)
    if found is None or isinstance(found, Provenance):  # xprune 0.1 put the object itself on the model
        return found
    return Provenance(Plan.from_json(found["plan"]), Arch.from_json(found["arch"]) if found["arch"] else None)


def record(model: nn.Module, plan: Plan, arch: Arch | None) -> None:
    """Writes the provenance on the model. A deep copy of the model keeps it."""
    plain = {"plan": plan.to_json(), "arch": arch.to_json() if arch else None}
    object.__setattr__(model, _ATTRIBUTE, plain)


def inherit(dense: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Records on `pruned` the plan that led to `dense`, if any, followed by `plan`."""
    before = provenance(dense)
    record(pruned, before.plan.then(plan) if before else plan, before.arch if before else None)
