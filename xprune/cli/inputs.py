"""What the command line is given by name: models and data."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import xprune
from xprune.artefact.files import HEADER
from xprune.artefact.libraries.timm import create
from xprune.artefact.rebuild import build
from xprune.artefact.save_load import read_header
from xprune.core.provenance import Arch
from xprune.core.registry import registered
from xprune.data import Data, Measured, load_data, load_measured
from xprune.errors import BudgetError, ModelError, XPruneError


def named_model(
    name: str,
    args: list[str] | None = None,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    like: Path | None = None,
) -> tuple[nn.Module, Any]:
    """A model by what the command line says of it.

    Args:
        name: A directory that xprune saved, or a name of timm.
        args: key=value for timm.create_model.
        pretrained: Whether timm's weights are wanted. They are not where there is a checkpoint.
        checkpoint: A file of weights.
        like: A directory that xprune saved. Its arguments are taken where the name is its architecture's and `args` is
            empty.

    Returns:
        The model, and what rebuilds it: (timm name, arguments), None for a saved one, which knows.

    Raises:
        ModelError: timm cannot build it, or a saved model is given arguments or weights besides its own.
        ArtefactError: The directory is no saved model.
    """
    import timm  # here and below: its import takes seconds, and `xprune --help` needs none of it

    if (Path(name) / HEADER).is_file() or (Path(name).is_dir() and not timm.is_model(name)):
        if args or checkpoint:
            raise ModelError(
                f"{name} is a saved model and has its own arguments and weights: leave out "
                f"{'--model-arg' if args else '--checkpoint'}."
            )
        return xprune.load(name), None
    kwargs = dict(_argument(arg) for arg in args or ())
    saved = read_header(like)["arch"] if like and not args else None
    if saved and saved["name"] == name:
        kwargs = dict(saved["kwargs"])
    weights: dict[str, Any] = {"checkpoint_path": str(checkpoint)} if checkpoint else {}
    try:
        model: nn.Module = create(name, pretrained=pretrained and not checkpoint, **weights, **kwargs)
    except Exception as error:
        raise ModelError(
            f"timm cannot build {name!r} with {kwargs}: {error} Give a name of timm.list_models() or a saved "
            "directory; --no-pretrained builds it without a download, --checkpoint FILE loads your weights."
        ) from error
    return model, (name, kwargs) if timm.is_model(name.partition(".")[0]) and ":" not in name else None


def dense_model(
    saved: Path, name: str | None, args: list[str] | None, pretrained: bool, checkpoint: Path | None
) -> nn.Module | None:
    """The dense model that a saved one came from, None where neither its name nor its weights were given.

    Its name and arguments are the saved model's own where they are not given.
    """
    if name is None and checkpoint is None:
        return None
    if name is None:
        arch = read_header(saved)["arch"]
        if not arch:
            raise ModelError(f"{saved} does not say which architecture it came from: give --model NAME.")
        name = str(arch["name"])
    return named_model(name, args, pretrained, checkpoint, like=saved)[0]


def dense_costs(saved: Path, images: torch.Tensor) -> dict[str, float]:
    """What the dense model costs that a saved one came from, by the names of resources; empty where it is not known.

    They are counted on the architecture that the header names, built without weights; else they are what was measured
    when the model was saved.
    """
    header = read_header(saved)
    if header["arch"]:
        try:
            dense = build(Arch.from_json(header["arch"])).eval()
            return xprune.count_resources(dense, images.to("meta"))
        except (XPruneError, NotImplementedError, RuntimeError):  # a forward that looks at values needs weights
            pass
    measured = header["extra"].get("metrics", {}).get("dense", {})
    first = header["extra"].get("plan") is None  # the run pruned the model that the header's plan begins with
    found = {**measured, **measured.get("resources", {})}
    costs = {name: found[name] for name in registered("resources") if isinstance(found.get(name), (int, float))}
    return costs if first else {}


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
    """Data of that name to prune with, as the model wants them; ModelError where the model's head has other classes."""
    from timm.data.config import resolve_model_data_config

    data = load_data(name, resolve_model_data_config(model), batch_size=batch_size, workers=workers, seed=seed)
    _check_classes(name, model, data.classes)
    return data


def measured_data(name: str, model: nn.Module, batch_size: int, workers: int) -> Measured:
    """Data of that name to measure on, as the model wants them; ModelError where its head has other classes."""
    from timm.data.config import resolve_model_data_config

    data = load_measured(name, resolve_model_data_config(model), batch_size=batch_size, workers=workers)
    _check_classes(name, model, data.classes)
    return data


def _check_classes(name: str, model: nn.Module, found: int) -> None:
    classes = getattr(model, "num_classes", found)
    if classes != found:
        raise ModelError(
            f"the model's head has {classes} classes, {name} has {found}. Give a model that was trained "
            f"on these classes: --model-arg num_classes={found} with --checkpoint FILE."
        )


def example_images(model: nn.Module, rows: int) -> torch.Tensor:
    """Noise of the size that the model wants, float32 (rows, channels, height, width), the same at every call."""
    from timm.data.config import resolve_model_data_config

    size = resolve_model_data_config(model)["input_size"]
    return torch.randn(rows, *size, generator=torch.Generator().manual_seed(0))
