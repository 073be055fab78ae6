"""Cells: the rows of a comparison, and what pictures and tables ask of them."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
STAGES = {"metric": "before fine-tuning", "tuned_metric": "after"}
"""What was measured when, by the name that a row has it under."""


@dataclass(frozen=True)
class Cells:
    """The rows of a grid.

    rows     a cell each: seed, criterion, selection, budget, the settings of both, macs, params and other resources
             (shares of the dense model's), metric and loss as cut, tuned_metric and tuned_loss after fine-tuning,
             deletion_gap where it was asked for and the criterion is class-wise, seconds of each stage
    report   all that the file holds: rows, settings, hardware, versions
    """

    rows: tuple[Row, ...]
    report: Mapping[str, Any]

    @property
    def budgets(self) -> list[str]:
        """Budgets in the order they were run in."""
        return list(dict.fromkeys(row["budget"] for row in self.rows if row["budget"]))

    def lines(self) -> dict[tuple[str, str], list[Row]]:
        """Rows by (criterion, selection), dense first."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["criterion"], row["selection"]), []).append(row)
        return found


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """(mean, standard deviation where there are two values and more)."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
