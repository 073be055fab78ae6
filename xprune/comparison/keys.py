"""Keys: what a cell of a comparison was made of, so that another model's or another data set's is never shown."""

from collections.abc import Mapping, Sized
from typing import Any

from xprune.core.provenance import provenance
from xprune.modules.digest import digest_of, structure_digest, values_digest
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
    """What a loader tells without being read whole: its length, its data set's, and the first batch's bytes."""
    rows = getattr(loader, "dataset", None)
    try:
        length: int | None = len(loader)
    except TypeError:  # of a stream
        length = None
    return {
        "batches": length,
        "samples": len(rows) if isinstance(rows, Sized) else None,
        "first batch": digest_of(first),
    }
