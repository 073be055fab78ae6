"""The library timm: a model is described by a name and keyword arguments of timm.create_model."""

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
"""Arguments that make timm load weights, from the Hugging Face hub or from a file."""


def _build(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Builds a timm model and loads no weights. See Library.build."""
    # Importing timm takes seconds, and models of other libraries do not need it. So each function here imports it.
    import timm

    # timm.create_model also accepts names such as "hf-hub:...", and downloads such models. `timm.is_model` is False for
    # these names.
    if not isinstance(name, str) or not timm.is_model(name):
        raise ArtefactError(f"{name!r} is not an architecture of timm. Give a name from timm.list_models().")
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
    """Calls timm.create_model, and writes the size of the images into the config of the model.

    timm reads the size and channels of images from `pretrained_cfg["input_size"]`. create_model does not change this
    value if the model is built for another size.

    Args:
        name: The name of the architecture.
        **kwargs: The keyword arguments of timm.create_model. If `img_size` or `in_chans` are given, they are written
            into the config.

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
    """Returns the architecture of a timm model, from the name and number of classes that timm wrote on it.

    timm does not write other arguments on the model. If there were any, the proof in `proved_arch` fails, and the user
    has to give the arguments. Returns None for a model of another library.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    # A model without such a config is not from timm. So timm is not imported for it.
    if not isinstance(name, str):
        return None
    import timm

    if not timm.is_model(name):
        return None
    classes = getattr(model, "num_classes", None)
    kwargs = {"num_classes": classes} if isinstance(classes, int) and classes != (cfg or {}).get("num_classes") else {}
    return Arch(name, tuple(kwargs.items()))


TIMM = Library("timm", _build, _arch_of, frozenset({"grad_checkpointing", "fused_attn"}))
