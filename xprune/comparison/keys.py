"""Keys: what a cell of a comparison was made of, so that another model's or another data set's is never shown."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from torch.utils.data import Subset, TensorDataset

from xprune.core.provenance import provenance
from xprune.modules.digest import digest_of, structure_digest, values_digest
from xprune.modules.undisturbed import seeded
from xprune.pipeline import Run

Subject = dict[str, Any]
"""What cells are of: part -> a digest or plain data."""


def subject(run: Run) -> Subject:
    """What the cells of a run are of: weights, structure, arguments, sites, task, and both loaders."""
    made, config = provenance(run.model), getattr(run.model, "config", None)
    arguments: Any = made.arch if made else getattr(run.model, "default_cfg", None)
    if config is not None and hasattr(config, "to_dict"):  # Hugging Face
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
    """A name for the settings of one cell."""
    return digest_of(settings)


def _data(loader: Any, first: Any) -> dict[str, Any]:
    """What a loader tells without a pass over it.

    Its length and its data set's, the bytes of the first batch, and what the data set holds: all tensors; or the names,
    sizes and times of image files; or, where it tells neither, SAMPLES of its samples. A list of batches is read whole.
    """
    rows = getattr(loader, "dataset", None)
    try:
        length: int | None = len(loader)
    except TypeError:  # of a stream
        length = None
    return {
        "batches": length,
        "samples": len(rows) if isinstance(rows, Sized) else None,
        "first batch": digest_of(first),
        "contents": digest_of(loader if isinstance(loader, (list, tuple)) else _contents(rows)),
    }


SAMPLES = 32
"""Samples that are looked at of a data set of which nothing else is known, evenly spread."""


def _contents(rows: Any) -> Any:
    """What a data set holds, or what stands for it."""
    if isinstance(rows, Subset):
        return "subset", list(rows.indices), _contents(rows.dataset)
    if isinstance(rows, TensorDataset):
        return rows.tensors
    files = getattr(getattr(rows, "reader", rows), "samples", None)  # timm's and torchvision's folders of images
    if isinstance(files, list) and files and isinstance(files[0], (tuple, list)):
        root = str(getattr(getattr(rows, "reader", rows), "root", ""))
        return [(str(path), target, *_written(Path(root), str(path))) for path, target, *_ in files]
    if isinstance(rows, Sized) and hasattr(rows, "__getitem__"):
        spread = sorted({index * max(len(rows) - 1, 0) // max(SAMPLES - 1, 1) for index in range(SAMPLES)})
        with seeded(0):  # samples may be changed by chance
            return [rows[index] for index in spread if index < len(rows)]
    return None


def _written(root: Path, path: str) -> tuple[int, int]:
    """(size, time of the last change in nanoseconds) of a file, (0, 0) where it is not there."""
    for place in (Path(path), root / path):
        if place.is_file():
            return place.stat().st_size, place.stat().st_mtime_ns
    return 0, 0
