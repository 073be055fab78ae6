"""Decides which files xprune may replace, and replaces an artefact safely.

If the process is killed at any time, the folder still holds an artefact that can be read. xprune replaces only files
that it wrote itself. If a folder holds anything else, an error is raised before any work starts. The name of a file
does not show who wrote it. So weights are recognised by their checksum, which is in the header, and texts by a line at
their end.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xprune.errors import ArtefactError

FORMAT, SHARDED = 1, 2
"""The versions of the format of an artefact. `load` refuses an artefact of any other version.

In format 1, one file holds the weights of the model. In format 2, several files hold them, the shards, and the header
has their names and checksums. Releases that know only format 1 refuse format 2 by its number.
"""

MODEL, HEADER, TENSORS = "model.safetensors", "xprune.json", "tensors.safetensors"
"""The names of the files of an artefact: the weights, the header, and other tensors such as scores.

The last file is missing if there are no other tensors.
"""

UNNAMED = "model-"
"""The names of shards begin with this text, also before their checksum is known."""

REPORT = "report.html"
"""The name of the report of a run. It may lie in the folder of an artefact."""

WORKING = ".xprune-saving-"
"""The names of temporary files and folders begin with this text."""

FIELDS = {"format", "arch", "plan", "ties", "sha256", "extra"}
"""The keys that each header has."""

_PENDING = re.compile(r"(model|tensors)-([0-9a-f]{16})\.safetensors")
_SHARD = re.compile(r"(model-\d{5})-([0-9a-f]{16})\.safetensors")
_OF_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
_STAMP = "<!-- written by xprune, sha256 of the text above: {} -->\n"


def check_folder(directory: str | Path) -> None:
    """Checks that an artefact can be written to a folder.

    Call it before a long run, so that no work is lost at the end.

    Args:
        directory: A folder that does not exist, is empty, or holds only an artefact. It may also hold a report that
            xprune wrote. A link to such a folder is allowed.

    Raises:
        ArtefactError: The folder holds something that xprune did not write, it is not a folder, or it cannot be written
            to.

    Example:
        >>> check_folder("pruned")
        >>> Path("todo.txt").touch()
        >>> check_folder(".")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        xprune.errors.ArtefactError: . holds something that xprune did not write: todo.txt. Give a new folder, ...
    """
    directory = Path(directory)
    if directory.is_symlink() and not directory.exists():
        raise ArtefactError(
            f"{directory} is a link to {directory.readlink()}, which does not exist. Make that folder, or "
            "give another one."
        )
    if directory.exists() and not directory.is_dir():
        raise ArtefactError(f"{directory} is a file, wanted a folder. Give the name of a folder.")
    try:
        found = foreign(directory) if directory.exists() else []
        if found:
            names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise ArtefactError(
                f"{directory} holds something that xprune did not write: {names}. Give a new folder, an empty one, "
                "or one that holds only a saved model, which is then replaced."
            )
        # Only an attempt shows whether new files can be written here. The temporary file is removed at once.
        with tempfile.TemporaryFile(prefix=WORKING, dir=_nearest_existing(directory)):
            pass
    except OSError as error:
        raise ArtefactError(f"{directory} cannot be written to ({error.strerror}). Give another folder.") from error


def check_file(path: str | Path, ours: Callable[[Path], bool]) -> None:
    """Checks that a single file can be written, without replacing a file that xprune did not write.

    Args:
        path: The file. It may exist if xprune wrote it.
        ours: A function that is called with the file if it exists. It returns True if xprune wrote the file and nobody
            changed it since, else False.

    Raises:
        ArtefactError: There is a folder of this name, or a file that xprune did not write, or the file cannot be
            written.

    Example:
        >>> _ = Path("page.html").write_text(stamped("<html></html>"))
        >>> check_file("page.html", is_stamped)
        >>> check_file("new.html", is_stamped)
    """
    path = Path(path)
    if path.is_dir():
        raise ArtefactError(f"{path} is a folder, wanted a file. Give the name of a file in it.")
    try:
        if path.exists() and not ours(path):
            raise ArtefactError(
                f"{path} exists, and xprune did not write it, or it was changed since. xprune does not replace it. "
                "Give another name, or move the file away."
            )
        with tempfile.TemporaryFile(prefix=WORKING, dir=_nearest_existing(path.parent)):
            pass
    except OSError as error:
        raise ArtefactError(f"{path} cannot be written ({error.strerror}). Give a name in another folder.") from error


def _nearest_existing(directory: Path) -> Path:
    """Returns the folder if it exists, otherwise the nearest folder above it that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


def foreign(directory: Path) -> list[str]:
    """Returns the names of files and folders in a folder that xprune did not write, sorted.

    Files that an operating system makes, such as .DS_Store, are left out.
    """
    header = _header(directory)
    return sorted(entry.name for entry in directory.iterdir() if not _written_by_xprune(entry, header))


