"""Checkpoints: the state of a training loop in one safetensors file. No pickle is used.

The header of the file holds the plain values of the state as JSON.
"""

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
FORMAT = 3
"""The version of the format. The header of a file of version 1 has no version.

The runs that wrote files of the versions 1 and 2 read their batches with other random numbers.
"""


def write(folder: Path, state: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> Path:
    """Writes a checkpoint. It replaces an older checkpoint in the same folder.

    The file is written under a temporary name and then renamed. So if the process is killed, the folder holds either
    the old checkpoint or the new one.

    Args:
        folder: The folder. It is created if it is missing.
        state: The state: dicts, lists, tensors and plain values, which may contain each other.
        fingerprint: Plain values that identify the run, such as its settings. `read` compares them.

    Returns:
        The path of the file.
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
    """Reads the checkpoint of a run, so that the run can continue.

    Args:
        folder: The folder.
        fingerprint: Plain values that identify the run. They have to equal those that the checkpoint was written with.

    Returns:
        The state, or None if there is no checkpoint.

    Raises:
        TrainingError: The file is damaged, was written by another version of xprune, or belongs to another run.
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
                f"{file} was written by another version of xprune, whose runs use other random numbers. Finish the "
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
    """Removes the checkpoint in a folder. Does nothing if there is none. A run calls it when it has ended."""
    (folder / _NAME).unlink(missing_ok=True)


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Returns a hash of all contents of a checkpoint.

    `read` uses it to detect a damaged file that can still be parsed.
    """
    return digest_of([sorted(header.items()), sorted(tensors.items())])


def _without_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a state as JSON data, in which each tensor is replaced by a key.

    Args:
        value: The state, or a part of it.
        key: The place of `value` in the state, as a path.
        tensors: A dict to which each tensor is added under its key.
    """
    if isinstance(value, Tensor):
        # Each tensor is cloned, since safetensors refuses tensors that share memory. A checkpoint needs the values
        # only.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, Mapping):
        # A list of pairs, since JSON would turn integer keys into strings.
        return {"dict": [[name, _without_tensors(item, f"{key}/{name}", tensors)] for name, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_without_tensors(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]}
    return {"plain": value}


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the state that `_without_tensors` was given.

    Args:
        value: The JSON data that `_without_tensors` returned, or a part of it.
        tensors: The tensors by their keys.
    """
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {name: _with_tensors(item, tensors) for name, item in value["dict"]}
    return [_with_tensors(item, tensors) for item in value["list"]] if "list" in value else value["plain"]
