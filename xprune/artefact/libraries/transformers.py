"""Hugging Face transformers: a model is the name of a class there and its config, as plain data."""

import importlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from xprune.artefact.libraries.library import Library, plain
from xprune.artefact.libraries.transformers_private import attention_of
from xprune.core.provenance import Arch
from xprune.errors import ArtefactError

_BASE = "transformers.modeling_utils.PreTrainedModel"
_ATTENTION = ("eager", "sdpa")
_FORBIDDEN = {
    "auto_map": "it names code to run",
    "custom_pipelines": "it names code to run",
    "trust_remote_code": "it lets code run",
    "quantization_config": "it asks for quantised weights",
    "backbone": "it names weights to load",
    "use_pretrained_backbone": "it asks for weights to load",
    "use_timm_backbone": "it names weights to load",
    "experts_implementation": "it can name code to run",
    "name_or_path": "it names weights to load",
}
"""Keys that a config may not set, at any depth, and why."""


def _build(name: str, config: Mapping[str, Any]) -> nn.Module:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ArtefactError(f"{name} is a model of transformers: pip install 'xprune[hf]'.") from error
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and _known(kind)):
        raise ArtefactError(f"{name!r} is no model class of transformers, such as ViTForImageClassification.")
    _check(name, config)
    model: nn.Module = kind(kind.config_class.from_dict(json.loads(json.dumps(config))))  # type: ignore[attr-defined]
    return model


def _known(kind: type) -> bool:
    """True for transformers' own models. Its wrappers of timm's are none: they load what a name says."""
    ours = kind.__module__.startswith("transformers.models.") and ".timm_" not in kind.__module__
    return ours and any(f"{base.__module__}.{base.__qualname__}" == _BASE for base in kind.__mro__)


def _check(name: str, config: Any) -> None:
    """ArtefactError for a config, or one inside it, that is not plain or could load weights or code."""
    if isinstance(config, (list, tuple)):
        for item in config:
            _check(name, item)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            why = _FORBIDDEN.get(key) if value else None
            if not isinstance(key, str) or key.startswith("_"):
                why = "it is no setting"
            if key == "attn_implementation" and value not in _ATTENTION:
                why = f"allowed are {' and '.join(_ATTENTION)}"
            if why:
                raise ArtefactError(f"{name}: {key!r}: {value!r} is not allowed in a saved config: {why}.")
            _check(name, value)
    elif not plain(config):
        raise ArtefactError(f"{name}: the config holds {config!r}, which is no plain data.")


def _carried(model: nn.Module) -> Arch | None:
    if not _known(type(model)):
        return None
    config: Any = model.config
    try:
        data = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    except (TypeError, ValueError):  # holds what is no plain data
        return None
    if attention_of(config) in _ATTENTION:
        data["attn_implementation"] = attention_of(config)
    return Arch(type(model).__name__, tuple(_settings(data).items()), "transformers")


def _settings(data: Any) -> Any:
    """The data without private keys, which say where a model came from, at any depth."""
    if isinstance(data, list):
        return [_settings(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {key: _settings(value) for key, value in data.items() if not key.startswith("_")}


# Swin sets its windows in every forward pass, from the size of the image.
TRANSFORMERS = Library(
    "transformers",
    _build,
    _carried,
    frozenset({"name_or_path", "gradient_checkpointing", "shift_size", "window_size"}),
)
