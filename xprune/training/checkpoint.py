"""Checkpoints: the state of a loop in one safetensors file, with the plain values as JSON in its header. No pickle."""

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
"""The version of the format. Files of version 1 do not name it.

They were written after whole epochs, by runs that drew their random numbers in another way.
"""


def write(folder: Path, state: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> Path:
    """Writes a checkpoint, in place of an older one in the same folder.

    The file is written under a temporary name and then renamed. So a process that is killed leaves either the old
    checkpoint or the new one.

    Args:
        folder: The folder. It is created if it is missing.
        state: The state: dicts, lists, tensors and plain values, inside each other.
        fingerprint: Plain values that identify the run, such as its settings.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    file, temporary = folder / _NAME, folder / f".{_NAME}.{os.getpid()}"
    header = {"format": str(FORMAT), "state": json.dumps(plain), "fingerprint": json.dumps(fingerprint)}
    temporary.write_bytes(save(tensors, {**header, "digest": _digest(header, tensors)}))
    os.replace(temporary, file)
    return file


def read(folder: Path, fingerprint: Mapping[str, Any]) -> Any:
    """Reads the checkpoint of a run.

    Args:
        folder: The folder.
        fingerprint: Plain values that identify the run. They have to equal those that the checkpoint was written with.

    Returns:
        The state, or None if there is no checkpoint.

    Raises:
        TrainingError: The file is damaged, was written by an older xprune, or belongs to another run.
    """
    file = folder / _NAME
    if not file.exists():
        return None
    data = file.read_bytes()
    try:
        # A safetensors file begins with the length of its JSON header, in 8 bytes.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if header.get("format") != str(FORMAT) and "state" in header:
            raise TrainingError(
                f"{file} was written by another version of xprune, whose runs draw other random numbers. Finish the "
                "run with that version, or delete the file to start anew."
            )
        tensors = load(data)
        if header.pop("digest") != _digest(header, tensors):
            raise ValueError("its contents have changed since it was written")
        state, theirs = json.loads(header["state"]), json.loads(header["fingerprint"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file} is no checkpoint or is damaged ({error}). Delete it to start anew.") from error
    ours = json.loads(json.dumps(fingerprint))  # as JSON returns it: tuples become lists
    if theirs != ours:
        other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        raise TrainingError(
            f"{file} belongs to another run: {', '.join(other)} differ. Give another checkpoint_dir, or delete the "
            "file."
        )
    return _with_tensors(state, tensors)


def clear(folder: Path) -> None:
    """Removes the checkpoint of a run that has ended."""
    (folder / _NAME).unlink(missing_ok=True)


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Returns a short name for all contents of a file. It shows a damaged file that still can be parsed."""
    return digest_of([sorted(header.items()), sorted(tensors.items())])


def _without_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a state as JSON data, with a key in place of each tensor.

    Args:
        value: The state, or a part of it.
        key: The place of `value` in the state.
        tensors: Gets each tensor under its key.
    """
    if isinstance(value, Tensor):
        # Each tensor is cloned, since safetensors refuses tied ones. A checkpoint holds values only.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, Mapping):
        # A list of pairs, since JSON would turn integer keys into strings.
        return {"dict": [[name, _without_tensors(item, f"{key}/{name}", tensors)] for name, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_without_tensors(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]}
    return {"plain": value}


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the state from what `_without_tensors` made of it."""
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {name: _with_tensors(item, tensors) for name, item in value["dict"]}
    return [_with_tensors(item, tensors) for item in value["list"]] if "list" in value else value["plain"]
