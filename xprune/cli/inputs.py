"""Models and data that the command line names: builds and loads them, and checks that they fit together."""

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
    """Builds or loads the model that the command line names.

    Args:
        name: A folder that xprune saved, or the name of a timm model.
        args: Arguments "key=value" of timm.create_model.
        pretrained: True to use timm's pretrained weights. They are not used if there is a checkpoint.
        checkpoint: A file of weights. None for no file.
        like: A folder that xprune saved. If `name` is the architecture of this folder and `args` is empty, the
            arguments of the folder are used.

    Returns:
        The model, and its architecture (timm name, arguments), from which it can be built again. The architecture is
        None for a model from a folder, which holds it, and for names that only timm's hub resolves.

    Raises:
        ModelError: timm cannot build the model, or arguments or weights are given for a saved model.
        ArtefactError: The folder is not a saved model.
    """
    # Importing timm takes seconds, and `xprune --help` does not need it. So each function here imports it.
    import timm

    # A folder may have the name of a timm model by chance. It is only taken as a saved model if it holds a header.
    if (Path(name) / HEADER).is_file() or (Path(name).is_dir() and not timm.is_model(name)):
        if args or checkpoint:
            raise ModelError(
                f"{name} is a saved model, which has its own arguments and weights. Leave out "
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
            f"timm cannot build {name!r} with {kwargs}: {error} Give a name from timm.list_models() or a folder that "
            "xprune saved. With --no-pretrained nothing is downloaded. With --checkpoint FILE your weights are loaded."
        ) from error
    return model, (name, kwargs) if timm.is_model(name.partition(".")[0]) and ":" not in name else None


def dense_model(
    saved: Path, name: str | None, args: list[str] | None, pretrained: bool, checkpoint: Path | None
) -> nn.Module | None:
    """Builds the dense model from which a saved model was pruned.

    A name or arguments that are not given are read from the saved folder.

    Args:
        saved: The folder of the pruned model.
        name: Name of the dense model, see `named_model`. None if only its weights are given.
        args: Arguments "key=value" of timm.create_model.
        pretrained: True to use timm's pretrained weights.
        checkpoint: A file with the weights of the dense model.

    Returns:
        The dense model. None if neither its name nor its weights are given.

    Raises:
        ModelError: The folder does not hold the architecture, and no name is given.
    """
    if name is None and checkpoint is None:
        return None
    if name is None:
        arch = read_header(saved)["arch"]
        if not arch:
            raise ModelError(f"{saved} does not hold the architecture of the dense model. Give it with --model NAME.")
        name = str(arch["name"])
    return named_model(name, args, pretrained, checkpoint, like=saved)[0]


def dense_costs(saved: Path, images: torch.Tensor) -> dict[str, float]:
    """Returns the costs of the dense model from which a saved model was pruned.

    They are counted on the architecture in the header, which is built without weights. If that fails, they are the
    costs that were measured when the model was saved.

    Args:
        saved: The folder of the pruned model.
        images: Example inputs of the model.

    Returns:
        Costs by the names of resources. Empty if they are unknown.
    """
    header = read_header(saved)
    if header["arch"]:
        try:
            dense = build(Arch.from_json(header["arch"])).eval()
            return xprune.count_resources(dense, images.to("meta"))
        except (XPruneError, NotImplementedError, RuntimeError):
            # Without weights (device "meta") a forward that depends on values of tensors fails.
            pass
    measured = header["extra"].get("metrics", {}).get("dense", {})
    # A model may be pruned twice. The measured costs are those of the model that the last run was given, so they are
    # used only if that was the first model.
    first = header["extra"].get("plan") is None
    found = {**measured, **measured.get("resources", {})}
    costs = {name: found[name] for name in registered("resources") if isinstance(found.get(name), (int, float))}
    return costs if first else {}


def _argument(text: str) -> tuple[str, Any]:
    """Splits "key=value". The value is read as JSON if it is JSON, otherwise it is a text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ModelError(f"--model-arg {text!r} is not of the form key=value. An example: num_classes=10.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def limited(text: str) -> tuple[str, float]:
    """Splits "RESOURCE=FRACTION" into its two parts.

    Raises:
        BudgetError: The text has another form.

    Example:
        >>> limited("params=0.5")
        ('params', 0.5)
    """
    name, _, share = text.partition("=")
    try:
        return name.strip(), float(share)
    except ValueError as error:
        raise BudgetError(f"--limit {text!r} is not of the form RESOURCE=FRACTION. An example: params=0.5.") from error


def named_data(name: str, model: nn.Module, batch_size: int, workers: int, seed: int) -> Data:
    """Loads the data for pruning, with images as the model expects them.

    Raises:
        DataError: There is no such data.
        ModelError: The model's head has another number of classes.
    """
    from timm.data.config import resolve_model_data_config

    data = load_data(name, resolve_model_data_config(model), batch_size=batch_size, workers=workers, seed=seed)
    _check_classes(name, model, data.classes)
    return data


def measured_data(name: str, model: nn.Module, batch_size: int, workers: int) -> Measured:
    """Loads the data for measuring, with images as the model expects them. Errors are those of `named_data`."""
    from timm.data.config import resolve_model_data_config

    data = load_measured(name, resolve_model_data_config(model), batch_size=batch_size, workers=workers)
    _check_classes(name, model, data.classes)
    return data


def _check_classes(name: str, model: nn.Module, found: int) -> None:
    """Raises ModelError if the model's head has another number of classes than the data."""
    classes = getattr(model, "num_classes", found)
    if classes != found:
        raise ModelError(
            f"The model's head has {classes} classes, but {name} has {found}. Give a model that was trained "
            f"on these classes: --model-arg num_classes={found} with --checkpoint FILE."
        )


def example_images(model: nn.Module, rows: int) -> torch.Tensor:
    """Returns noise of the size that the model expects, float32 (rows, channels, height, width).

    The seed is fixed, so it is the same at each call.
    """
    from timm.data.config import resolve_model_data_config

    size = resolve_model_data_config(model)["input_size"]
    return torch.randn(rows, *size, generator=torch.Generator().manual_seed(0))
