"""Digests of all that a cell of a comparison was made from: model, sites, data, task and settings.

A cell in a file is used again only if its digests match. So no table shows the cells of another model or of other data.
"""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from torch.utils.data import Subset, TensorDataset

from xprune.core.provenance import provenance
from xprune.modules.digest import digest_of, structure_digest, values_digest
from xprune.modules.undisturbed import seeded
from xprune.pipeline import Run

Subject = dict[str, Any]
"""The model and the data that cells were made from: name of a part, such as "weights" -> a digest or plain data."""


def subject(run: Run) -> Subject:
    """Describes the model and the data that the cells of a run are made from.

    Args:
        run: The run.

    Returns:
        Digests of the weights, the structure, the arguments of the architecture, the sites, the task and both loaders.
    """
    made, config = provenance(run.model), getattr(run.model, "config", None)
    arguments: Any = made.arch if made else getattr(run.model, "default_cfg", None)
    # Models of Hugging Face have a config.
    if config is not None and hasattr(config, "to_dict"):
        arguments = config.to_dict()
    return {
        "weights": values_digest(run.model),
        "structure": structure_digest(run.model),
        "arguments": digest_of(arguments),
        "sites": digest_of(run.sites),
        "task": digest_of(run.task),
        "training data": _data(run.train, run.first),
        "held-out data": _data(run.held_out, run.first_held_out),
    }


def cell_digest(settings: Mapping[str, Any]) -> str:
    """Returns a short name for the settings of one cell: equal settings have equal names."""
    return digest_of(settings)


def _data(loader: Any, first: Any) -> dict[str, Any]:
    """Describes the data of a loader without reading all of it.

    Args:
        loader: The loader. A list of batches is read completely.
        first: The first batch.

    Returns:
        The number of batches, the number of samples, a digest of the first batch, and a digest of the data set, see
        `_contents`. A number is None if the loader or its data set has no length.
    """
    dataset = getattr(loader, "dataset", None)
    try:
        length: int | None = len(loader)
    except TypeError:
        # A loader over a stream has no length.
        length = None
    return {
        "batches": length,
        "samples": len(dataset) if isinstance(dataset, Sized) else None,
        "first batch": digest_of(first),
        "contents": digest_of(loader if isinstance(loader, (list, tuple)) else _contents(dataset)),
    }


SAMPLES = 32
"""The number of samples that are read from a data set of an unknown class. They are spread evenly over it."""


def _contents(dataset: Any) -> Any:
    """Returns something that changes if the data set changes.

    Args:
        dataset: The data set of a loader. None if it has none.

    Returns:
        All tensors of a data set of tensors. Names, labels, sizes and times of the files of a folder of images. Some
        samples of another data set that can be indexed. None if nothing can be read.
    """
    if isinstance(dataset, Subset):
        return "subset", list(dataset.indices), _contents(dataset.dataset)
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    # Folders of images have a list of (file, label): timm's in their reader, torchvision's in the data set itself.
    folder = getattr(dataset, "reader", dataset)
    files = getattr(folder, "samples", None)
    if isinstance(files, list) and files and isinstance(files[0], (tuple, list)):
        root = str(getattr(folder, "root", ""))
        return [(str(file), target, *_size_and_time(Path(root), str(file))) for file, target, *_ in files]
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        spread = sorted({index * max(len(dataset) - 1, 0) // max(SAMPLES - 1, 1) for index in range(SAMPLES)})
        # Samples may be augmented at random, and must be the same at every call.
        with seeded(0):
            return [dataset[index] for index in spread if index < len(dataset)]
    return None


def _size_and_time(root: Path, file: str) -> tuple[int, int]:
    """Returns the size of a file in bytes and the time of its last change in nanoseconds. (0, 0) if it is missing."""
    # Names may be relative to the root of the data set.
    for place in (Path(file), root / file):
        if place.is_file():
            return place.stat().st_size, place.stat().st_mtime_ns
    return 0, 0
