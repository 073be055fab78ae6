"""The results of `faithfulness`: curves as numbers, as a table and as a picture."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from xprune.errors import ModelError


@dataclass(frozen=True)
class Curves:
    """The metric of a model while units are removed in the order in which a class needs them.

    For each class c and each fraction, the gates remove that fraction of the units that c needs most. Two groups of
    samples are measured with these gates: samples of c, and samples of other classes.

    Attributes:
        own: The metric of samples of the class, [fraction][class]. NaN if no sample was measured.
        others: The metric of samples of other classes, with the gates of the class, [fraction][class]. NaN if no sample
            was measured.
        dense: The metric of samples of the class with all units, [class].
        others_dense: The metric with all units of the samples that `others` was measured on, [class].

    Example:
        >>> curves = Curves(own=((0.5, 1.0),), others=((0.75, 1.0),), dense=(1.0, 1.0), others_dense=(1.0, 1.0))
        >>> curves.gaps  # class 0 loses 0.5, the others lose 0.25 with its gates
        ((0.25, 0.0),)
    """

    own: tuple[tuple[float, ...], ...]
    others: tuple[tuple[float, ...], ...]
    dense: tuple[float, ...]
    others_dense: tuple[float, ...]

    @property
    def gaps(self) -> tuple[tuple[float, ...], ...]:
        """How much more the class loses than the others lose, [fraction][class]."""
        drops = []
        for own, others in zip(self.own, self.others, strict=True):
            cells = zip(self.dense, own, self.others_dense, others, strict=True)
            drops.append(tuple((dense - a) - (rest - b) for dense, a, rest, b in cells))
        return tuple(drops)

    @property
    def gap(self) -> float:
        """The mean gap over all fractions and classes: the area between the curves of the two losses."""
        return _mean(value for row in self.gaps for value in row)


@dataclass(frozen=True)
class Faithfulness:
    """The result of `faithfulness`: curves for the order to test, and for the orders to compare it with.

    Attributes:
        criterion: The name of the criterion.
        order: "scores" or "contrast", see `faithfulness`.
        metric_name: The name of the metric.
        samples: The number of samples that were measured.
        fractions: The fractions of each site's units that were removed.
        deletion: These fractions are removed, units that the class needs most first.
        insertion: Only these fractions are kept. None if it was not measured. A model that gives the same class as
            its answer to every sample does well here for that class. So read it together with the deletion.
        chance: Deletion in random orders. Each has a separate order for each class.
        agnostic: Deletion in the order of `scores.values`, which is the same for all classes. None if it was not
            measured. Its gap is 0 except for random variation.

    Example:
        >>> curves = Curves(own=((0.5, 1.0),), others=((0.75, 1.0),), dense=(1.0, 1.0), others_dense=(1.0, 1.0))
        >>> found = Faithfulness("taylor", "scores", "accuracy", 40, (0.1,), curves, None, (), None)
        >>> found.gap
        0.125
        >>> found.means()
        {'fractions': [0.0, 0.1], 'own': [1.0, 0.75], 'others': [1.0, 0.875]}
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
        """The mean deletion gap. Near 0: the scores know no difference between the classes."""
        return self.deletion.gap

    @property
    def insertion_gap(self) -> float | None:
        """How much more the others lose than the class, if only the units that the class needs most are kept.

        The mean over all fractions and classes. None if insertion was not measured.
        """
        return None if self.insertion is None else -self.insertion.gap

    def means(self) -> dict[str, list[float]]:
        """Returns the deletion curves as means over all classes.

        Returns:
            "fractions": the fractions, with 0 in front. "own": the metric of samples of the class, one number for each
            fraction. "others": the metric of samples of other classes.
        """
        own, others = (self.deletion.dense, self.deletion.own), (self.deletion.others_dense, self.deletion.others)
        return {"fractions": [0.0, *self.fractions], "own": _line(*own), "others": _line(*others)}

    def to_json(self) -> dict[str, Any]:
        """Returns all curves and the mean gaps as plain data for JSON. Curves that were not measured are None."""
        gaps = {"deletion": self.gap, "insertion": self.insertion_gap, "chance": [c.gap for c in self.chance]}
        gaps["agnostic"] = self.agnostic.gap if self.agnostic else None
        found: dict[str, Any] = _plain({**asdict(self), "gaps": gaps})
        return found

    def table(self) -> Table:
        """Returns a table with a row for each fraction, and two columns for each curve: the class and the others."""
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
        """Draws the deletion curves: the class, the other classes, and the class for random orders.

        Args:
            axes: The matplotlib axes to draw on. None: new axes on a new figure.

        Returns:
            The axes.

        Raises:
            ModelError: matplotlib is not installed. `pip install 'xprune[report]'` installs it.
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
            # One entry in the legend for all random orders.
            axes.plot([], [], color="0.7", label="chance")
        axes.set(xlabel="units deleted, % of each site", ylabel=self.metric_name, title=self.criterion)
        axes.legend(frameon=False)
        return axes

    def _more(self) -> tuple[tuple[str, Curves | None], ...]:
        """Returns the curves that may be missing, each with its name."""
        return ("insertion", self.insertion), ("agnostic", self.agnostic)


Named = Mapping[str, Faithfulness | Mapping[str, Sequence[float]]]
"""Name -> curves that a report draws under it: a result, or curves in the form that `Faithfulness.means` returns."""


def _line(dense: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    """Returns means over classes: first without any unit removed, then for each fraction."""
    return [_mean(dense), *(_mean(row) for row in rows)]


def _mean(values: Iterable[float]) -> float:
    """Returns the mean of the values that are not NaN. NaN if there are none."""
    seen = [value for value in values if not math.isnan(value)]
    return sum(seen) / len(seen) if seen else math.nan


def _plain(value: Any) -> Any:
    """Returns the value with lists for tuples and None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
