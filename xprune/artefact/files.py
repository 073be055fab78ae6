"""Files: which files xprune wrote and may replace, and how an artefact is replaced so that a kill leaves one readable.

A folder that holds anything else is refused, before work starts. Whether a file is ours is told by its contents, not by
its name alone: weights by the checksum in the header, text by the stamp in its last line.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from xprune.errors import ArtefactError

FORMAT = 1
MODEL, HEADER, TENSORS = "model.safetensors", "xprune.json", "tensors.safetensors"
REPORT = "report.html"
WORKING = ".xprune-saving-"
"""What names of temporary files and folders start with."""
FIELDS = {"format", "arch", "plan", "ties", "sha256", "extra"}
_PENDING = re.compile(r"(model|tensors)-([0-9a-f]{16})\.safetensors")
_OF_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
_STAMP = "<!-- written by xprune, sha256 of the text above: {} -->\n"


def check_folder(directory: str | Path) -> None:
    """Asks whether an artefact can be written there. Worth asking before hours of work.

    Args:
        directory: A folder that is new, empty, or holds an artefact and nothing else. A report that xprune wrote may
            lie beside the artefact. A link to such a folder will do.

    Raises:
        ArtefactError: The folder holds something that xprune did not write, is no folder, or cannot be written to.
    """
    directory = Path(directory)
    if directory.is_symlink() and not directory.exists():
        raise ArtefactError(f"{directory} is a link to {directory.readlink()}, which does not exist: make that folder.")
    if directory.exists() and not directory.is_dir():
        raise ArtefactError(f"{directory} is a file, wanted a folder: give another name.")
    try:
        found = foreign(directory) if directory.exists() else []
        if found:
            names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise ArtefactError(
                f"{directory} holds what xprune did not write: {names}. A model is saved into a folder of its own: "
                "give a new folder, an empty one, or one with a saved model alone, which is then replaced."
            )
        with tempfile.TemporaryFile(prefix=WORKING, dir=_standing(directory)):
            pass
    except OSError as error:
        raise ArtefactError(f"{directory} cannot be written to ({error.strerror}): give another folder.") from error


def check_file(path: str | Path, ours: Callable[[Path], bool]) -> None:
    """Asks whether one file can be written there.

    Args:
        path: The file. It is new, or one that xprune wrote.
        ours: Says whether a file that exists was written by xprune and left as it was.

    Raises:
        ArtefactError: Something else is there, or the folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ArtefactError(f"{path} is a folder, wanted a file: give the name of a file in it.")
    try:
        if path.exists() and not ours(path):
            raise ArtefactError(
                f"{path} exists, and xprune did not write it, or it was changed since. It stays as it is: give another "
                "name, or move it away."
            )
        with tempfile.TemporaryFile(prefix=WORKING, dir=_standing(path.parent)):
            pass
    except OSError as error:
        raise ArtefactError(f"{path} cannot be written ({error.strerror}): give another place.") from error


def _standing(directory: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


def foreign(directory: Path) -> list[str]:
    """Names of what is in the folder and was not written by xprune, sorted."""
    header = _header(directory)
    return sorted(entry.name for entry in directory.iterdir() if not _ours(entry, header))


def _header(directory: Path) -> Mapping[str, Any] | None:
    """The header of the artefact in the folder, None where there is none that xprune wrote."""
    try:
        header = json.loads((directory / HEADER).read_text())
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) and set(header) >= FIELDS else None


def _ours(entry: Path, header: Mapping[str, Any] | None) -> bool:
    """Whether xprune wrote this entry of a folder whose artefact has this header."""
    name, pending = entry.name, _PENDING.fullmatch(entry.name)
    if name in _OF_THE_SYSTEM or name.startswith(WORKING):
        return True
    if entry.is_symlink() or not entry.is_file():
        return False
    if pending:
        return sha256(entry).startswith(pending[2])
    if name == REPORT:
        return is_page(entry)
    if header is None or name not in (HEADER, MODEL, TENSORS):
        return False
    if name == HEADER or stored_path(entry.parent / MODEL, header["sha256"]).name != MODEL:
        return True  # a save was killed after its last step but one: these are of the artefact before
    return sha256(entry) == checksum(header, name)


def checksum(header: Mapping[str, Any], name: str) -> Any:
    """The checksum that the header gives for MODEL or TENSORS, None where it gives none."""
    if name == MODEL:
        return header["sha256"]
    beside = header.get("beside")
    return beside.get("sha256") if isinstance(beside, dict) else None


def pending_path(path: Path, digest: Any) -> Path:
    """Where a file of this checksum lies until the one before it may go: model-0123456789abcdef.safetensors."""
    return path.with_name(f"{path.stem}-{digest[:16] if isinstance(digest, str) else ''}{path.suffix}")


def stored_path(path: Path, digest: Any) -> Path:
    """Where a file of this checksum is to be read: at its pending path if it is still there, else at its own."""
    pending = pending_path(path, digest)
    return pending if _PENDING.fullmatch(pending.name) and pending.is_file() else path


def replace(working: Path, directory: Path) -> None:
    """Makes the finished files in `working` the artefact of the folder, in place of the one before.

    Each step is one rename. Until the header's, the artefact before is the one that is read; from then on it is the
    new one, whose weights are first found under a name that says their checksum. So a kill at any point leaves one of
    the two whole. Leftovers of such a kill go with the next save.
    """
    header = json.loads((working / HEADER).read_text())
    held = [name for name in (TENSORS, MODEL) if (working / name).is_file()]
    for name in held:
        (working / name).replace(pending_path(directory / name, checksum(header, name)))
    (working / HEADER).replace(directory / HEADER)
    if TENSORS not in held:
        (directory / TENSORS).unlink(missing_ok=True)
    for name in held:  # the model's last: while it is pending, `_ours` knows that the others may be of the one before
        pending_path(directory / name, checksum(header, name)).replace(directory / name)
    for entry in directory.iterdir():
        if entry == working or not _ours(entry, header):
            continue
        if _PENDING.fullmatch(entry.name):
            entry.unlink()
        elif entry.name.startswith(WORKING) and entry.is_dir() and not entry.is_symlink():
            for name in (MODEL, HEADER, TENSORS):
                (entry / name).unlink(missing_ok=True)
            with suppress(OSError):
                entry.rmdir()


def make_folder(directory: Path) -> Callable[[], None]:
    """Makes the folder and those above it; the function returned removes those that were made, where they are empty."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)

    def undo() -> None:
        with suppress(OSError):
            for path in made:
                path.rmdir()

    return undo


def working_folder(directory: Path) -> Path:
    """A new empty folder inside `directory`, for files that are not finished."""
    return Path(tempfile.mkdtemp(prefix=WORKING, dir=directory))


def remove_working(working: Path) -> None:
    """Removes what `working_folder` made."""
    shutil.rmtree(working, ignore_errors=True)


def sha256(path: Path) -> str:
    """The checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamped(text: str) -> str:
    """HTML or Markdown with a last line by which `is_stamped` knows that nobody changed it since."""
    return text + _STAMP.format(hashlib.sha256(text.encode()).hexdigest())


def is_stamped(path: Path) -> bool:
    """Whether the file is text as `stamped` gave it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    above, found, _ = text.rpartition(_STAMP.partition("{")[0])
    return bool(found) and stamped(above) == text


def is_page(path: Path) -> bool:
    """Whether the file is a report that xprune wrote. Pages of 0.1.0 have no stamp and are known by their heading."""
    if is_stamped(path):
        return True
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return '<p class="kicker">Pruning report</p>' in text and "<!-- written by xprune" not in text
