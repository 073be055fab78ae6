"""Computes digests of everything that a cell was made from: model, sites, data, task and settings.

A cell is one combination of the things that a comparison compares. A comparison uses a cell of its file again only if
these digests are equal. So no table shows results of another model or of other data.
"""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, Subset, TensorDataset

from xprune.core.provenance import provenance
from xprune.modules.digest import digest_of, structure_digest, values_digest
from xprune.modules.undisturbed import seeded
from xprune.pipeline import Run
from xprune.training.runtime import known_length

Subject = dict[str, Any]
"""A description of the model and the data that cells were made from. Each part is a digest, or data for JSON.

The names of the parts are those that `subject` returns, such as "weights".
"""


def subject(run: Run) -> Subject:
    """Describes the model and the data of a run, so that a comparison can tell whether its cells may be used again.

    Args:
        run: The run.

    Returns:
        A dict of digests: "weights", "structure", "arguments" (of the architecture), "sites" and "task". And two dicts,
        "training data" and "held-out data", see `_data`.
    """
    made, config = provenance(run.model), getattr(run.model, "config", None)
    arguments: Any = made.arch if made else getattr(run.model, "default_cfg", None)
    # Models of Hugging Face have a config, which contains all arguments of the architecture.
    if config is not None and hasattr(config, "to_dict"):
        arguments = config.to_dict()
    return {
        "weights": values_digest(run.model),
        "structure": structure_digest(run.model),
        "arguments": digest_of(arguments),
        # The costs of a part also depend on where it ends. Cells of whole models keep their digests.
        "sites": digest_of((run.sites, run.inside) if run.inside else run.sites),
        "task": digest_of(run.task),
        "training data": _data(run.train, run.first),
        "held-out data": _data(run.held_out, run.first_held_out),
    }


def cell_digest(settings: Mapping[str, Any]) -> str:
    """Returns a digest of the settings of one cell. Equal settings have equal digests."""
    return digest_of(settings)


def _data(loader: Any, first: Any) -> dict[str, Any]:
    """Describes the data of a loader without reading all of them.

    Args:
        loader: The loader. If it is a list of batches, all of them are read.
        first: The first batch.

    Returns:
        A dict. "batches" and "samples" are numbers, or None if the loader or its data set has no length. "first batch"
        is a digest of the first batch. "contents" is a digest of the data set, see `_contents`.
    """
    dataset = getattr(loader, "dataset", None)
    return {
        "batches": known_length(loader),
        "samples": len(dataset) if isinstance(dataset, Sized) else None,
        "first batch": digest_of(first),
        "contents": digest_of(loader if isinstance(loader, (list, tuple)) else _contents(dataset)),
    }


SAMPLES = 32
"""The number of samples that are read from a data set of an unknown class. They are distributed evenly over it."""


def _contents(dataset: Any) -> Any:
    """Returns a value that changes if a data set changes. Its digest shows whether two loaders have the same data.

    Args:
        dataset: The data set of a loader. None if the loader has none.

    Returns:
        If the data set is a TensorDataset, its tensors. If it is a folder of images, the name, label, size and time of
        each file. If it is any other data set that can be indexed, some of its samples, as many as `SAMPLES` says. If
        it is a Subset, the indices and the value for the whole data set. None if the data set cannot be read in any of
        these ways.
    """
    if isinstance(dataset, Subset):
        return "subset", list(dataset.indices), _contents(dataset.dataset)
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    # Data sets of image folders have a list of (file, label). In timm, it belongs to their reader. In torchvision, it
    # belongs to the data set itself.
    folder = getattr(dataset, "reader", dataset)
    files = getattr(folder, "samples", None)
    if isinstance(files, list) and files and isinstance(files[0], (tuple, list)):
        root = str(getattr(folder, "root", ""))
        return [(str(file), target, *_size_and_time(Path(root), str(file))) for file, target, *_ in files]
    # A data set that can only be iterated inherits `__getitem__`, but does not implement it.
    if isinstance(dataset, IterableDataset):
        return None
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        spread = sorted({index * max(len(dataset) - 1, 0) // max(SAMPLES - 1, 1) for index in range(SAMPLES)})
        # If samples are augmented at random, the seed makes them the same at every call.
        with seeded(0):
            return [dataset[index] for index in spread if index < len(dataset)]
    return None


def _size_and_time(root: Path, file: str) -> tuple[int, int]:
    """Returns the size of a file in bytes and the time of its last change in nanoseconds.

    Returns (0, 0) if the file does not exist.
    """
    # The name may be relative to the root folder of the data set.
    for place in (Path(file), root / file):
        if place.is_file():
            return place.stat().st_size, place.stat().st_mtime_ns
    return 0, 0
