"""The file of a comparison. It holds each cell together with digests of all that the cell was made from."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich import get_console

from xprune.comparison.cells import Row
from xprune.comparison.keys import Subject
from xprune.comparison.table import Comparison
from xprune.environment import hardware, versions
from xprune.errors import ArtefactError
from xprune.modules.digest import digest_of
from xprune.training.runtime import is_main_process

Key = tuple[int, str, str, str]
"""The key of a cell in a table: seed, criterion, selection and budget."""
_NAMES = ("seed", "criterion", "selection", "budget")


class CellFile:
    """The file of a comparison, with the cells that are shown and all others.

    The file is JSON. Its "rows" belong to one comparison and are shown in one table. Its "others" were made from
    something else, such as another model, other sites, other data or other settings. They are kept, because a later
    comparison may be about them again.

    Each row has a "subject": a digest of the model and the data that it was made from. "subjects" explains each
    digest. Rows of older files have no subject. They are kept, but are never used for a cell.

    Args:
        path: The file. It may be missing.
        settings: Plain data that all rows of the file have in common.

    Attributes:
        all_rows: All rows of the file, shown or not.
        report: The content of the file for this comparison. Its "rows" are those that are shown.
        subjects: Seed -> digest of its subject. None as a seed means all seeds.

    Raises:
        ArtefactError: The file is not a comparison, or has other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        # The way through JSON turns tuples into lists. Settings that are read from a file have lists too.
        self.path, settings = path, json.loads(json.dumps(settings))
        self.report: dict[str, Any] = {"settings": settings, "rows": []}
        self.report |= {"hardware": hardware(), "versions": versions()}
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                same = found["settings"] == settings
                # Raises KeyError or TypeError for a row that lacks a part of its key.
                for row in (*found["rows"], *found.get("others", ())):
                    self._key(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ArtefactError(f"{path} is not a comparison: {error}. Choose another folder.") from error
            if not same:
                raise ArtefactError(
                    f"{path} was made with {found['settings']}, asked is {settings}: cells of the two cannot be shown "
                    "in one table. Choose another folder, or the same settings."
                )
            self.report = found
        self.all_rows: list[Row] = [*self.report.pop("others", []), *self.report["rows"]]
        # No row is shown before `set_subject` declares the model and the data.
        self.report["rows"] = []
        self.subjects: dict[int | None, str] = {}

    def set_subject(self, seed: int | None, subject: Subject) -> None:
        """Declares which model and data the cells of a seed are made from. Rows that match are shown from now on.

        Prints how many rows do not match, and in which parts they differ.

        Args:
            seed: The seed. None: all seeds.
            subject: The model and the data, as `xprune.comparison.keys.subject` describes them.
        """
        subject = json.loads(json.dumps(subject))
        digest = self.subjects[seed] = digest_of(subject)
        known = self.report.setdefault("subjects", {})
        of_seed = [row for row in self.all_rows if seed in (None, row["seed"])]
        different = [row for row in of_seed if row.get("subject") != digest]
        if different:
            old = {row.get("subject") for row in different}
            parts = {name for each in old for name in subject if known.get(each, {}).get(name) != subject[name]}
            what = "were made by an older version" if old == {None} else f"have other {', '.join(sorted(parts))}"
            get_console().print(
                f"{self.path}: {len(different)} rows {what}; they stay in the file and are not shown.",
                highlight=False,
                soft_wrap=True,
            )
        known[digest] = subject
        same = [row for row in of_seed if row.get("subject") == digest]
        # Rows of one key may have several settings. Those that were shown last come last, and are shown again.
        latest = {self._key(row): row for row in same}
        self.report["rows"] += [row for row in same if latest[self._key(row)] is row]

    def has(self, key: Key, cell: str) -> bool:
        """Looks for a cell that was made from the same model and data with the same settings, and shows it if found.

        Args:
            key: The key of the cell.
            cell: The digest of its settings.

        Returns:
            True if the file has the cell. False if it has to be run.
        """
        wanted = self.subject(key[0])
        for row in self.all_rows:
            if self._key(row) == key and (row.get("subject"), row.get("cell")) == (wanted, cell):
                self._show(row)
                return True
        return False

    def add(self, key: Key, cell: str, figures: Row) -> None:
        """Adds a cell, and writes the file. The cell replaces one with the same key and other settings in the table.

        Args:
            key: The key of the cell.
            cell: The digest of its settings.
            figures: The results, as plain data.
        """
        made_of = {"subject": self.subject(key[0]), "cell": cell}
        new = {**dict(zip(_NAMES, key, strict=True)), **made_of, **figures}
        self.all_rows.append(new)
        self._show(new)
        self.write()

    def hide(self, lines: Collection[tuple[str, str]], settings: Mapping[str, Mapping[str, str]]) -> None:
        """Hides rows of criteria and selections whose names mean other settings now. They stay in the file.

        Without this, a line of the table could mix the results of two settings.

        Args:
            lines: (criterion, selection) of each line of the present grid.
            settings: For "criterion" and for "selection": name -> digest of the settings that the name means now.
        """

        def fits(row: Row) -> bool:
            """Returns False if a name in the row meant other settings when the row was made."""
            if (row["criterion"], row["selection"]) not in lines:
                return True
            then = row.get("settings", {})
            now = {part: named.get(row[part]) for part, named in settings.items()}
            # None: the row or the grid has no such name, as the dense model has no criterion.
            return all(then.get(part) in (None, now[part]) or now[part] is None for part in now)

        self.report["rows"] = [row for row in self.report["rows"] if fits(row)]

    def write(self) -> None:
        """Writes the file. If the write fails or is killed, the old file stays as it was."""
        if is_main_process():
            shown = {id(row) for row in self.report["rows"]}
            others = [row for row in self.all_rows if id(row) not in shown]
            report = {**self.report, **({"others": others} if others else {})}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # os.replace puts the whole new file in the place of the old one in a single step.
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(temporary, self.path)

    def comparison(self) -> Comparison:
        """Writes the file, and returns the rows that are shown as a `Comparison`."""
        self.write()
        return Comparison(tuple(self.report["rows"]), self.report)

    def subject(self, seed: int) -> str | None:
        """Returns the digest of the model and the data of a seed. None if `set_subject` was not called for it."""
        return self.subjects.get(None, self.subjects.get(seed))

    def _key(self, row: Mapping[str, Any]) -> Key:
        """Returns the key of a row. Raises KeyError if the row lacks a part of it."""
        return row["seed"], row["criterion"], row["selection"], row["budget"]

    def _show(self, new: Row) -> None:
        """Shows a row in place of the one with the same key. At the end of the table if there is none."""
        rows = self.report["rows"]
        for index, row in enumerate(rows):
            if self._key(row) == self._key(new):
                rows[index] = new
                return
        rows.append(new)
