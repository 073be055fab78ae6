"""Reads and writes the file of a comparison, comparison.json. A cell is one combination of the things compared.

For each cell, the file contains the results and digests of everything that the cell was made from. So a later
comparison can tell whether it may use the cell again.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich import get_console

from xprune.comparison.cells import Row
from xprune.comparison.keys import Subject
from xprune.comparison.table import Comparison
from xprune.core.coverage import Coverage
from xprune.environment import hardware, versions
from xprune.errors import ArtefactError
from xprune.modules.digest import digest_of
from xprune.training.runtime import is_main_process

Key = tuple[int, str, str, str]
"""The key of a cell in a table: (seed, criterion, selection, budget), with the names that the table shows."""
_NAMES = ("seed", "criterion", "selection", "budget")


class CellFile:
    """The file of a comparison. It contains the rows that the present comparison shows, and all other rows.

    A cell is one combination of criterion, selection, budget and seed. A row is the result of one cell. The file is
    JSON. Its entry "rows" contains the rows that are shown, all in one table. Its entry "others" contains rows that
    were made from something else, such as another model, other sites, other data or other settings. They stay in the
    file because a later comparison may show them again.

    Each row has an entry "subject": a digest of the model and the data that the row was made from. The entry "subjects"
    of the file describes the model and the data for each digest. Rows of older files have no subject. They stay in the
    file but are not shown.

    Args:
        path: The path of the file. The file may not exist yet.
        settings: Data that all rows of the file have in common, such as the settings of fine-tuning. JSON must be able
            to hold them.

    Attributes:
        all_rows: All rows of the file, shown or not.
        report: The content of the file without "others". Its "rows" are the rows that are shown.
        subjects: For each seed of the present comparison, the digest of its model and data. The key None means all
            seeds. This is not the entry "subjects" of the file.
        told: The line about the coverage that was printed last. "" if none was.

    Raises:
        ArtefactError: The file is not the file of a comparison, or its `settings` differ from those given.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        # The conversion to JSON and back turns tuples into lists, so that the settings can be compared with those of a
        # file.
        self.path, settings = path, json.loads(json.dumps(settings))
        self.report: dict[str, Any] = {"settings": settings, "rows": []}
        self.report |= {"hardware": hardware(), "versions": versions()}
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                same = found["settings"] == settings
                # Raises KeyError or TypeError if a row does not contain all parts of its key.
                for row in (*found["rows"], *found.get("others", ())):
                    self._key(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ArtefactError(f"{path} is not a comparison: {error}. Choose another folder.") from error
            if not same:
                raise ArtefactError(
                    f"{path} was made with the settings {found['settings']}, but the settings are now {settings}. "
                    "Results of both cannot be shown in one table. Choose another folder, or the same settings."
                )
            self.report = found
        self.all_rows: list[Row] = [*self.report.pop("others", []), *self.report["rows"]]
        # A row is shown only after a call of `set_subject` with the model and the data that it was made from.
        self.report["rows"] = []
        self.subjects: dict[int | None, str] = {}
        self.told = ""

    def set_subject(self, seed: int | None, subject: Subject) -> None:
        """Sets the model and the data of the cells of a seed. Rows that were made from them are shown from now on.

        If other rows of the seed were made from something else, it prints how many, and what is different.

        Args:
            seed: The seed. None means all seeds.
            subject: The description of the model and the data, as `xprune.comparison.keys.subject` returns it.
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
        # Several rows may have the same key and different settings. The last of them was shown most recently, so it is
        # shown again.
        latest = {self._key(row): row for row in same}
        self.report["rows"] += [row for row in same if latest[self._key(row)] is row]

    def set_coverage(self, seed: int, coverage: Coverage) -> None:
        """Writes down what the units of a seed's model cover, and prints it, unless the line before said the same.

        Args:
            seed: The seed. `set_subject` was called for it before.
            coverage: What the units cover. It is saved in the entry "coverage" of the file.
        """
        self.report.setdefault("coverage", {})[self.subject(seed) or ""] = coverage.to_json()
        if coverage.text != self.told and is_main_process():
            get_console().print(coverage.text, highlight=False, markup=False, soft_wrap=True)
        self.told = coverage.text

    def has(self, key: Key, cell: str) -> bool:
        """Returns True if the file contains a cell with the same model, data and settings. The cell is then shown.

        If it returns False, the cell has to be run.

        Args:
            key: The key of the cell.
            cell: The digest of the settings of the cell.
        """
        wanted = self.subject(key[0])
        for row in self.all_rows:
            if self._key(row) == key and (row.get("subject"), row.get("cell")) == (wanted, cell):
                self._show(row)
                return True
        return False

    def add(self, key: Key, cell: str, figures: Row) -> None:
        """Adds a row for a cell that was run, and writes the file.

        If the table shows a row with the same key and other settings, the new row replaces that row in the table. The
        old row stays in the file.

        Args:
            key: The key of the cell.
            cell: The digest of the settings of the cell.
            figures: The results of the cell, as data that JSON can hold.
        """
        made_of = {"subject": self.subject(key[0]), "cell": cell}
        new = {**dict(zip(_NAMES, key, strict=True)), **made_of, **figures}
        self.all_rows.append(new)
        self._show(new)
        self.write()

    def hide(self, lines: Collection[tuple[str, str]], settings: Mapping[str, Mapping[str, str]]) -> None:
        """Hides rows whose criterion or selection has a name that means other settings now. They stay in the file.

        Otherwise, one line of the table could contain results of two different settings.

        Args:
            lines: (criterion, selection) for each line of the present grid.
            settings: For "criterion" and for "selection", a dict. It contains the digest of the settings that each name
                means now.
        """

        def fits(row: Row) -> bool:
            """Returns False if a name in the row meant other settings when the row was made, else True."""
            if (row["criterion"], row["selection"]) not in lines:
                return True
            then = row.get("settings", {})
            now = {part: named.get(row[part]) for part, named in settings.items()}
            # A value is None if the row or the grid has no such name. For example, the row of the dense model has no
            # criterion.
            return all(then.get(part) in (None, now[part]) or now[part] is None for part in now)

        self.report["rows"] = [row for row in self.report["rows"] if fits(row)]

    def write(self) -> None:
        """Writes the file. If the program is killed during the write, the old file is not damaged."""
        if is_main_process():
            shown = {id(row) for row in self.report["rows"]}
            others = [row for row in self.all_rows if id(row) not in shown]
            report = {**self.report, **({"others": others} if others else {})}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The new file is complete before os.replace puts it in the place of the old file, in a single step.
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(temporary, self.path)

    def comparison(self) -> Comparison:
        """Writes the file, and returns the rows that are shown as a `Comparison`."""
        self.write()
        return Comparison(tuple(self.report["rows"]), self.report)

    def subject(self, seed: int) -> str | None:
        """Returns the digest of the model and the data for a seed. Returns None if no call of `set_subject` gave it."""
        return self.subjects.get(None, self.subjects.get(seed))

    def _key(self, row: Mapping[str, Any]) -> Key:
        """Returns the key of a row. Raises KeyError if the row does not contain all parts of the key."""
        return row["seed"], row["criterion"], row["selection"], row["budget"]

    def _show(self, new: Row) -> None:
        """Shows a row in the table. It replaces a shown row with the same key, or comes last if there is none."""
        rows = self.report["rows"]
        for index, row in enumerate(rows):
            if self._key(row) == self._key(new):
                rows[index] = new
                return
        rows.append(new)
