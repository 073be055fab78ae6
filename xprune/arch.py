"""Arch: the timm name and arguments that rebuild a model, proved before writing and checked before use."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.errors import ArtefactError
from xprune.plan import Plan
from xprune.provenance import Arch, provenance
from xprune.structure import carve, tensors

_FORBIDDEN = {
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_strict",
}
_TRANSIENT = {"training", "grad_checkpointing", "fused_attn"}
"""Attributes that say how a model is run, not what it is."""


def build(arch: Arch, device: str = "meta") -> nn.Module:
    """The architecture without weights. Downloads nothing and opens no file, whatever the name and arguments say.

    Raises ArtefactError for a name that timm does not know, or arguments that are not plain or would load weights.
    """
    if not isinstance(arch.name, str) or not timm.is_model(arch.name):
        raise ArtefactError(f"{arch.name!r} is no timm architecture; wanted a name that timm.list_models() gives.")
    for key, value in arch.kwargs:
        if key in _FORBIDDEN or not isinstance(key, str):
            raise ArtefactError(
                f"{arch.name}: the argument {key!r} is not allowed in a saved model: it can load weights."
            )
        if not _plain(value):
            raise ArtefactError(f"{arch.name}: the argument {key}={value!r} is not a number, string, or list of these.")
    try:
        with torch.device(device):
            model: nn.Module = timm.create_model(arch.name, pretrained=False, **dict(arch.kwargs))
    except Exception as error:
        raise ArtefactError(f"timm cannot build {arch.name} with {dict(arch.kwargs)}: {error}.") from error
    return model


def proven(
    model: nn.Module, plan: Plan, given: Arch | str | tuple[str, Mapping[str, Any]] | None
) -> tuple[Arch | None, str]:
    """(architecture that rebuilds the model under the plan, "") or (None, what differs).

    given   a timm name, or (name, keyword arguments); None: what the model itself carries. A given one that does not
            rebuild the model raises ArtefactError.
    """
    arch = _as_arch(given) or _carried(model)
    if arch is None:
        return None, "it carries no timm architecture"
    try:
        difference = _difference(carve(build(arch), plan, ADAPTERS), model)
    except Exception as error:
        difference = str(error)
    if difference and given is not None:
        raise ArtefactError(f"arch={given!r} does not rebuild this model: {difference}.")
    return (None, f"timm.create_model({arch.name!r}) differs: {difference}") if difference else (arch, "")


def _as_arch(given: Arch | str | tuple[str, Mapping[str, Any]] | None) -> Arch | None:
    if given is None or isinstance(given, Arch):
        return given
    if isinstance(given, str):
        return Arch(given)
    name, kwargs = given
    return Arch(name, tuple(sorted(kwargs.items())))


def _carried(model: nn.Module) -> Arch | None:
    """What the model says of itself; timm records a name and the head's size, but no other argument."""
    before = provenance(model)
    if before and before.arch:
        return before.arch
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    classes = getattr(model, "num_classes", None)
    kwargs = {"num_classes": classes} if isinstance(classes, int) and classes != (cfg or {}).get("num_classes") else {}
    return Arch(name, tuple(kwargs.items()))


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _difference(rebuilt: nn.Module, model: nn.Module) -> str:
    """The first thing in which two models differ: modules, their plain attributes, shapes of tensors; "" for none."""
    ours, theirs = dict(rebuilt.named_modules()), dict(model.named_modules())
    for path in {**ours, **theirs}:
        if path not in ours or path not in theirs:
            return f"{path} is in one of them only"
        if type(ours[path]) is not type(theirs[path]):
            return f"{path or 'the model'} is a {type(ours[path]).__name__} there, a {type(theirs[path]).__name__} here"
        a, b = _attributes(ours[path]), _attributes(theirs[path])
        for name in sorted({*a, *b} - _TRANSIENT):
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
        elif not name.startswith("_") and _plain(value):
            found[name] = tuple(value) if isinstance(value, list) else value
    return found