def _header(directory: Path) -> Mapping[str, Any] | None:
    """Returns the header of the artefact in a folder, or None if there is no header that xprune wrote."""
    try:
        header = json.loads((directory / HEADER).read_text())
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) and set(header) >= FIELDS else None


def _written_by_xprune(entry: Path, header: Mapping[str, Any] | None) -> bool:
    """Returns True if xprune or an operating system wrote a file or folder, else False.

    Args:
        entry: The file or folder.
        header: The header of the artefact in the same folder, or None if there is none.
    """
    name, pending = entry.name, _PENDING.fullmatch(entry.name) or _SHARD.fullmatch(entry.name)
    if name in _OF_THE_SYSTEM or name.startswith(WORKING):
        return True
    # A link may point to a file of the user, so it never counts as a file of xprune.
    if entry.is_symlink() or not entry.is_file():
        return False
    if pending:
        return sha256(entry).startswith(pending[2])
    if name == REPORT:
        return is_page(entry)
    if header is None or name not in (HEADER, MODEL, TENSORS):
        return False
    # If the weights still have their pending name, a save was killed before its last step. The files with the final
    # names then belong to the old artefact, and their checksums are not in this header.
    if name == HEADER or stored_file(entry.parent / MODEL, header["sha256"]).name != MODEL:
        return True
    return sha256(entry) == checksum(header, name)


def checksum(header: Mapping[str, Any], name: str) -> Any:
    """Returns the checksum of the file MODEL or TENSORS that a header holds, or None if it holds none."""
    if name == MODEL:
        return header["sha256"]
    beside = header.get("beside")
    return beside.get("sha256") if isinstance(beside, dict) else None


def pending_file(file: Path, digest: Any) -> Path:
    """Returns the name that a new file has until it replaces the old one.

    The name contains the first 16 digits of the checksum: model-0123456789abcdef.safetensors.

    Args:
        file: The file under its final name.
        digest: The checksum of the file, hexadecimal. If a header was changed by hand, it may be anything.
    """
    return file.with_name(f"{file.stem}-{digest[:16] if isinstance(digest, str) else ''}{file.suffix}")


def stored_file(file: Path, digest: Any) -> Path:
    """Returns the file to read for a checksum: the one with the pending name if it exists, else the one given.

    Args:
        file: The file under its final name.
        digest: The checksum that the header holds for the file.
    """
    pending = pending_file(file, digest)
    return pending if _PENDING.fullmatch(pending.name) and pending.is_file() else file


def shard_name(number: int, digest: str) -> str:
    """Returns the name of a shard: model-00001-0123456789abcdef.safetensors.

    The name contains the first 16 digits of the checksum. So a shard of a new artefact never has the name of another
    shard of the old one, and it keeps its name for good.

    Args:
        number: The number of the shard. The first is 1.
        digest: The checksum of the file, hexadecimal.
    """
    return f"{Path(MODEL).stem}-{number:05d}-{digest[:16]}.safetensors"


def weight_files(directory: Path, header: Mapping[str, Any]) -> dict[Path, str]:
    """Returns the files that hold the weights of the model, each with its checksum.

    Args:
        directory: The folder of the artefact.
        header: The header of the artefact.

    Raises:
        ArtefactError: The header names a file that cannot be a shard.
    """
    shards = header.get("shards")
    if shards is None:
        return {stored_file(directory / MODEL, header["sha256"]): header["sha256"]}
    # A header may come from anybody. A name with slashes would lead out of the folder.
    if not isinstance(shards, dict) or not shards or not all(_SHARD.fullmatch(name) for name in shards):
        raise ArtefactError(f"{directory / HEADER} is damaged or was changed by hand: its shards are {shards!r}.")
    return {directory / name: str(digest) for name, digest in shards.items()}


@contextmanager
def new_artefact(directory: Path) -> Iterator[Path]:
    """Makes a working folder in a `with` block. After the block, its files become the artefact of a folder.

    After an exception in the block, the folder is as it was before.

    Args:
        directory: The folder of the artefact. If it does not exist, it is made.

    Yields:
        The working folder. The block has to write the header, see `write_header`, and the weights into it.
    """
    undo = make_folder(directory)
    try:
        working = working_folder(directory)
        try:
            yield working
            replace_artefact(working, directory)
        finally:
            remove_working(working)
    # BaseException, because Ctrl-C is not an Exception.
    except BaseException:
        undo()
        raise


