"""CellFile: the file of a comparison, which holds each cell with what it was made of."""

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
"""seed, criterion, selection, budget"""
_NAMES = ("seed", "criterion", "selection", "budget")


class CellFile:
    """The cells in the file.

    The file holds `rows`, which belong together, and `others`, which were made of something else: another model, other
    sites, other data, other settings. `subjects` says of what, by the digest that a row has as its `subject`. Rows
    without one are of older files. They are never taken for a cell of this comparison.

    Args:
        path: The file.
        settings: Plain data that all its rows share.

    Raises:
        ArtefactError: The file is not a comparison, or has other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, settings = path, json.loads(json.dumps(settings))
        self.report: dict[str, Any] = {"settings": settings, "rows": []}
        self.report |= {"hardware": hardware(), "versions": versions()}
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                same = found["settings"] == settings
                for row in (*found["rows"], *found.get("others", ())):
                    self._key(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ArtefactError(f"{path} is not a comparison: {error}. Choose another folder.") from error
            if not same:
                raise ArtefactError(
                    f"{path} was made with {found['settings']}, asked is {settings}: cells of the two cannot stand "
                    "in one table. Choose another folder, or the same settings."
                )
            self.report = found
        self.every: list[Row] = [*self.report.pop("others", []), *self.report["rows"]]
        self.report["rows"] = []
        self.subjects: dict[int | None, str] = {}

    def tell(self, seed: int | None, subject: Subject) -> None:
        """Says what the cells of a seed are of, None: those of every seed. Rows of the same are shown from now on."""
        subject = json.loads(json.dumps(subject))
        digest = self.subjects[seed] = digest_of(subject)
        known = self.report.setdefault("subjects", {})
        strangers = [row for row in self.every if seed in (None, row["seed"]) and row.get("subject") != digest]
        if strangers:
            old = {row.get("subject") for row in strangers}
            differ = {name for each in old for name in subject if known.get(each, {}).get(name) != subject[name]}
            what = "were made by an older version" if old == {None} else f"have other {', '.join(sorted(differ))}"
            get_console().print(
                f"{self.path}: {len(strangers)} rows {what}; they stay in the file and are not shown.",
                highlight=False,
                soft_wrap=True,
            )
        known[digest] = subject
        mine = [row for row in self.every if seed in (None, row["seed"]) and row.get("subject") == digest]
        latest = {self._key(row): row for row in mine}  # of several settings, those that were shown last
        self.report["rows"] += [row for row in mine if latest[self._key(row)] is row]

    def has(self, key: Key, cell: str) -> bool:
        """Whether the cell is there, made of the same with the same settings; it is then the one that is shown."""
        wanted = self.subject(key[0])
        for row in self.every:
            if self._key(row) == key and (row.get("subject"), row.get("cell")) == (wanted, cell):
                self._show(row)
                return True
        return False

    def add(self, key: Key, cell: str, figures: Row) -> None:
        """Writes the file anew with one more cell, which is shown in place of one that other settings made."""
        made_of = {"subject": self.subject(key[0]), "cell": cell}
        new = {**dict(zip(_NAMES, key, strict=True)), **made_of, **figures}
        self.every.append(new)
        self._show(new)
        self.write()

    def hide(self, lines: Collection[tuple[str, str]], settings: Mapping[str, Mapping[str, str]]) -> None:
        """Takes rows away whose criterion or selection has a name that now stands for other settings.

        A line of the table must not mix what two settings made.

        Args:
            lines: (criterion, selection) of each line that is asked for now.
            settings: "criterion" and "selection", each name -> a digest of what it stands for now.
        """

        def fits(row: Row) -> bool:
            if (row["criterion"], row["selection"]) not in lines:
                return True
            made_of = row.get("settings", {})
            now = {part: named.get(row[part]) for part, named in settings.items()}
            return all(made_of.get(part) in (None, now[part]) or now[part] is None for part in now)

        self.report["rows"] = [row for row in self.report["rows"] if fits(row)]

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        if is_main_process():
            shown = {id(row) for row in self.report["rows"]}
            others = [row for row in self.every if id(row) not in shown]
            report = {**self.report, **({"others": others} if others else {})}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            part.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(part, self.path)

    def comparison(self) -> Comparison:
        """The rows that belong together. The file then holds these as its `rows`."""
        self.write()
        return Comparison(tuple(self.report["rows"]), self.report)

    def subject(self, seed: int) -> str | None:
        """What a seed's cells are of, None where nobody has said."""
        return self.subjects.get(None, self.subjects.get(seed))

    def _key(self, row: Mapping[str, Any]) -> Key:
        return row["seed"], row["criterion"], row["selection"], row["budget"]

    def _show(self, new: Row) -> None:
        """Puts a row in the place of the one with its key, or at the end."""
        rows = self.report["rows"]
        for index, row in enumerate(rows):
            if self._key(row) == self._key(new):
                rows[index] = new
                return
        rows.append(new)
