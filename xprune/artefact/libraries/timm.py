"""Saves models of timm: a model is a name and keyword arguments of timm.create_model."""

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
"""Arguments that make timm load weights, from the hub or from a file."""


def _build(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Builds a model and loads no weights, see Library.build."""
    # Importing timm takes seconds, and models of other libraries do not need it. So each function here imports it.
    import timm

    # timm.create_model also takes names such as "hf-hub:...", for which it downloads. They are no models of timm.
    if not isinstance(name, str) or not timm.is_model(name):
        raise ArtefactError(f"{name!r} is no timm architecture. Give a name from timm.list_models().")
    for key, value in kwargs.items():
        if key in _FORBIDDEN or not isinstance(key, str):
            raise ArtefactError(
                f"{name}: the argument {key!r} is not allowed in a saved model, because it can load weights."
            )
        if not plain(value):
            raise ArtefactError(
                f"{name}: the argument {key}={value!r} is not allowed. Give a number, a string, or a list of these."
            )
    return create(name, **kwargs)


def create(name: str, **kwargs: Any) -> nn.Module:
    """Calls timm.create_model, and notes the size of the images in the config of the model.

    timm reads the size and channels of images from `pretrained_cfg["input_size"]`, and create_model leaves it as it is
    for other sizes.

    Args:
        name: The name of the architecture.
        **kwargs: Its arguments. `img_size` and `in_chans` are noted if they are given.

    Example:
        >>> model = create("test_vit", img_size=32)
        >>> model.pretrained_cfg["input_size"]
        (3, 32, 32)
    """
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


def _arch_of(model: nn.Module) -> Arch | None:
    """Returns the name and number of classes that timm wrote on a model, or None for any other model.

    timm does not write down other arguments. If there were any, the proof fails, and the caller has to name them.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    # A model without such a config is not timm's, so timm does not have to be imported.
    if not isinstance(name, str):
        return None
    import timm

    if not timm.is_model(name):
        return None
    classes = getattr(model, "num_classes", None)
    kwargs = {"num_classes": classes} if isinstance(classes, int) and classes != (cfg or {}).get("num_classes") else {}
    return Arch(name, tuple(kwargs.items()))


TIMM = Library("timm", _build, _arch_of, frozenset({"grad_checkpointing", "fused_attn"}))