def write_header(working: Path, header: Mapping[str, Any]) -> None:
    """Writes the header, and gives all files of a working folder the permissions of the header.

    Args:
        working: The folder. The other files have to be complete.
        header: The header. Its entry "extra" comes from the user.

    Raises:
        ArtefactError: The header holds something that JSON cannot hold.
    """
    try:
        (working / HEADER).write_text(json.dumps(header, indent=1, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"`extra` is not plain data, so it cannot be kept with the model: {error}. Give numbers, strings, "
            "lists and dicts of these."
        ) from error
    # safetensors writes files that only their owner can read. So they get the permissions of the header, which are the
    # usual ones.
    for file in working.iterdir():
        file.chmod((working / HEADER).stat().st_mode)


def replace_artefact(working: Path, directory: Path) -> None:
    """Turns the finished files of a working folder into the artefact of a folder.

    Each step is a single rename, and the order of the steps matters. First, the weights get a pending name, which
    contains their checksum. Then the header is replaced. Before this step, a reader finds the old artefact. After it, a
    reader finds the new one, with weights under their pending name. At last, the weights get their final name. So after
    a kill at any time, one of the two artefacts is complete. The next save removes the files that a kill leaves behind.
    Shards have names that contain their checksum from the beginning, so they are never renamed in the folder.

    Args:
        working: A folder inside `directory` that holds the new header and weights.
        directory: The folder of the artefact.
    """
    header = json.loads((working / HEADER).read_text())
    shards = header.get("shards") or {}
    for name in shards:
        (working / name).replace(directory / name)
    if shards:
        _set_aside(directory)
    held = [name for name in (TENSORS, MODEL) if (working / name).is_file()]
    for name in held:
        (working / name).replace(pending_file(directory / name, checksum(header, name)))
    (working / HEADER).replace(directory / HEADER)
    if TENSORS not in held:
        (directory / TENSORS).unlink(missing_ok=True)
    # The weights of the model are renamed last. While they have their pending name, `_written_by_xprune` accepts files
    # of the old artefact under the final names.
    for name in held:
        pending_file(directory / name, checksum(header, name)).replace(directory / name)
    # Now the files are removed that killed saves have left behind.
    for entry in directory.iterdir():
        # The shards of the new artefact are not read again, since that takes long.
        if entry == working or entry.name in shards or not _written_by_xprune(entry, header):
            continue
        if _PENDING.fullmatch(entry.name) or _SHARD.fullmatch(entry.name):
            entry.unlink()
        elif entry.name.startswith(WORKING) and entry.is_dir() and not entry.is_symlink():
            for file in (entry / HEADER, entry / MODEL, entry / TENSORS, *entry.glob(f"{UNNAMED}*.safetensors")):
                file.unlink(missing_ok=True)
            with suppress(OSError):
                entry.rmdir()


def _set_aside(directory: Path) -> None:
    """Gives the weights of an artefact in one file their pending name, before the header of a sharded one replaces it.

    A reader of the old header still finds them. After a kill, the next save recognises them by their name and removes
    them.
    """
    old = _header(directory)
    for name in (TENSORS, MODEL):
        digest = checksum(old, name) if old is not None else None
        pending = pending_file(directory / name, digest)
        if (directory / name).is_file() and _PENDING.fullmatch(pending.name):
            (directory / name).replace(pending)


def make_folder(directory: Path) -> Callable[[], None]:
    """Makes a folder, and the folders above it that do not exist.

    Returns:
        A function without arguments that undoes it. It removes the folders that were made, if they are empty.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)

    def undo() -> None:
        """Removes the new folders, the innermost first. Stops at the first folder that is not empty."""
        with suppress(OSError):
            for path in made:
                path.rmdir()

    return undo


def working_folder(directory: Path) -> Path:
    """Makes a new empty folder inside a folder, for files that are not finished.

    The files can later be moved to their final place by a rename, because this folder is on the same disk.
    """
    return Path(tempfile.mkdtemp(prefix=WORKING, dir=directory))


def remove_working(working: Path) -> None:
    """Removes a folder that `working_folder` made, with all its files."""
    shutil.rmtree(working, ignore_errors=True)


def sha256(path: Path) -> str:
    """Returns the SHA-256 checksum of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamped(text: str) -> str:
    """Returns an HTML or Markdown text with one more line, which holds the checksum of the text.

    `is_stamped` uses it to recognise files that xprune wrote and nobody changed.

    Example:
        >>> stamped("# Table ").startswith("# Table <!-- written by xprune")
        True
    """
    return text + _STAMP.format(hashlib.sha256(text.encode()).hexdigest())


def is_stamped(path: Path) -> bool:
    """Returns True if a file holds a text that `stamped` returned, and nobody changed it. False for any other file.

    Example:
        >>> page = Path("page.html")
        >>> _ = page.write_text(stamped("<html></html>"))
        >>> is_stamped(page)
        True
        >>> _ = page.write_text(page.read_text().replace("<html>", "<html><!-- mine -->"))
        >>> is_stamped(page)
        False
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    above, found, _ = text.rpartition(_STAMP.partition("{")[0])
    return bool(found) and stamped(above) == text


def is_page(path: Path) -> bool:
    """Returns True if a file is a report that xprune wrote and nobody changed. Else False.

    Reports of xprune 0.1.0 have no checksum. They are recognised by their heading, even if they were changed.
    """
    if is_stamped(path):
        return True
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return '<p class="kicker">Pruning report</p>' in text and "<!-- written by xprune" not in text
