"""Checkpoints: the state of a loop as safetensors + JSON, written to a temporary name and renamed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from xprune.errors import TrainingError
from xprune.modules.digest import digest_of

_NAME = "checkpoint.safetensors"
FORMAT = 2
"""What a file's state means. 1, which no file names: kept after whole passes, with random numbers of another kind."""


def write(folder: Path, state: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> Path:
    """Writes a nest of dicts, lists, tensors and plain values; `fingerprint` names the run it belongs to.

    One file, so that a kill leaves the old checkpoint or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = _strip(state, "", tensors)
    path, temporary = folder / _NAME, folder / f".{_NAME}.{os.getpid()}"
    header = {"format": str(FORMAT), "state": json.dumps(plain), "fingerprint": json.dumps(fingerprint)}
    temporary.write_bytes(save(tensors, {**header, "digest": _digest(header, tensors)}))
    os.replace(temporary, path)
    return path


def read(folder: Path, fingerprint: Mapping[str, Any]) -> Any:
    """The state last written, None where there is none.

    Raises TrainingError where the file is damaged, of an older xprune, or of a run with another fingerprint.
    """
    path = folder / _NAME
    if not path.exists():
        return None
    data = path.read_bytes()
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if header.get("format") != str(FORMAT) and "state" in header:
            raise TrainingError(
                f"{path} was written by another version of xprune, whose runs draw other random numbers. Finish the "
                "run with that version, or delete the file to start anew."
            )
        tensors = load(data)
        if header.pop("digest") != _digest(header, tensors):
            raise ValueError("its contents have changed since it was written")
        state, theirs = json.loads(header["state"]), json.loads(header["fingerprint"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} is no checkpoint or is damaged ({error}); delete it to start anew.") from error
    ours = json.loads(json.dumps(fingerprint))
    if theirs != ours:
        other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        raise TrainingError(
            f"{path} is of another run: {', '.join(other)} differ. Give another checkpoint_dir, or delete it."
        )
    return _restore(state, tensors)


def clear(folder: Path) -> None:
    """Removes the checkpoint of a run that has ended."""
    (folder / _NAME).unlink(missing_ok=True)


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A name for all that the file holds, so that a damaged one is not gone on from."""
    return digest_of([sorted(header.items()), sorted(tensors.items())])


def _strip(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The nest with its tensors moved to `tensors`; dicts become lists of pairs, so that integer keys survive."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().contiguous().clone()  # tied ones apart: a checkpoint holds values
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": [[name, _strip(item, f"{key}/{name}", tensors)] for name, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_strip(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]}
    return {"plain": value}


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {name: _restore(item, tensors) for name, item in value["dict"]}
    return [_restore(item, tensors) for item in value["list"]] if "list" in value else value["plain"]
