"""Finds the name and arguments that build the dense model again, and proves that they do.

An artefact holds the weights of the pruned model and the plan. To load it, the dense model is built without weights,
cut by the plan, and filled. `Arch` is the name and arguments of the dense model. It is saved only if this way leads to
the saved model. The check runs on the meta device, so it needs no memory for weights.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.artefact.libraries import LIBRARIES
from xprune.artefact.libraries.library import plain
from xprune.core.plan import Plan
from xprune.core.provenance import Arch, provenance
from xprune.errors import ArtefactError
from xprune.modules.copies import tensors
from xprune.modules.forward import error_text
from xprune.surgery.cut import remove_units


def build(arch: Arch, device: str = "meta") -> nn.Module:
    """Builds a model without weights. Downloads nothing and opens no file, even if the name or arguments ask for it.

    Args:
        arch: The library, the name of the architecture in it, and its arguments.
        device: Where the parameters are. On "meta", the default, they have shapes and no values.

    Raises:
        ArtefactError: The library or name is not known, or an argument is not plain data or would load weights.

    Example:
        >>> model = build(Arch("test_vit", (("num_classes", 3),)))
        >>> model.head.weight.shape, model.head.weight.device.type
        (torch.Size([3, 64]), 'meta')
    """
    library = LIBRARIES.get(arch.library) if isinstance(arch.library, str) else None
    if library is None:
        raise ArtefactError(
            f"models of the library {arch.library!r} cannot be built again; known libraries: {', '.join(LIBRARIES)}. "
            "Give load(..., model_fn=), a function that builds the dense model."
        )
    try:
        with torch.device(device):
            return library.build(arch.name, dict(arch.kwargs))
    except ArtefactError:
        raise
    except Exception as error:
        raise ArtefactError(
            f"{arch.library} cannot build {arch.name} with the arguments {dict(arch.kwargs)}: {error}."
        ) from error


def proved_arch(
    model: nn.Module, plan: Plan, given: Arch | str | tuple[str, Mapping[str, Any]] | None
) -> tuple[Arch | None, str]:
    """Finds the architecture of the dense model, and proves that it gives the pruned model when the plan cuts it.

    Args:
        model: The pruned model.
        plan: The plan from the dense model to this one.
        given: A timm name, a timm name with keyword arguments, or an Arch. None means what the model itself carries.

    Returns:
        The architecture and "". Or None and the reason why there is none.

    Raises:
        ArtefactError: The given architecture gives another model.

    Example:
        >>> proved_arch(nn.Linear(2, 3), Plan((), ()), given=None)
        (None, 'the model carries no name of an architecture of timm or transformers')
    """
    arch = _as_arch(given) or _carried(model)
    if arch is None:
        return None, f"the model carries no name of an architecture of {' or '.join(LIBRARIES)}"
    try:
        rebuilt = remove_units(build(arch), plan, ADAPTERS)
        difference = _difference(rebuilt, model, {"training", *LIBRARIES[arch.library].transient})
    except Exception as error:
        # An error may have no message. Its kind is named too, since an empty text would mean that nothing differs.
        difference = error_text(error)
    if difference and given is not None:
        raise ArtefactError(f"arch={given!r} does not rebuild this model: {difference.rstrip('.')}.")
    return (None, f"what {arch.library} builds as {arch.name} differs: {difference}") if difference else (arch, "")


def _as_arch(given: Arch | str | tuple[str, Mapping[str, Any]] | None) -> Arch | None:
    """Returns an Arch for what a user may give, or None for None. Names are those of timm."""
    if given is None or isinstance(given, Arch):
        return given
    if isinstance(given, str):
        return Arch(given)
    name, kwargs = given
    return Arch(name, tuple(sorted(kwargs.items())))


def _carried(model: nn.Module) -> Arch | None:
    """Returns the architecture from the model's provenance, or what its library wrote on the model, or None."""
    before = provenance(model)
    if before and before.arch:
        return before.arch
    found = (library.arch_of(model) for library in LIBRARIES.values())
    return next((arch for arch in found if arch is not None), None)


def _difference(rebuilt: nn.Module, model: nn.Module, transient: Collection[str]) -> str:
    """Returns the first difference between two models, or "" if there is none.

    Compared are the paths and classes of modules, their plain attributes, and the shapes of tensors. Weights are not
    compared, since the rebuilt model has none.

    Args:
        rebuilt: The model that the architecture gives.
        model: The model that is saved.
        transient: Names of attributes that may differ, because they say how a model is run.
    """
    there, here = dict(rebuilt.named_modules()), dict(model.named_modules())
    for path in {**there, **here}:
        if path not in there or path not in here:
            return f"{path} is in one of the two models only"
        if type(there[path]) is not type(here[path]):
            return f"{path or 'the model'} is a {type(there[path]).__name__} there, a {type(here[path]).__name__} here"
        values_there, values_here = _attributes(there[path]), _attributes(here[path])
        for name in sorted({*values_there, *values_here} - set(transient)):
            if values_there.get(name) != values_here.get(name):
                return f"{path}.{name} is {values_there.get(name)!r} there, {values_here.get(name)!r} here".lstrip(".")
    shapes_there, shapes_here = ({name: tuple(t.shape) for name, t in tensors(m).items()} for m in (rebuilt, model))
    for name in {**shapes_there, **shapes_here}:
        if shapes_there.get(name) != shapes_here.get(name):
            return f"{name} is {shapes_there.get(name)} there, {shapes_here.get(name)} here"
    return ""


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the public attributes of a module that are plain values, and a description of tensors among them.

    A tensor that is neither parameter nor buffer is not saved with the weights. The description holds its device, so
    it differs between a model on meta and one with weights, and the model counts as not rebuilt.
    """
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[name] = f"a tensor that is neither parameter nor buffer ({tuple(value.shape)}, {value.device.type})"
        elif not name.startswith("_") and plain(value):
            found[name] = tuple(value) if isinstance(value, list) else value
    return found
