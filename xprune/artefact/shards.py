"""Writes the weights of a model to several files, the shards, and reads single tensors from such files.

A model that does not fit into memory is never held as a whole: `ShardWriter` gets its tensors one after another, and
`Stored` reads a tensor when it is asked for.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xprune.artefact import files
from xprune.artefact.files import SHARDED, UNNAMED
from xprune.errors import ArtefactError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
"""The files of transformers that say where the weights are: the index of several shards, or a single file."""


class ShardWriter:
    """Writes tensors to shards of a limited size. It holds the tensors of one shard at a time.

    Args:
        folder: The folder for the shards, such as the working folder of a new artefact.
        limit: The size of a shard in bytes. A shard is written before it would get larger. A single larger tensor has a
            shard of its own.

    Example:
        >>> shards = ShardWriter(Path("."), limit=100)
        >>> for name in ("a", "b", "c"):
        ...     shards.add(name, torch.zeros(10))  # 40 bytes
        >>> header = shards.finish()
        >>> len(header["shards"])
        2
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 1:
            raise ArtefactError(f"a shard of {limit} bytes holds nothing. Give a size of at least 1 byte.")
        self.folder, self.limit = folder, limit
        self._waiting: dict[str, Tensor] = {}
        self._shards: dict[str, str] = {}

    @property
    def held(self) -> int:
        """The bytes of the tensors that are not written yet."""
        return sum(tensor.nbytes for tensor in self._waiting.values())

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor. If it does not fit into the present shard, this shard is written first.

        Args:
            name: The name of the tensor in the model.
            tensor: The tensor. The caller must not change it afterwards.
        """
        if self._waiting and self.held + tensor.nbytes > self.limit:
            self.flush()
        self._waiting[name] = tensor.detach().cpu().contiguous()

    def flush(self) -> None:
        """Writes the present shard. Does nothing if it holds no tensor."""
        if not self._waiting:
            return
        number = len(self._shards) + 1
        file = self.folder / f"{UNNAMED}{number:05d}.safetensors"
        save_file(self._waiting, file)
        self._waiting = {}
        digest = files.sha256(file)
        name = files.shard_name(number, digest)
        file.replace(self.folder / name)
        self._shards[name] = digest

    def finish(self) -> dict[str, Any]:
        """Writes the last shard. Returns the entries of the header of an artefact that describe the shards."""
        self.flush()
        return {"format": SHARDED, "sha256": None, "shards": dict(self._shards)}


class Stored(Mapping[str, Tensor]):
    """The tensors in some safetensors files by their names. A tensor is read each time that it is asked for.

    Args:
        places: The file that holds each tensor, by the name of the tensor.
        ties: Another name of a tensor, such as that of a tied one -> the name under which the file holds it.

    Example:
        >>> save_file({"a": torch.ones(2)}, "model.safetensors")
        >>> stored = Stored({"a": Path("model.safetensors")}, ties={"b": "a"})
        >>> list(stored), stored["b"], stored.shape("a")
        (['a'], tensor([1., 1.]), (2,))
    """

    def __init__(self, places: Mapping[str, Path], ties: Mapping[str, str] | None = None) -> None:
        self.places, self.ties = dict(places), dict(ties or {})

    @staticmethod
    def in_files(paths: Iterator[Path] | list[Path], ties: Mapping[str, str] | None = None) -> "Stored":
        """Returns the tensors of some files. Raises ArtefactError if a file cannot be read."""
        places: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as opened:
                places |= dict.fromkeys(opened.keys(), path)
        return Stored(places, ties)

    @staticmethod
    def in_folder(directory: Path) -> "Stored":
        """Returns the tensors of a folder that transformers wrote with `save_pretrained`.

        Raises:
            ArtefactError: The folder holds no weights in safetensors files, or a file is missing or damaged.
        """
        index = directory / INDEX
        if not index.is_file():
            if not (directory / SINGLE).is_file():
                raise ArtefactError(
                    f"{directory} holds neither {SINGLE} nor {INDEX}. Give a folder that save_pretrained of "
                    "transformers wrote. Other formats of weights, such as pytorch_model.bin, are not read."
                )
            return Stored.in_files([directory / SINGLE])
        try:
            names = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(f"{index} is no index of shards ({error}). It is truncated or was changed.") from error
        # A name with slashes would lead out of the folder.
        outside = sorted({file for file in names.values() if Path(file).name != file})
        if outside:
            raise ArtefactError(f"{index} names the file {outside[0]}, which is not in the folder.")
        found = Stored.in_files([directory / file for file in sorted(set(names.values()))])
        lost = next((name for name, file in names.items() if found.places.get(name) != directory / file), None)
        if lost is not None:
            raise ArtefactError(f"{index}: {names[lost]} does not hold the tensor {lost}. A file was changed or lost.")
        return found

    def __getitem__(self, name: str) -> Tensor:
        """Reads a tensor. It is a copy in memory, so the file can be replaced while the tensor is in use."""
        name = self.ties.get(name, name)
        with _opened(self.places[name]) as opened:
            # The file is mapped into memory. It is closed after each tensor, so that the pages that were read are
            # given back.
            tensor: Tensor = opened.get_tensor(name).clone()
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names under which the files hold tensors."""
        return iter(self.places)

    def __len__(self) -> int:
        """Returns the number of tensors in the files."""
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        """Returns True if there is a tensor of this name, or one that is tied to it. Nothing is read."""
        return name in self.places or self.ties.get(str(name)) in self.places

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor. Its values are not read."""
        name = self.ties.get(name, name)
        with _opened(self.places[name]) as opened:
            return tuple(opened.get_slice(name).get_shape())

    def empty(self) -> dict[str, Tensor]:
        """Returns each tensor of the files on the meta device: with its shape and dtype, without values."""
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.places.values()):
            with _opened(path) as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    # A tensor of safetensors is a view of the mapped file. Its values are read when they are used.
                    tensor = opened.get_tensor(name)
                    found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return found


def _opened(path: Path) -> Any:
    """Opens a safetensors file. Raises ArtefactError if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{path} cannot be read: it is missing, truncated or no safetensors file ({error})."
        ) from error
