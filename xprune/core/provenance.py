"""The provenance of a pruned model: the plan that led from the original architecture to it, kept on the model itself.

On the model it is plain data: dicts, lists, strings and numbers. So a process without xprune can unpickle the model.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from xprune.core.plan import Plan

_ATTRIBUTE = "_xprune_provenance"
"""Name of the attribute of the model that holds the data."""


@dataclass(frozen=True)
class Arch:
    """An architecture of a library, with the arguments that build it.

    Args:
        name: Name in the library: a timm model name, or a class name of transformers.
        kwargs: (name, value) of each keyword argument of timm's builder, or of each item of a transformers config.
        library: "timm", "transformers", or the name of another known library.

    Example:
        >>> arch = Arch("vit_tiny_patch16_224", kwargs=(("num_classes", 10),))
        >>> Arch.from_json(arch.to_json()) == arch
        True
    """

    name: str
    kwargs: tuple[tuple[str, Any], ...] = ()
    library: str = "timm"

    def to_json(self) -> dict[str, Any]:
        """Returns the architecture as a dict, as an artefact's header holds it. `Arch.from_json` is the inverse."""
        return {"name": self.name, "kwargs": dict(self.kwargs), "library": self.library}

    @staticmethod
    def from_json(data: Any) -> "Arch":
        """Makes an architecture from what `to_json` gave.

        Args:
            data: The dict. Without the key "library" it comes from a release that knew timm only.

        Raises:
            KeyError: A key is missing.
            TypeError: The data are not a dict.
            AttributeError: "kwargs" is not a dict.
        """
        return Arch(data["name"], tuple(data["kwargs"].items()), data.get("library", "timm"))


@dataclass(frozen=True)
class Provenance:
    """Where a pruned model comes from.

    Attributes:
        plan: All plans that led to the model, joined into one plan for the original architecture.
        arch: The original architecture. None if it is not known.

    Example:
        >>> Provenance(Plan.full(())).arch is None
        True
    """

    plan: Plan
    arch: Arch | None = None


def provenance(model: nn.Module) -> Provenance | None:
    """Returns the provenance of the model. None for a model that was never pruned."""
    found: Any = getattr(model, _ATTRIBUTE, None)
    # xprune 0.1 put the object itself on the model.
    if found is None or isinstance(found, Provenance):
        return found
    return Provenance(Plan.from_json(found["plan"]), Arch.from_json(found["arch"]) if found["arch"] else None)


def record(model: nn.Module, plan: Plan, arch: Arch | None) -> None:
    """Writes the provenance on the model. A deep copy of the model keeps it.

    Args:
        model: The model, which gets an attribute.
        plan: All plans so far as one plan for the original architecture.
        arch: The original architecture. None if it is not known.
    """
    plain = {"plan": plan.to_json(), "arch": arch.to_json() if arch else None}
    # Past nn.Module.__setattr__, which some models override.
    object.__setattr__(model, _ATTRIBUTE, plain)


def inherit(dense: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Records on `pruned` how it came about: the provenance of `dense`, if any, followed by `plan`.

    Args:
        dense: The model that was cut. It may be a pruned model already.
        pruned: The model that the cut gave. It gets the record.
        plan: The plan of this cut, for the units of `dense`.
    """
    before = provenance(dense)
    record(pruned, before.plan.then(plan) if before else plan, before.arch if before else None)
