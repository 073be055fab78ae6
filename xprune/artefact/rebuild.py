"""Arch: the name and arguments that rebuild a model, proved before writing and checked before use."""

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
from xprune.surgery.cut import remove_units


def build(arch: Arch, device: str = "meta") -> nn.Module:
    """The architecture without weights. Downloads nothing and opens no file, whatever the name and arguments say.

    Raises ArtefactError for a library or name that is not known, or arguments that are not plain or would load
    weights.
    """
    library = LIBRARIES.get(arch.library) if isinstance(arch.library, str) else None
    if library is None:
        raise ArtefactError(f"models of {arch.library!r} cannot be rebuilt; known libraries: {', '.join(LIBRARIES)}.")
    try:
        with torch.device(device):
            return library.build(arch.name, dict(arch.kwargs))
    except ArtefactError:
        raise
    except Exception as error:
        raise ArtefactError(f"{arch.library} cannot build {arch.name} with {dict(arch.kwargs)}: {error}.") from error


def proven(
    model: nn.Module, plan: Plan, given: Arch | str | tuple[str, Mapping[str, Any]] | None
) -> tuple[Arch | None, str]:
    """(architecture that rebuilds the model under the plan, "") or (None, what differs).

    given   a timm name, or (name, keyword arguments); None: what the model itself carries. A given one that does not
            rebuild the model raises ArtefactError.
    """
    arch = _as_arch(given) or _carried(model)
    if arch is None:
        return None, f"it carries no architecture of {' or '.join(LIBRARIES)}"
    try:
        rebuilt = remove_units(build(arch), plan, ADAPTERS)
        difference = _difference(rebuilt, model, {"training", *LIBRARIES[arch.library].transient})
    except Exception as error:
        difference = str(error)
    if difference and given is not None:
        raise ArtefactError(f"arch={given!r} does not rebuild this model: {difference}.")
    return (None, f"what {arch.library} builds as {arch.name} differs: {difference}") if difference else (arch, "")


def _as_arch(given: Arch | str | tuple[str, Mapping[str, Any]] | None) -> Arch | None:
    if given is None or isinstance(given, Arch):
        return given
    if isinstance(given, str):
        return Arch(given)
    name, kwargs = given
    return Arch(name, tuple(sorted(kwargs.items())))


def _carried(model: nn.Module) -> Arch | None:
    """What the model's provenance says, or else what the model says of itself."""
    before = provenance(model)
    if before and before.arch:
        return before.arch
    found = (library.carried(model) for library in LIBRARIES.values())
    return next((arch for arch in found if arch is not None), None)


def _difference(rebuilt: nn.Module, model: nn.Module, transient: Collection[str]) -> str:
    """The first thing in which two models differ: modules, their plain attributes, shapes of tensors; "" for none."""
    ours, theirs = dict(rebuilt.named_modules()), dict(model.named_modules())
    for path in {**ours, **theirs}:
        if path not in ours or path not in theirs:
            return f"{path} is in one of them only"
        if type(ours[path]) is not type(theirs[path]):
            return f"{path or 'the model'} is a {type(ours[path]).__name__} there, a {type(theirs[path]).__name__} here"
        a, b = _attributes(ours[path]), _attributes(theirs[path])
        for name in sorted({*a, *b} - set(transient)):
            if a.get(name) != b.get(name):
                return f"{path}.{name} is {a.get(name)!r} there, {b.get(name)!r} here".lstrip(".")
    shapes, wanted = ({name: tuple(t.shape) for name, t in tensors(m).items()} for m in (rebuilt, model))
    for name in {**shapes, **wanted}:
        if shapes.get(name) != wanted.get(name):
            return f"{name} is {shapes.get(name)} there, {wanted.get(name)} here"
    return ""


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Public attributes that are plain values; a tensor among them cannot be rebuilt without weights."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[name] = f"a tensor that is neither parameter nor buffer ({tuple(value.shape)}, {value.device.type})"
        elif not name.startswith("_") and plain(value):
            found[name] = tuple(value) if isinstance(value, list) else value
    return found
