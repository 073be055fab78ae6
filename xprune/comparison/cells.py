"""The rows of a comparison, which tables and pictures are made from. A row holds the results of one cell."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""The results of one cell as plain data, see `Cells`."""
STAGES = {"metric": "before fine-tuning", "tuned_metric": "after"}
"""Key of a metric in a row -> when it was measured, in words."""


@dataclass(frozen=True)
class Cells:
    """The rows of a comparison.

    Attributes:
        rows: One row for each cell. Its keys are "seed", "criterion", "selection", "budget" and "made_by" (criterion
            and selection with all settings). "macs", "params" and other resources are shares of the dense model's cost.
            "metric" and "loss" are those after surgery, "tuned_metric" and "tuned_loss" those after fine-tuning.
            "deletion_gap" is there if the grid asks for faithfulness and the criterion has class-wise scores. Keys that
            end in "_seconds" hold the time of each stage. "failed" holds the error of a peer that failed.
        report: The content of the file: rows, settings, hardware, versions.
    """

    rows: tuple[Row, ...]
    report: Mapping[str, Any]

    @property
    def budgets(self) -> list[str]:
        """The names of the budgets, in the order in which they were run."""
        return list(dict.fromkeys(row["budget"] for row in self.rows if row["budget"]))

    def lines(self) -> dict[tuple[str, str], list[Row]]:
        """Groups the rows into lines of the table.

        Returns:
            (criterion, selection) -> its rows, for all budgets and seeds. The dense model comes first, under
            ("dense", "").
        """
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["criterion"], row["selection"]), []).append(row)
        return found


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Returns the mean and the standard deviation of some values. The deviation of a single value is None."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
