"""Records on a pruned model which original architecture it comes from, and which plan led to it.

This record is the provenance of the model. `save` writes it to the artefact, so that `load` can rebuild the pruned
model.

The record is an attribute of the model. It consists of dicts, lists, strings and numbers. So a program without xprune
can unpickle the model.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from xprune.core.plan import Plan

_ATTRIBUTE = "_xprune_provenance"
"""The name of the attribute of a model that holds its provenance."""


@dataclass(frozen=True)
class Arch:
    """The name of an architecture in a library, and the arguments that build it. For example, a timm model name.

    Args:
        name: The name of the architecture: a timm model name, or a class name of transformers.
        kwargs: Tuples (name, value). For timm, they are keyword arguments of `timm.create_model`. For transformers,
            they are the entries of the config.
        library: The library: "timm", "transformers", or another name that xprune knows.

    Example:
        >>> arch = Arch("vit_tiny_patch16_224", kwargs=(("num_classes", 10),))
        >>> Arch.from_json(arch.to_json()) == arch
        True
    """

    name: str
    kwargs: tuple[tuple[str, Any], ...] = ()
    library: str = "timm"

    def to_json(self) -> dict[str, Any]:
        """Returns the architecture as a dict. Artefacts store it. `Arch.from_json` reads the dict."""
        return {"name": self.name, "kwargs": dict(self.kwargs), "library": self.library}

    @staticmethod
    def from_json(data: Any) -> "Arch":
        """Makes an architecture from the dict that `to_json` returned.

        Args:
            data: The dict. If it has no key "library", the library is "timm", because old releases knew only timm.

        Raises:
            KeyError: A key is missing.
            TypeError: The data are not a dict.
            AttributeError: "kwargs" is not a dict.
        """
        return Arch(data["name"], tuple(data["kwargs"].items()), data.get("library", "timm"))


@dataclass(frozen=True)
class Provenance:
    """The original architecture of a pruned model, and the plan that led to the pruned model.

    Attributes:
        plan: The plan that leads from the original architecture to the pruned model. If the model was pruned several
            times, it is all plans joined into one.
        arch: The original architecture. None if it is not known.

    Example:
        >>> Provenance(Plan.full(())).arch is None
        True
    """

    plan: Plan
    arch: Arch | None = None


def provenance(model: nn.Module) -> Provenance | None:
    """Returns the provenance of a model. None if the model was never pruned."""
    found: Any = getattr(model, _ATTRIBUTE, None)
    # xprune 0.1 stored a `Provenance` object on the model instead of plain data.
    if found is None or isinstance(found, Provenance):
        return found
    return Provenance(Plan.from_json(found["plan"]), Arch.from_json(found["arch"]) if found["arch"] else None)


def record(model: nn.Module, plan: Plan, arch: Arch | None) -> None:
    """Stores the provenance of a model as an attribute of the model. A deep copy of the model keeps the attribute.

    Args:
        model: The pruned model. It gets the attribute.
        plan: The plan that leads from the original architecture to this model.
        arch: The original architecture. None if it is not known.
    """
    plain = {"plan": plan.to_json(), "arch": arch.to_json() if arch else None}
    # Some models override `__setattr__` of nn.Module. `object.__setattr__` does not call their version.
    object.__setattr__(model, _ATTRIBUTE, plain)


def inherit(dense: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Records the provenance of a model that was just cut. Surgery calls it after every cut.

    If the model before the cut has a provenance, the new plan is joined to the plan in it.

    Args:
        dense: The model before the cut. It may be a pruned model already.
        pruned: The model after the cut. It gets the record.
        plan: The plan of this cut. Its indices count the units of `dense`.
    """
    before = provenance(dense)
    record(pruned, before.plan.then(plan) if before else plan, before.arch if before else None)
