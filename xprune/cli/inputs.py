"""What the command line is given by name: models and data."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

import xprune
from xprune.artefact.libraries.timm import create
from xprune.artefact.save_load import HEADER
from xprune.data import Data, load_data
from xprune.errors import BudgetError, ModelError


def named_model(name: str, args: list[str] | None, pretrained: bool, checkpoint: Path | None) -> tuple[nn.Module, Any]:
    """(the dense model, what rebuilds it: (timm name, arguments), None for a saved one that knows)."""
    if (Path(name) / HEADER).is_file():
        return xprune.load(name), None
    kwargs = dict(_argument(arg) for arg in args or ())
    weights: dict[str, Any] = {"checkpoint_path": str(checkpoint)} if checkpoint else {}
    try:
        model: nn.Module = create(name, pretrained=pretrained, **weights, **kwargs)
    except Exception as error:
        raise ModelError(
            f"timm cannot build {name!r} with {kwargs}: {error} Give a name of timm.list_models() or a saved "
            "directory; --no-pretrained builds it without a download, --checkpoint FILE loads your weights."
        ) from error
    return model, (name, kwargs) if timm.is_model(name.partition(".")[0]) and ":" not in name else None


def _argument(text: str) -> tuple[str, Any]:
    """key=value, the value as JSON where it is JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ModelError(f"--model-arg {text!r}: wanted key=value, for example num_classes=10.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def limited(text: str) -> tuple[str, float]:
    """(resource, fraction) of "params=0.5"; BudgetError where the text is something else."""
    name, _, share = text.partition("=")
    try:
        return name.strip(), float(share)
    except ValueError as error:
        raise BudgetError(f"--limit {text!r}: wanted RESOURCE=FRACTION, for example params=0.5.") from error


def named_data(name: str, model: nn.Module, batch_size: int, workers: int, seed: int) -> Data:
    """The data of that name, as the model wants it; ModelError where the model's head has other classes."""
    data = load_data(name, resolve_model_data_config(model), batch_size=batch_size, workers=workers, seed=seed)
    classes = getattr(model, "num_classes", data.classes)
    if classes != data.classes:
        raise ModelError(
            f"the model's head has {classes} classes, {name} has {data.classes}. Prune a model that was trained "
            f"on these classes: --model-arg num_classes={data.classes} with --checkpoint FILE."
        )
    return data


def example_images(model: nn.Module, rows: int) -> torch.Tensor:
    """Noise of the size that the model wants, float32 (rows, channels, height, width), the same at every call."""
    size = resolve_model_data_config(model)["input_size"]
    return torch.randn(rows, *size, generator=torch.Generator().manual_seed(0))
