"""The result of a comparison: shows its rows as a table, with mean and standard deviation over seeds."""

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
    """The result of `compare`: the rows of a grid, as a table and as a picture.

    Attributes:
        rows: One row for each cell, see `xprune.comparison.cells.Cells`.
        report: The content of the file: rows, settings, hardware, versions.

    Example:
        >>> taylor = {"criterion": "taylor", "selection": "global", "budget": "macs 0.5", "score_seconds": 2.0}
        >>> rows = ({**taylor, "seed": 0, "metric": 0.75}, {**taylor, "seed": 1, "metric": 0.85})
        >>> print(Comparison(rows, {}).markdown(), end="")
        | criterion | selection | macs 0.5: before fine-tuning | scoring s |
        | --- | --- | ---: | ---: |
        | taylor | global | 80.0 ± 7.1 | 2.0 |
    """

    def table(self) -> Table:
        """Returns a table for the terminal, with a line for each criterion and selection.

        For each budget it shows the mean metric and its standard deviation over seeds, in %. The last column shows the
        mean seconds of scoring.

        Raises:
            DataError: There are no rows.
        """
        seeds = len({row["seed"] for row in self.rows})
        table = Table(title=f"mean ± standard deviation over {seeds} seeds, in %", title_justify="left")
        for heading, _ in self._columns():
            table.add_column(heading, justify="left" if heading in ("criterion", "selection") else "right")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """Returns the same table as text in Markdown."""
        lines = ["| " + " | ".join(heading for heading, _ in self._columns()) + " |"]
        lines.append("|" + "".join(" --- |" if left else " ---: |" for _, left in self._columns()))
        return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in self._cells())]) + "\n"

    def plot(self, path: str | Path, selections: Sequence[str] | None = None) -> Path:
        """Writes a picture of the metric against the cost, with the standard deviation over seeds.

        There is a panel for each stage (before and after fine-tuning) and for each selection. With one budget there
        are no curves: the picture then has a line for each criterion.

        Args:
            path: The file to write, such as "accuracy.png".
            selections: Names of the selections to draw. None: all.

        Returns:
            The path.

        Raises:
            ModelError: matplotlib is not installed. `pip install 'xprune[report]'` installs it.
        """
        return draw(self, path, selections)

    def _columns(self) -> list[tuple[str, bool]]:
        """Returns the heading of each column, and True if the column is aligned to the left, False if to the right."""
        stages = [stage for stage in STAGES if any(stage in row for row in self.rows)]
        figures = [f"{budget}: {STAGES[stage]}" for budget in self.budgets for stage in stages]
        figures += ["class-specific gap"] * self._explained + ["scoring s"]
        return [("criterion", True), ("selection", True), *((figure, False) for figure in figures)]

    @property
    def _explained(self) -> bool:
        """True if some row has a deletion gap, else False."""
        return any("deletion_gap" in row for row in self.rows)

    def _cells(self) -> list[list[str]]:
        """Returns the text of each cell of the table, line by line. Raises DataError if there are no rows."""
        if not self.rows:
            raise DataError("the comparison has no cells. Run at least one criterion, one budget and one seed.")
        stages = [stage for stage in STAGES if any(stage in row for row in self.rows)]
        table, seeds = [], len({row["seed"] for row in self.rows})
        for (criterion, selection), rows in self.lines().items():
            cells = [criterion, selection]
            for budget in self.budgets:
                # The dense model has no budget, and its figures are shown in the columns of all budgets.
                here = [row for row in rows if row["budget"] in (budget, "")]
                cells += [_cell(here, stage, seeds) for stage in stages]
            if self._explained:
                cells.append(_percent(row["deletion_gap"] for row in rows if "deletion_gap" in row))
            seconds = [row["score_seconds"] for row in rows if "score_seconds" in row]
            table.append([*cells, f"{statistics.mean(seconds):.1f}" if seconds else ""])
        return table


def _cell(rows: Sequence[Row], stage: str, seeds: int) -> str:
    """Returns the text of one cell of the table.

    Args:
        rows: The rows of one criterion, selection and budget.
        stage: The key of the metric, see `STAGES`.
        seeds: The number of seeds of the comparison.

    Returns:
        Mean and standard deviation. In parentheses follow how many runs failed, and how many seeds are there if some
        are missing. "failed" if all failed.
    """
    found, failed = [row[stage] for row in rows if stage in row], sum("failed" in row for row in rows)
    notes = [f"{failed} of {len(rows)} failed"] * bool(failed)
    notes += [f"{len(rows)} of {seeds} seeds"] * (0 < len(rows) < seeds)
    if not found:
        return "failed" if failed else ""
    return f"{_percent(found)} ({', '.join(notes)})" if notes else _percent(found)


def _percent(values: Iterable[float]) -> str:
    """Returns mean ± standard deviation in %, as text. Empty if there are no values."""
    values = list(values)
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")
