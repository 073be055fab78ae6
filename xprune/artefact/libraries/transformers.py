"""The library transformers of Hugging Face: a model is described by the name of its class and its config.

The config is plain data.
"""

import importlib
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from xprune.artefact.libraries.library import Library, plain
from xprune.artefact.libraries.transformers_private import attention_of
from xprune.core.provenance import Arch
from xprune.errors import ArtefactError

_BASE = "transformers.modeling_utils.PreTrainedModel"
_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that a config may name. With other names, transformers may load code from the hub."""

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
"""Keys that a config must not set, at any depth, each with the reason for the error message."""


def _build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Builds a model from its config and loads no weights. See Library.build."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ArtefactError(
            f"{name} is a model of transformers, which is not installed. Run: pip install 'xprune[hf]'."
        ) from error
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and _known(kind)):
        raise ArtefactError(
            f"{name!r} is not a model class of transformers. A model class is, for example, ViTForImageClassification."
        )
    config = _decoded(config)
    _check(name, config)
    # JSON makes a copy, since the config object may keep or change its arguments. It also turns tuples into lists.
    model: nn.Module = kind(kind.config_class.from_dict(json.loads(json.dumps(config))))  # type: ignore[attr-defined]
    return model


def _known(kind: type) -> bool:
    """Returns True for a model class of transformers itself. Else False.

    It is also False for classes of transformers that wrap timm models, because they load weights.
    """
    ours = kind.__module__.startswith("transformers.models.") and ".timm_" not in kind.__module__
    return ours and any(f"{base.__module__}.{base.__qualname__}" == _BASE for base in kind.__mro__)


def _check(name: str, config: Any) -> None:
    """Checks the config of a saved model, and the configs inside it.

    Raises:
        ArtefactError: A value is not plain data, or a key could make transformers load weights or code.
    """
    if isinstance(config, (list, tuple)):
        for item in config:
            _check(name, item)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            why = _FORBIDDEN.get(key) if value else None
            if not isinstance(key, str) or key.startswith("_"):
                why = "it is not a setting of a model"
            chosen = value.values() if isinstance(value, Mapping) else (value,)
            if key == "attn_implementation" and any(each not in _ATTENTION for each in chosen):
                why = f"the allowed values are {' and '.join(_ATTENTION)}"
            if why:
                raise ArtefactError(f"{name}: {key!r}: {value!r} is not allowed in a saved config, because {why}.")
            _check(name, value)
    elif not plain(config):
        raise ArtefactError(f"{name}: the config holds {config!r}. Only numbers, strings, lists and dicts are allowed.")


def _arch_of(model: nn.Module) -> Arch | None:
    """Returns the class and config of a model of transformers.

    Returns None for a model of another library, or if the config cannot be written as JSON.
    """
    if not _known(type(model)):
        return None
    config: Any = model.config
    try:
        data = json.loads(json.dumps(_encoded(config.to_dict()), allow_nan=False))
    except (TypeError, ValueError):
        # The config holds an object, or a number such as infinity, that JSON cannot hold.
        return None
    # to_dict leaves out the implementation of attention.
    if attention_of(config) in _ATTENTION:
        data["attn_implementation"] = attention_of(config)
        # The backbone of a detection model may have another implementation than the rest of the model.
        parts = {name: getattr(config, name, None) for name in getattr(type(config), "sub_configs", ())}
        others = {name: attention_of(part) or "eager" for name, part in parts.items() if part is not None}
        if set(others.values()) - {data["attn_implementation"]}:
            data["attn_implementation"] = {"": data["attn_implementation"], **others}
    return Arch(type(model).__name__, tuple(_settings(data).items()), "transformers")


_FLOAT = "float"
"""The only key of a dict that holds a number which JSON does not know, as a text such as "inf"."""


def _encoded(data: Any) -> Any:
    """Returns the data with a dict in place of each infinite number, since JSON has none. See `_decoded`."""
    if isinstance(data, dict):
        return {key: _encoded(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_encoded(value) for value in data]
    return {_FLOAT: str(data)} if isinstance(data, float) and not math.isfinite(data) else data


def _decoded(data: Any) -> Any:
    """Returns the data that `_encoded` was given."""
    if isinstance(data, Mapping):
        if set(data) == {_FLOAT} and data[_FLOAT] in ("inf", "-inf", "nan"):
            return float(data[_FLOAT])
        return {key: _decoded(value) for key, value in data.items()}
    return [_decoded(value) for value in data] if isinstance(data, (list, tuple)) else data


def _settings(data: Any) -> Any:
    """Returns the data without private keys, at any depth.

    Private keys say, for example, where a model was loaded from.
    """
    if isinstance(data, list):
        return [_settings(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {key: _settings(value) for key, value in data.items() if not key.startswith("_")}


# Swin sets `shift_size` and `window_size` in every forward pass, from the size of the image.
TRANSFORMERS = Library(
    "transformers",
    _build,
    _arch_of,
    frozenset({"name_or_path", "gradient_checkpointing", "shift_size", "window_size"}),
)
