"""The rows of a comparison, from which tables and pictures are made. A row contains the results of one cell.

A cell is one combination of a seed, a criterion, a selection and a budget.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""The results of one cell, as a mapping of data that JSON can hold. `Cells` describes its keys."""
STAGES = {"metric": "before fine-tuning", "tuned_metric": "after"}
"""For each key of a metric in a row, a text that says when the metric was measured."""


@dataclass(frozen=True)
class Cells:
    """The rows of a comparison.

    Attributes:
        rows: One row for each cell. A row is a mapping with these keys. "seed", "criterion", "selection" and "budget"
            are the names of the cell. "made_by" is a text with the criterion, the selection and all their settings.
            "macs", "params" and other resources are fractions of the dense model's cost. "metric" and "loss" were
            measured after surgery, "tuned_metric" and "tuned_loss" after fine-tuning. If the metric is not the
            accuracy, "metric_name" is its name. "higher_is_better" is False if a smaller metric is better, and
            "percent" is False if the metric is not shown in %. "deletion_gap" is there if the
            grid asks for faithfulness and the criterion has class-wise scores. Keys that end in "_seconds" hold the
            time of a stage. "failed" is the error message if a pruner of another library failed.
        report: The content of the file: the rows, the settings, the hardware and the versions.
    """

    rows: tuple[Row, ...]
    report: Mapping[str, Any]

    @property
    def budgets(self) -> list[str]:
        """The names of the budgets, in the order in which they occur in the rows."""
        return list(dict.fromkeys(row["budget"] for row in self.rows if row["budget"]))

    @property
    def metric_name(self) -> str:
        """The name of the metric, with ", %" if it is shown in %. "accuracy, %" if the rows do not say it."""
        name = next((str(row["metric_name"]) for row in self.rows if "metric_name" in row), "accuracy")
        return f"{name}, %" if self.factor == 100 else name

    @property
    def factor(self) -> int:
        """The factor of shown metrics: 100 if they are shown in %, else 1."""
        return 100 if all(row.get("percent", True) for row in self.rows) else 1

    @property
    def higher_is_better(self) -> bool:
        """True if a larger metric is better, else False."""
        return all(row.get("higher_is_better", True) for row in self.rows)

    def lines(self) -> dict[tuple[str, str], list[Row]]:
        """Groups the rows into the lines of the table.

        Returns:
            For each (criterion, selection), a list of its rows for all budgets and seeds. The row of the dense model
            has the key `("dense", "")` and comes first.
        """
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["criterion"], row["selection"]), []).append(row)
        return found


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Returns (mean, standard deviation) of some values. The standard deviation is None if there is only one value."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
