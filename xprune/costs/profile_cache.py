"""The class `ProfileCache`, which keeps measured times in a folder of the user."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from xprune.core.latency_table import LatencyTable
from xprune.core.table_cost import Curve
from xprune.errors import TargetError

FOLDER = "XPRUNE_CACHE"
"""The environment variable with the folder of the cache. If it is empty, nothing is kept."""


class ProfileCache:
    """A folder with one small JSON file for each measured module, and one for each whole table.

    The name of a file is a digest of all that a time depends on: the hardware, the version of torch, the target, the
    classes of the modules, and the shapes of tensors and inputs. What cannot be read is measured again.

    Args:
        folder: The folder. It is created when it is needed. None means that nothing is kept.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = ProfileCache(Path(folder))
        ...     cache.keep_curve("a-digest", Curve((0, 4), (0.1, 0.5)))
        ...     cache.curve("a-digest"), cache.curve("another")
        (Curve(counts=(0, 4), amounts=(0.1, 0.5), factor=False), None)
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @staticmethod
    def of_user() -> "ProfileCache":
        """Returns the cache of the user: the folder in `XPRUNE_CACHE`, or else `xprune` in the user's cache folder."""
        named = os.environ.get(FOLDER)
        if named is not None:
            return ProfileCache(Path(named) if named else None)
        home = os.environ.get("XDG_CACHE_HOME")
        try:
            return ProfileCache((Path(home) if home else Path.home() / ".cache") / "xprune")
        # A user without a home folder has no cache.
        except RuntimeError:
            return ProfileCache(None)

    def curve(self, key: str) -> Curve | None:
        """Returns the times of a module. Returns None if there are none, or if they cannot be read."""
        try:
            data = json.loads(self._file(key).read_text(encoding="utf-8"))
            counts, amounts = tuple(map(int, data["counts"])), tuple(map(float, data["amounts"]))
            return Curve(counts, amounts, bool(data["factor"])) if len(counts) == len(amounts) > 0 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_curve(self, key: str, curve: Curve) -> None:
        """Keeps the times of a module. Does nothing if the folder cannot be written."""
        self._keep(key, lambda file: file.write_text(json.dumps(asdict(curve)), encoding="utf-8"))

    def table(self, key: str) -> LatencyTable | None:
        """Returns a whole table. Returns None if there is none, or if it cannot be read."""
        try:
            return LatencyTable.read(self._file(key))
        except TargetError:
            return None

    def keep_table(self, key: str, table: LatencyTable) -> None:
        """Keeps a whole table. Does nothing if the folder cannot be written."""
        self._keep(key, table.save)

    def _file(self, key: str) -> Path:
        """Returns the file of a key. There is no such file if nothing is kept."""
        return (self.folder or Path(os.devnull)) / f"{key}.json"

    def _keep(self, key: str, write: Callable[[Path], object]) -> None:
        """Writes a file under a temporary name and renames it, so that a killed process leaves no half of a file."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{key}.{os.getpid()}"
            write(temporary)
            temporary.replace(self._file(key))
        except OSError:
            return
