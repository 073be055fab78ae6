"""The classes `Point` and `Frontier`: the accuracy and the cost of one model at many budgets."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.table import Table

from xprune.artefact.files import check_file
from xprune.core.budget import Budget
from xprune.core.plan import Plan
from xprune.core.record import Metrics
from xprune.core.registry import registered
from xprune.core.scores import Scores
from xprune.errors import ArtefactError, BudgetError
from xprune.report.measure import Measure
from xprune.report.text import amount, measured, render

if TYPE_CHECKING:
    pass

KIND = "xprune frontier"
"""The entry "kind" of a saved frontier. It shows that xprune wrote the file."""
LATENCY = "latency"
"""The name under which `Frontier.share` and the pictures know the measured time."""


@dataclass(frozen=True)
class Point:
    """One pruned model of a frontier: the budget that was asked for, and what was measured.

    Attributes:
        asked: The fraction of the dense model's cost that the budget allowed, in the resource of the frontier.
        predicted: The fraction that the plan promised in this resource. It is at most `asked`.
        counts: The number of units that each site keeps.
        metrics: The loss, the metric and the costs of the model as cut, without fine-tuning.
        time: The measured time of a forward pass, as a fraction of the dense model's time. None if it was not measured.

    Example:
        >>> Point(0.5, 0.498, (3, 20), Metrics(0.91, 0.4, 100)).metrics.accuracy
        0.91
    """

    asked: float
    predicted: float
    counts: tuple[int, ...]
    metrics: Metrics
    time: float | None = None


@dataclass(frozen=True)
class FrontierRecord:
    """The values of a frontier. `Frontier`, which describes its attributes, can also draw itself."""

    resource: str
    dense: Metrics
    points: tuple[Point, ...]
    chance: tuple[Point, ...] = ()
    sites: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Scores | None = field(default=None, compare=False, repr=False)
    plans: tuple[Plan, ...] = field(default=(), compare=False, repr=False)

    def least(self, within: float) -> Point | None:
        """Returns the point with the smallest budget whose metric is close enough to that of the dense model.

        Args:
            within: How much worse the metric may be, in the unit of the metric. 0.01 is one point of accuracy.

        Returns:
            The point. None if no point is close enough.
        """
        sign = Measure.of(self.dense).sign
        enough = [p for p in self.points if sign * (p.metrics.metric - self.dense.metric) >= -within - 1e-12]
        return min(enough, key=lambda point: point.asked, default=None)

    def budget(self, point: Point) -> Budget:
        """Returns the budget that gives the model of a point. `Pruner` and `xprune.select` take it."""
        given = self.settings.get("budget", {})
        more = {name: given[name] for name in ("min_units", "round_to", "of", "target") if given.get(name) is not None}
        return Budget(resources={self.resource: point.asked}, **more)

    @property
    def measures(self) -> list[str]:
        """The names of what each model costs: the measured resources, and "latency" if times were measured."""
        timed = any(point.time is not None for point in self.points)
        return [kind.name for kind in self._resources()] + [LATENCY] * timed

    def share(self, point: Point, name: str) -> float:
        """Returns a measured cost of a point as a fraction of the dense model's cost.

        Args:
            point: The point.
            name: The name of a resource that was measured, or "latency" for the measured time.

        Returns:
            The fraction. NaN if it was not measured.
        """
        if name == LATENCY:
            return math.nan if point.time is None else point.time
        cost, whole = point.metrics.costs.get(name), self.dense.costs.get(name)
        return cost / whole if cost is not None and whole else math.nan

    def table(self) -> Table:
        """Returns a table for the terminal: a row for the dense model and for each budget."""
        shown, chance = Measure.of(self.dense), {point.asked: point for point in self.chance}
        kinds = self._resources()
        timed = self.dense.latency_ms is not None
        table = Table(title=self._title(), title_justify="left")
        headings = ["budget", *(kind.label for kind in kinds), *["latency"] * timed, shown.name, "change"]
        for heading in [*headings, *["chance"] * bool(chance)]:
            table.add_column(heading, justify="left" if heading == "budget" else "right")
        whole, timing = self.dense.costs, [f"{self.dense.latency_ms or 0:.1f} ms"] * timed
        costs = [amount(whole, {}, kind) for kind in kinds]
        table.add_row("dense", *costs, *timing, number(self.dense.metric, shown), "", *[""] * bool(chance))
        for point in self.points:
            costs = [f"{self.share(point, kind.name):.1%}" for kind in kinds]
            timing = [_time(point)] * timed
            change = number(point.metrics.metric - self.dense.metric, shown, signed=True)
            other = chance.get(point.asked)
            by_chance = [number(other.metrics.metric, shown) if other else "-"] * bool(chance)
            table.add_row(name_of(point), *costs, *timing, number(point.metrics.metric, shown), change, *by_chance)
        return table

    def summary(self) -> str:
        """Returns the table as text, and below it the smallest budget that loses little and the least that there is."""
        return render(self.table()) + "\n".join(self.notes) + "\n"

    @property
    def notes(self) -> list[str]:
        """Sentences that say which budget to ask for."""
        shown, lines = Measure.of(self.dense), []
        # A line that says the same as the one before is left out.
        said: Point | None = None
        for within in (0.01, 0.03) if shown.factor == 100 else ():
            found, points = self.least(within), f"{100 * within:.0f} point" + "s" * (within > 0.01)
            text = f"the smallest budget is {name_of(found)}" if found else "no budget of the table is large enough"
            if found is None or found != said:
                lines.append(f"For at most {points} of {shown.name} less than dense, {text}.")
            said = found
        least = self.settings.get("least")
        if least is not None:
            lines.append(f"The least that can be reached is {100 * least:.1f} % of the {self._label(self.resource)}.")
        lines += [f"{share:.3g} was left out: {reason}" for share, reason in self.settings.get("refused", ())]
        if self.dense.data == "training":
            lines.append("The metric was measured on training data, because there are no validation data.")
        return lines

    def checked(self, cost: str) -> str:
        """Returns the name of a cost. Raises BudgetError if it was not measured."""
        if cost not in self.measures:
            raise BudgetError(f"{cost!r} was not measured, only {', '.join(self.measures)}. Give one of these.")
        return cost

    def save(self, path: str | Path) -> Path:
        """Writes the frontier to a JSON file, without the scores and the plans.

        Raises:
            ArtefactError: `path` is a file that is not a saved frontier.
        """
        path = Path(path)
        check_file(path, is_frontier)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path

    def to_json(self) -> dict[str, Any]:
        """Returns the frontier as a dict that JSON can hold, without the scores and the plans."""
        return {
            "kind": KIND,
            "resource": self.resource,
            "dense": self.dense.to_json(),
            "points": [_to_json(point) for point in self.points],
            "chance": [_to_json(point) for point in self.chance],
            "sites": [dict(site) for site in self.sites],
            "settings": dict(self.settings),
        }

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a frontier that `save` wrote.

        Raises:
            ArtefactError: There is no such file, or it does not hold a frontier.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["kind"] != KIND:
                raise KeyError("kind")
            chance = tuple(_from_json(each) for each in data["chance"])
            points = tuple(_from_json(each) for each in data["points"])
            dense, sites = Metrics(**data["dense"]), tuple(data["sites"])
            return cls(data["resource"], dense, points, chance, sites, data["settings"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"{path} does not hold a frontier ({type(error).__name__}: {error}). Give a file that Frontier.save or "
                "`xprune frontier` wrote."
            ) from error

    def _resources(self) -> list[Any]:
        """Returns the resources that were measured, in the order of `xprune.RESOURCES`."""
        return measured({"dense": self.dense})

    def _label(self, name: str) -> str:
        """Returns the label of a resource, such as "MACs"."""
        kind = registered("resources").get(name)
        return kind.label if kind is not None else name

    def _title(self) -> str:
        """Returns the title of the table."""
        made_by = self.settings.get("criterion", {}).get("name", "")
        by = f" with {made_by}" if made_by else ""
        return f"budgets of the {self._label(self.resource)}{by}, on {self.dense.samples} {self.dense.data} samples"


def is_frontier(path: Path) -> bool:
    """Returns True if a file holds a saved frontier, else False."""
    try:
        FrontierRecord.load(path)
    except ArtefactError:
        return False
    return True


def name_of(point: Point) -> str:
    """Returns the budget of a point as a text, such as "50 %"."""
    return f"{100 * point.asked:.3g} %"


def number(value: float, shown: Measure, signed: bool = False) -> str:
    """Returns a metric as a text: with one digit after the point if it is shown in %, else with four digits."""
    sign = "+" if signed else ""
    return f"{shown.factor * value:{sign}.1f}" if shown.factor == 100 else f"{value:{sign}.4g}"


def _time(point: Point) -> str:
    """Returns the time of a point and how many times as fast as the dense model it is, such as "4.1 ms (1.52x)"."""
    if point.time is None or point.metrics.latency_ms is None:
        return "-"
    return f"{point.metrics.latency_ms:.1f} ms ({1 / point.time:.2f}x)"


def _to_json(point: Point) -> dict[str, Any]:
    """Returns a point as a dict that JSON can hold."""
    return {
        "asked": point.asked,
        "predicted": point.predicted,
        "counts": list(point.counts),
        "time": point.time,
        "metrics": point.metrics.to_json(),
    }


def _from_json(data: Mapping[str, Any]) -> Point:
    """Returns the point that `_to_json` has written."""
    counts: Sequence[int] = data["counts"]
    return Point(data["asked"], data["predicted"], tuple(counts), Metrics(**data["metrics"]), data["time"])
