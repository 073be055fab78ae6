"""The results of `faithfulness`, which can be read as numbers, as a table and as a picture."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from xprune.errors import ModelError


@dataclass(frozen=True)
class Curves:
    """How the metric changes while more and more units are removed, in the order in which a class needs them.

    For each class c and each fraction, gates remove the given fraction of the units at each site: those that c needs
    most. With these gates, the metric is measured on samples of c and on samples of other classes.

    Attributes:
        own: The metric on samples of the class, as `own[fraction][class]`. NaN if the class has no sample.
        others: The metric on samples of other classes, with the gates of the class, as `others[fraction][class]`. NaN
            if there is no such sample.
        dense: The metric of the dense model on the samples of `own`, as `dense[class]`.
        others_dense: The metric of the dense model on the samples of `others`, as `others_dense[class]`.

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
        """How much more of the metric a class loses than other classes, as `gaps[fraction][class]`.

        Both lose it because the units that the class needs most are removed.
        """
        drops = []
        for own, others in zip(self.own, self.others, strict=True):
            cells = zip(self.dense, own, self.others_dense, others, strict=True)
            drops.append(tuple((dense - a) - (rest - b) for dense, a, rest, b in cells))
        return tuple(drops)

    @property
    def gap(self) -> float:
        """The mean of `gaps` over all fractions and classes, without NaN."""
        return _mean(value for row in self.gaps for value in row)


@dataclass(frozen=True)
class Faithfulness:
    """The result of `faithfulness`: the curves of a criterion, and other curves to compare them with.

    Attributes:
        criterion: The name of the criterion.
        order: How the units of a class are ordered: "scores" or "contrast", see `faithfulness`.
        metric_name: The name of the metric.
        samples: The number of samples that were measured.
        fractions: The fractions of the units of each site that are removed, or kept in `insertion`.
        deletion: The curves if the units that the class needs most are removed.
        insertion: The curves if only the units that the class needs most are kept. None if they were not measured. Read
            them together with `deletion`: if such a model predicts the same class for every sample, the curve of this
            class is good too.
        chance: The curves if units are removed in a random order, which differs between classes. There is one entry for
            each random order.
        agnostic: The curves if units are removed in the order of `scores.values`, which is the same for all classes.
            None if they were not measured. Their gap is 0 except for random variation.
        higher_is_better: True if a larger metric is better. False if a smaller metric is better, as with an error. The
            gaps of the curves are then multiplied by -1.

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
    higher_is_better: bool = True

    @property
    def gap(self) -> float:
        """The mean gap of the deletion curves, see `Curves.gap`.

        It is positive if a class loses more than other classes, also if a smaller metric is better. If it is near 0,
        the scores do not distinguish the classes.
        """
        return self._sign * self.deletion.gap

    @property
    def _sign(self) -> int:
        """1 if a larger metric is better, else -1. A class loses of an error if the error becomes larger."""
        return 1 if self.higher_is_better else -1

    @property
    def insertion_gap(self) -> float | None:
        """How much more of the metric other classes lose than the class, if only the units of the class are kept.

        It is the mean over all fractions and classes. None if insertion was not measured.
        """
        return None if self.insertion is None else -self._sign * self.insertion.gap

    def means(self) -> dict[str, list[float]]:
        """Returns the deletion curves, averaged over all classes.

        Returns:
            A dict of three lists of the same length. "fractions": 0, followed by the fractions. "own": the metric on
            samples of the class, at each of these fractions. "others": the metric on samples of other classes, at each
            of these fractions.
        """
        own, others = (self.deletion.dense, self.deletion.own), (self.deletion.others_dense, self.deletion.others)
        return {"fractions": [0.0, *self.fractions], "own": _line(*own), "others": _line(*others)}

    def to_json(self) -> dict[str, Any]:
        """Returns all curves and mean gaps as a dict that JSON can hold. Curves that were not measured are None."""
        gaps = {
            "deletion": self.gap,
            "insertion": self.insertion_gap,
            "chance": [self._sign * c.gap for c in self.chance],
        }
        gaps["agnostic"] = self._sign * self.agnostic.gap if self.agnostic else None
        found: dict[str, Any] = _plain({**asdict(self), "gaps": gaps})
        return found

    def table(self) -> Table:
        """Returns a table with a row for each fraction. Each curve has two columns: the class and the other classes."""
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
        """Draws the deletion curves: for the class, for other classes, and for the class with random orders.

        Args:
            axes: The matplotlib axes to draw on. None means new axes on a new figure.

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
            # This empty line gives the legend one entry for all random orders together.
            axes.plot([], [], color="0.7", label="chance")
        axes.set(xlabel="units deleted, % of each site", ylabel=self.metric_name, title=self.criterion)
        axes.legend(frameon=False)
        return axes

    def _more(self) -> tuple[tuple[str, Curves | None], ...]:
        """Returns the curves that may be None, as tuples (name, curves)."""
        return ("insertion", self.insertion), ("agnostic", self.agnostic)


Named = Mapping[str, Faithfulness | Mapping[str, Sequence[float]]]
"""Curves that a report draws, by the name to show. They are a `Faithfulness` or a dict from `Faithfulness.means`."""


def _line(dense: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    """Returns the metric averaged over classes: first for the dense model, then for each fraction."""
    return [_mean(dense), *(_mean(row) for row in rows)]


def _mean(values: Iterable[float]) -> float:
    """Returns the mean of the values that are not NaN. Returns NaN if there are none."""
    seen = [value for value in values if not math.isnan(value)]
    return sum(seen) / len(seen) if seen else math.nan


def _plain(value: Any) -> Any:
    """Returns a copy of the value for JSON: tuples become lists, and NaN becomes None."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
