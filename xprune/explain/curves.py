"""Curves: what `faithfulness` found, as numbers, as a table and as a picture."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from xprune.errors import ModelError


@dataclass(frozen=True)
class Curves:
    """The metric of each class and of the samples of all others, behind the gates of that class.

    own, others   [fraction][class], the metric; NaN where no sample was measured
    dense         [class], the metric of its samples with every unit there
    others_dense  [class], that of the samples that `others` is measured on
    """

    own: tuple[tuple[float, ...], ...]
    others: tuple[tuple[float, ...], ...]
    dense: tuple[float, ...]
    others_dense: tuple[float, ...]

    @property
    def gaps(self) -> tuple[tuple[float, ...], ...]:
        """[fraction][class]: what the class loses beyond what the others lose."""
        drops = []
        for own, others in zip(self.own, self.others, strict=True):
            cells = zip(self.dense, own, self.others_dense, others, strict=True)
            drops.append(tuple((dense - a) - (rest - b) for dense, a, rest, b in cells))
        return tuple(drops)

    @property
    def gap(self) -> float:
        """Mean gap over fractions and classes: the area between the two drops."""
        return _mean(value for row in self.gaps for value in row)


@dataclass(frozen=True)
class Faithfulness:
    """What `faithfulness` returns.

    deletion    the share `fractions` of each site's units is gone, those that the class needs most first
    insertion   only that share is there; None where it was not asked for. A model that always answers the class
                does well here: read it beside the deletion
    chance      deletion in random orders, one for each class and seed
    agnostic    deletion in the order of `scores.values`, the same for all classes: its gap is 0 but for sampling
    """

    criterion: str
    order: str
    metric_name: str
    samples: int
    fractions: tuple[float, ...]
    deletion: Curves
    insertion: Curves | None
    chance: tuple[Curves, ...]
    agnostic: Curves | None

    @property
    def gap(self) -> float:
        """Mean deletion gap; 0: classes do not differ in what they need, as far as the scores know."""
        return self.deletion.gap

    @property
    def insertion_gap(self) -> float | None:
        """Mean of what the others lose beyond what the class loses, where only the units it needs most are there."""
        return None if self.insertion is None else -self.insertion.gap

    def means(self) -> dict[str, list[float]]:
        """Deletion, means over classes: "fractions" from 0 on, metric of the class's "own" samples and of "others"."""
        own, others = (self.deletion.dense, self.deletion.own), (self.deletion.others_dense, self.deletion.others)
        return {"fractions": [0.0, *self.fractions], "own": _line(*own), "others": _line(*others)}

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the mean gaps; what was not measured is None."""
        gaps = {"deletion": self.gap, "insertion": self.insertion_gap, "chance": [c.gap for c in self.chance]}
        gaps["agnostic"] = self.agnostic.gap if self.agnostic else None
        found: dict[str, Any] = _plain({**asdict(self), "gaps": gaps})
        return found

    def table(self) -> Table:
        """A row for each fraction: the class's metric and the others', deleted and inserted, beside chance."""
        table = Table(title=f"{self.criterion}, order of {self.order}, {self.samples} samples", title_justify="left")
        blocks = [("deleted", self.deletion)]
        blocks += [(name, curves) for name, curves in self._more() if curves is not None]
        blocks += [(f"chance {index}", curves) for index, curves in enumerate(self.chance)]
        for heading in ("units", *(f"{name}: {part}" for name, _ in blocks for part in ("class", "others"))):
            table.add_column(heading, justify="right")
        for index, fraction in enumerate(self.fractions):
            cells = [_mean(rows[index]) for _, curves in blocks for rows in (curves.own, curves.others)]
            table.add_row(f"{fraction:.0%}", *(f"{cell:.3f}" for cell in cells))
        table.caption = f"mean deletion gap {self.gap:.3f}"
        return table

    def plot(self, axes: Any = None) -> Any:
        """Deletion curves on matplotlib axes, which are returned: the class, the others, both by chance.

        Needs matplotlib: pip install xprune[report].
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ModelError("a plot needs matplotlib: pip install 'xprune[report]'.") from error
            axes = Figure(figsize=(4.2, 3.2), layout="constrained").subplots()
        means = self.means()
        xs = [100 * fraction for fraction in means["fractions"]]
        for curves in self.chance:
            axes.plot(xs, _line(curves.dense, curves.own), color="0.7", linewidth=1)
        axes.plot(xs, means["own"], color="C3", marker="o", markersize=3, label="the class")
        axes.plot(xs, means["others"], color="C0", marker="o", markersize=3, label="other classes")
        if self.chance:
            axes.plot([], [], color="0.7", label="chance")
        axes.set(xlabel="units deleted, % of each site", ylabel=self.metric_name, title=self.criterion)
        axes.legend(frameon=False)
        return axes

    def _more(self) -> tuple[tuple[str, Curves | None], ...]:
        return ("insertion", self.insertion), ("agnostic", self.agnostic)


Named = Mapping[str, Faithfulness | Mapping[str, Sequence[float]]]
"""What a report draws, by name: results, or curves as `Faithfulness.means` gives them."""


def _line(dense: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(dense), *(_mean(row) for row in rows)]


def _mean(values: Iterable[float]) -> float:
    seen = [value for value in values if not math.isnan(value)]
    return sum(seen) / len(seen) if seen else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
