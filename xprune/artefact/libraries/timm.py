"""timm: a model is a name and keyword arguments of timm.create_model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from xprune.artefact.libraries.library import Library, plain
from xprune.core.provenance import Arch
from xprune.errors import ArtefactError

_FORBIDDEN = {
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_strict",
}


def _build(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    import timm  # here and below: its import takes seconds, and other models need none of it

    if not isinstance(name, str) or not timm.is_model(name):
        raise ArtefactError(f"{name!r} is no timm architecture; wanted a name that timm.list_models() gives.")
    for key, value in kwargs.items():
        if key in _FORBIDDEN or not isinstance(key, str):
            raise ArtefactError(f"{name}: the argument {key!r} is not allowed in a saved model: it can load weights.")
        if not plain(value):
            raise ArtefactError(f"{name}: the argument {key}={value!r} is not a number, string, or list of these.")
    return create(name, **kwargs)


def create(name: str, **kwargs: Any) -> nn.Module:
    """timm.create_model; img_size and in_chans, if given, are noted where timm looks up what images a model wants."""
    import timm

    model: Any = timm.create_model(name, **kwargs)
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, Mapping) and cfg.get("input_size"):
        channels, *size = cfg["input_size"]
        given = kwargs.get("img_size") or size
        size = given if isinstance(given, (list, tuple)) else [given, given]
        model.pretrained_cfg = {**cfg, "input_size": (kwargs.get("in_chans", channels), *size)}
    assert isinstance(model, nn.Module)
    return model


def _carried(model: nn.Module) -> Arch | None:
    """timm records a name and the head's size; other arguments are for the caller to name."""
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    if not isinstance(name, str):
        return None
    import timm

    if not timm.is_model(name):
        return None
    classes = getattr(model, "num_classes", None)
    kwargs = {"num_classes": classes} if isinstance(classes, int) and classes != (cfg or {}).get("num_classes") else {}
    return Arch(name, tuple(kwargs.items()))


TIMM = Library("timm", _build, _carried, frozenset({"grad_checkpointing", "fused_attn"}))
