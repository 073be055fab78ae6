"""Comparison: the cells of a grid as a table with spread and as a picture of accuracy against MACs."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from xprune.comparison.cells import STAGES, Cells, Row, spread
from xprune.comparison.plots import draw
from xprune.errors import DataError


@dataclass(frozen=True)
class Comparison(Cells):
    """What `compare` returns: the cells of a grid, as a table with spread and as a picture."""

    def table(self) -> Table:
        """A row for each criterion and selection: mean and spread over seeds for each budget, and seconds."""
        seeds = len({row["seed"] for row in self.rows})
        table = Table(title=f"mean ± standard deviation over {seeds} seeds, in %", title_justify="left")
        for heading, _ in self._columns():
            table.add_column(heading, justify="left" if heading in ("criterion", "selection") else "right")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """The same table as text for a page."""
        lines = ["| " + " | ".join(heading for heading, _ in self._columns()) + " |"]
        lines.append("|" + "".join(" --- |" if left else " ---: |" for _, left in self._columns()))
        return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in self._cells())]) + "\n"

    def plot(self, path: str | Path, selections: Sequence[str] | None = None) -> Path:
        """Writes a picture: metric against MACs with its spread; of one budget, a line for each side.

        A panel for each stage, and for each of the selections. Needs matplotlib: pip install xprune[report].
        """
        return draw(self, path, selections)

    def _columns(self) -> list[tuple[str, bool]]:
        """(heading, left-aligned)"""
        stages = [stage for stage in STAGES if any(stage in row for row in self.rows)]
        figures = [f"{budget}: {STAGES[stage]}" for budget in self.budgets for stage in stages]
        figures += ["class-specific gap"] * self._explained + ["scoring s"]
        return [("criterion", True), ("selection", True), *((figure, False) for figure in figures)]

    @property
    def _explained(self) -> bool:
        return any("deletion_gap" in row for row in self.rows)

    def _cells(self) -> list[list[str]]:
        if not self.rows:
            raise DataError("the comparison has no cells.")
        stages = [stage for stage in STAGES if any(stage in row for row in self.rows)]
        table, seeds = [], len({row["seed"] for row in self.rows})
        for (criterion, selection), rows in self.lines().items():
            cells = [criterion, selection]
            for budget in self.budgets:
                here = [row for row in rows if row["budget"] in (budget, "")]
                cells += [_cell(here, stage, seeds) for stage in stages]
            if self._explained:
                cells.append(_percent(row["deletion_gap"] for row in rows if "deletion_gap" in row))
            seconds = [row["score_seconds"] for row in rows if "score_seconds" in row]
            table.append([*cells, f"{statistics.mean(seconds):.1f}" if seconds else ""])
        return table


def _cell(rows: Sequence[Row], stage: str, seeds: int) -> str:
    """Mean and spread; how many failed of how many, where some did; how many there are, where others have more."""
    found, failed = [row[stage] for row in rows if stage in row], sum("failed" in row for row in rows)
    notes = [f"{failed} of {len(rows)} failed"] * bool(failed)
    notes += [f"{len(rows)} of {seeds} seeds"] * (0 < len(rows) < seeds)
    if not found:
        return "failed" if failed else ""
    return f"{_percent(found)} ({', '.join(notes)})" if notes else _percent(found)


def _percent(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")
