"""The class `Comparison`, the result of a comparison. It shows the mean and the standard deviation over seeds."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from xprune.comparison.cells import STAGES, Cells, Row, spread
from xprune.comparison.plots import draw
from xprune.core.coverage import Coverage
from xprune.errors import DataError


@dataclass(frozen=True)
class Comparison(Cells):
    """The result of `compare`: the rows of a grid, which can be shown as a table and as a picture.

    Attributes:
        rows: One row for each cell, which is a combination of a seed, a criterion, a selection and a budget.
            `xprune.comparison.cells.Cells` describes the keys of a row.
        report: The content of the file: the rows, the settings, the hardware and the versions.

    Example:
        >>> taylor = {"criterion": "taylor", "selection": "global", "budget": "macs 0.5", "score_seconds": 2.0}
        >>> rows = ({**taylor, "seed": 0, "metric": 0.75}, {**taylor, "seed": 1, "metric": 0.85})
        >>> print(Comparison(rows, {}).markdown(), end="")
        | criterion | selection | macs 0.5: before fine-tuning | scoring s |
        | --- | --- | ---: | ---: |
        | taylor | global | 80.0 ± 7.1 | 2.0 |
    """

    def table(self) -> Table:
        """Returns a table for the terminal, with a line for each pair of a criterion and a selection.

        For each budget, the table contains the mean of the metric and its standard deviation over seeds, in % unless
        the task says that its metric is not shown in %. If
        faithfulness was measured, a column contains the mean deletion gap. The last column contains the mean number of
        seconds that scoring took.

        Raises:
            DataError: There are no rows.
        """
        seeds = len({row["seed"] for row in self.rows})
        shown = "" if self.metric_name == "accuracy, %" else f"{self.metric_name.removesuffix(', %')}: "
        unit = ", in %" if self.factor == 100 else ""
        table = Table(title=f"{shown}mean ± standard deviation over {seeds} seeds{unit}", title_justify="left")
        for heading, _ in self._columns():
            table.add_column(heading, justify="left" if heading in ("criterion", "selection") else "right")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """Returns the same table as a text in Markdown. Raises DataError if there are no rows."""
        lines = ["| " + " | ".join(heading for heading, _ in self._columns()) + " |"]
        lines.append("|" + "".join(" --- |" if left else " ---: |" for _, left in self._columns()))
        return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in self._cells())]) + "\n"

    def plot(self, path: str | Path, selections: Sequence[str] | None = None) -> Path:
        """Writes a picture of the metric against the cost, with the standard deviation over seeds.

        The picture has one panel for each selection and stage, which is before or after fine-tuning. With one budget,
        the picture has a line for each criterion instead of curves.

        Args:
            path: The file to write, such as "accuracy.png". An existing file is replaced.
            selections: The names of the selections to draw. None means all of them.

        Returns:
            The path of the file.

        Raises:
            ModelError: matplotlib is not installed. `pip install 'xprune[report]'` installs it.
        """
        return draw(self, path, selections)

    def coverage(self) -> list[str]:
        """Returns a line for each model of the rows: which share of its MACs the units cover, and what was left alone.

        The list is empty if the file was written by an older release.
        """
        known, shown = self.report.get("coverage", {}), {row.get("subject"): None for row in self.rows}
        return list(dict.fromkeys(Coverage.from_json(known[name]).text for name in shown if name in known))

    def _columns(self) -> list[tuple[str, bool]]:
        """Returns a tuple (heading, left) for each column of the table. `left` is True if it is aligned to the left."""
        stages = [stage for stage in STAGES if any(stage in row for row in self.rows)]
        figures = [f"{budget}: {STAGES[stage]}" for budget in self.budgets for stage in stages]
        figures += ["class-specific gap"] * self._explained + ["scoring s"]
        return [("criterion", True), ("selection", True), *((figure, False) for figure in figures)]

    @property
    def _explained(self) -> bool:
        """True if some row has a deletion gap, else False."""
        return any("deletion_gap" in row for row in self.rows)

    def _cells(self) -> list[list[str]]:
        """Returns the texts of the table, as a list of cells for each line. Raises DataError if there are no rows."""
        if not self.rows:
            raise DataError("the comparison has no cells. Run at least one criterion, one budget and one seed.")
        stages = [stage for stage in STAGES if any(stage in row for row in self.rows)]
        table, seeds = [], len({row["seed"] for row in self.rows})
        for (criterion, selection), rows in self.lines().items():
            cells = [criterion, selection]
            for budget in self.budgets:
                # The dense model has no budget. Its metric is shown in the columns of all budgets.
                here = [row for row in rows if row["budget"] in (budget, "")]
                cells += [_cell(here, stage, seeds, self.factor) for stage in stages]
            if self._explained:
                cells.append(_shown((row["deletion_gap"] for row in rows if "deletion_gap" in row), self.factor))
            seconds = [row["score_seconds"] for row in rows if "score_seconds" in row]
            table.append([*cells, f"{statistics.mean(seconds):.1f}" if seconds else ""])
        return table


def _cell(rows: Sequence[Row], stage: str, seeds: int, factor: int) -> str:
    """Returns the text of one cell of the table.

    Args:
        rows: The rows of one criterion, selection and budget.
        stage: The key of the metric, see `STAGES`.
        seeds: The number of seeds of the comparison.
        factor: The factor of the shown metrics, see `Cells.factor`.

    Returns:
        The mean and the standard deviation. If runs failed or seeds are missing, a note in parentheses says how many.
        If all runs failed, the text is "failed". If there are no rows, the text is empty.
    """
    found, failed = [row[stage] for row in rows if stage in row], sum("failed" in row for row in rows)
    notes = [f"{failed} of {len(rows)} failed"] * bool(failed)
    notes += [f"{len(rows)} of {seeds} seeds"] * (0 < len(rows) < seeds)
    if not found:
        return "failed" if failed else ""
    text = _shown(found, factor)
    return f"{text} ({', '.join(notes)})" if notes else text


def _shown(values: Iterable[float], factor: int) -> str:
    """Returns the mean and the standard deviation of some values as a text, such as "80.0 ± 7.1".

    If there is one value, the text is the mean only. If there is none, the text is empty. If the factor is 100, the
    text is in % with one digit after the point. Otherwise it has three digits after the point.
    """
    values = list(values)
    if not values:
        return ""
    mean, deviation = spread(values)
    digits = 1 if factor == 100 else 3
    text = f"{factor * mean:.{digits}f}"
    return text + (f" ± {factor * deviation:.{digits}f}" if deviation is not None else "")
