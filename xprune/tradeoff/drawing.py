"""Draws the picture of a frontier for papers, with matplotlib."""

from typing import TYPE_CHECKING, Any

from xprune.core.resource import resource
from xprune.errors import ModelError
from xprune.report.measure import Measure
from xprune.tradeoff.points import LATENCY, FrontierRecord, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def label_of(cost: str) -> str:
    """Returns the label of a cost, such as "MACs"."""
    return "measured latency" if cost == LATENCY else resource(cost).label


def draw(frontier: FrontierRecord, ax: "Axes | None", cost: str) -> "Axes":
    """Draws the metric against a cost. See `Frontier.plot`."""
    if ax is None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ModelError("A plot needs matplotlib: pip install 'xprune[report]'.") from error
        # The Figure is not made with pyplot, because pyplot keeps every figure in memory and may open a window.
        ax = Figure(figsize=(6.4, 4.0), layout="constrained").add_subplot()
    shown = Measure.of(frontier.dense)
    drawn: Any = ax

    def curve(points: tuple[Point, ...], label: str, **style: Any) -> None:
        """Draws the points as a line with markers."""
        xs = [100 * frontier.share(point, cost) for point in points]
        drawn.plot(xs, [shown.factor * point.metrics.metric for point in points], label=label, **style)

    drawn.axhline(shown.factor * frontier.dense.metric, color="0.4", linestyle="--", linewidth=1)
    drawn.plot([100], [shown.factor * frontier.dense.metric], "o", color="0.2", fillstyle="none", label="dense")
    made_by = frontier.settings.get("criterion", {}).get("name", "pruned")
    curve(frontier.points, made_by, marker="o", color="#0b5394")
    if frontier.chance:
        curve(frontier.chance, "chance", marker="s", color="#b8520a", linestyle=":")
    drawn.set(xlabel=f"{label_of(cost)}, % of dense", ylabel=shown.name + shown.unit)
    drawn.grid(alpha=0.3)
    drawn.legend(frameon=False)
    return ax
