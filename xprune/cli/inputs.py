"""Loads the models and data that the command line names, and checks that they fit together."""

import copy
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
from xprune.core.registry import registered, resolve
from xprune.core.task import Task
from xprune.data import Data, Measured, load_data, load_measured
from xprune.errors import BudgetError, DataError, ModelError, XPruneError


def named_model(
    name: str,
    args: list[str] | None = None,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    like: Path | None = None,
) -> tuple[nn.Module, Any]:
    """Builds or loads the model that the command line names.

    Args:
        name: A folder in which xprune saved a model, or the name of a timm model.
        args: Arguments for timm.create_model, each as "key=value". None for no arguments.
        pretrained: True to use the pretrained weights of timm. They are not used if there is a checkpoint. False for
            random weights.
        checkpoint: A file with weights. None if there is none.
        like: A folder in which xprune saved a model. If `args` is empty and `name` is the architecture that was saved
            in this folder, the arguments that were saved are used. None for no such folder.

    Returns:
        (model, architecture). The architecture is a pair (timm name, arguments), from which the model can be built
        again. It is None if the model was loaded from a folder, because it then carries its architecture. It is also
        None for names of models on a hub, such as "hf-hub:...".

    Raises:
        ModelError: timm cannot build the model. Or arguments or weights are given for a model that xprune saved.
        ArtefactError: The folder does not hold a saved model.
    """
    # The import of timm takes seconds, and `xprune --help` does not need it. So the functions in this file import it.
    import timm

    # A folder may happen to have the name of a timm model. It counts as a saved model only if it holds a header.
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

    The folder of the pruned model also holds the name and the arguments of the dense model. They are used if you give
    only `checkpoint`, or if you give the same name without arguments.

    Args:
        saved: The folder of the pruned model.
        name: Name of the dense model, see `named_model`. None if only `checkpoint` is given.
        args: Arguments for timm.create_model, each as "key=value". None for no arguments.
        pretrained: True to use the pretrained weights of timm. False for random weights.
        checkpoint: A file with the weights of the dense model. None if there is none.

    Returns:
        The dense model. None if neither `name` nor `checkpoint` is given.

    Raises:
        ModelError: `name` is None, and no architecture was saved in the folder.
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

    The function builds the dense model without weights, from the architecture that was saved, and counts its costs. If
    this fails, it returns the costs that were measured in the run that saved the model.

    Args:
        saved: The folder of the pruned model.
        images: Example inputs of the model.

    Returns:
        Mapping from the name of a resource to the cost. Empty if the costs are unknown.
    """
    header = read_header(saved)
    if header["arch"]:
        try:
            dense = build(Arch.from_json(header["arch"])).eval()
            return xprune.count_resources(dense, images.to("meta"))
        except (XPruneError, NotImplementedError, RuntimeError):
            # On the device "meta", tensors have no values. A forward that depends on values fails there.
            pass
    measured = header["extra"].get("metrics", {}).get("dense", {})
    # A model may be pruned twice. The saved costs are those of the model before the last run. So they are used only if
    # that model was not pruned before.
    first = header["extra"].get("plan") is None
    found = {**measured, **measured.get("resources", {})}
    costs = {name: found[name] for name in registered("resources") if isinstance(found.get(name), (int, float))}
    return costs if first else {}


def _argument(text: str) -> tuple[str, Any]:
    """Splits "key=value" into (key, value). If the value is valid JSON, it is read as JSON, else it stays a text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ModelError(f"--model-arg {text!r} is not of the form key=value. An example: num_classes=10.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def limited(text: str) -> tuple[str, float]:
    """Splits "RESOURCE=FRACTION" into (name of the resource, fraction).

    Raises:
        BudgetError: The text does not have this form.

    Example:
        >>> limited("params=0.5")
        ('params', 0.5)
    """
    name, _, share = text.partition("=")
    try:
        return name.strip(), float(share)
    except ValueError as error:
        raise BudgetError(f"--limit {text!r} is not of the form RESOURCE=FRACTION. An example: params=0.5.") from error


def multiple(text: str) -> int | str:
    """Returns the value of --round-to as `Budget` takes it: a number if the text is one, else the text.

    Example:
        >>> multiple("8"), multiple("auto")
        (8, 'auto')
    """
    return int(text) if text.isdecimal() else text


def named_task(name: str) -> Task:
    """Returns the task that the command line names, such as "regression,measure=RMSE".

    Raises:
        PluginError: The task or a setting is unknown.
        DataError: A setting is out of range.
    """
    task: Task = resolve(name, xprune.TASKS, Task, "task")
    return task


def check_saved_task(folder: Path) -> None:
    """Raises DataError if a saved model was pruned with another task than classification.

    Folders of images have one class for each image. An accuracy of such a model would mean nothing.

    Args:
        folder: The folder of the saved model. If it holds none, nothing is checked.
    """
    if not (folder / HEADER).is_file():
        return
    settings = read_header(folder)["extra"].get("settings")
    name = settings.get("task", "classification") if isinstance(settings, dict) else "classification"
    if name != "classification":
        raise DataError(
            f"{folder} was pruned with the task {name!r}, and this command measures classification of images. Measure "
            "it in Python with xprune.evaluate(model, loader, task=...)."
        )


def with_names(task: Task, names: tuple[str, ...] | None) -> Task:
    """Returns a copy of a task with class names. Returns the task itself if it has names, or if there are none."""
    if names is None or task.class_names is not None:
        return task
    named = copy.copy(task)
    # A task may be a frozen dataclass, which refuses plain assignment.
    object.__setattr__(named, "class_names", names)
    return named


def named_data(name: str, model: nn.Module, batch_size: int, workers: int, seed: int, task: Task | None = None) -> Data:
    """Loads training and validation data, with images prepared as the model expects them.

    Raises:
        DataError: There are no such data.
        ModelError: The data have another number of classes than the head of the model. The number is not checked if the
            task is not classification.
    """
    from timm.data.config import resolve_model_data_config

    data = load_data(name, resolve_model_data_config(model), batch_size=batch_size, workers=workers, seed=seed)
    if task is None or isinstance(task, xprune.Classification):
        _check_classes(name, model, data.classes)
    return data


def measured_data(name: str, model: nn.Module, batch_size: int, workers: int) -> Measured:
    """Loads data to measure a model on. The arguments and errors are those of `named_data`."""
    from timm.data.config import resolve_model_data_config

    _check_reads_images(model)
    data = load_measured(name, resolve_model_data_config(model), batch_size=batch_size, workers=workers)
    _check_classes(name, model, data.classes)
    return data


def _check_classes(name: str, model: nn.Module, found: int) -> None:
    """Raises ModelError if the data have another number of classes (`found`) than the head of the model."""
    classes = getattr(model, "num_classes", found)
    if classes != found:
        raise ModelError(
            f"The model's head has {classes} classes, but {name} has {found}. Give a model that was trained "
            f"on these classes: --model-arg num_classes={found} with --checkpoint FILE."
        )


def _check_reads_images(model: nn.Module) -> None:
    """Raises ModelError if the model says that it reads something else than images, as models of transformers do."""
    reads = getattr(model, "main_input_name", "pixel_values")
    if reads != "pixel_values":
        raise ModelError(
            f"{type(model).__name__} reads {reads!r}, and this command gives images to the model. Use Python for other "
            "inputs: xprune.load, and then xprune.evaluate with a task, or torch.onnx.export."
        )


def example_images(model: nn.Module, rows: int) -> torch.Tensor:
    """Returns random images of the size that the model expects, float32 (rows, channels, height, width).

    The seed is fixed, so each call returns the same images.
    """
    from timm.data.config import resolve_model_data_config

    _check_reads_images(model)
    size = resolve_model_data_config(model)["input_size"]
    return torch.randn(rows, *size, generator=torch.Generator().manual_seed(0))
