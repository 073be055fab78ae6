"""Draws the picture of a comparison: the metric against the cost. With one budget, the metric of each criterion."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from xprune.comparison.cells import STAGES, Cells, Row, spread
from xprune.core.resource import resource
from xprune.errors import ModelError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SOFTWARE = "xprune compare"
"""A text that is written into each PNG. `is_drawn` looks for it, to find out whether a file may be replaced."""


def draw(comparison: Cells, path: str | Path, selections: Sequence[str] | None = None) -> Path:
    """Writes the picture of a comparison to a file. See `Comparison.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelError("a plot needs matplotlib: pip install 'xprune[report]'.") from error
    shown = selections or list(dict.fromkeys(s for _, s in comparison.lines() if s))
    stages = [stage for stage in STAGES if any(stage in row for row in comparison.rows)]
    # With one budget, each curve would have only one point. So another picture is drawn.
    kind = _curves if len(comparison.budgets) > 1 else _lines
    figure = Figure(layout="constrained")
    kind(figure, comparison, shown, stages)
    path = Path(path)
    figure.savefig(path, dpi=150, metadata={"Software": _SOFTWARE} if path.suffix == ".png" else None)
    return path


def is_drawn(path: Path) -> bool:
    """Returns True if the file is a PNG that `draw` wrote. Returns False for any other file, or if there is no file."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except OSError:
        return False


def _curves(figure: "Figure", comparison: Cells, shown: Sequence[str], stages: Sequence[str]) -> None:
    """Draws the mean metric and its standard deviation against the cost, in one panel for each selection and stage.

    Args:
        figure: The matplotlib figure.
        comparison: The rows to draw.
        shown: The names of the selections to draw.
        stages: The keys of the metrics to draw, see `STAGES`.
    """
    lines, limited = comparison.lines(), resource(comparison.budgets[0].split(" ")[0])
    names = list(dict.fromkeys(c for c, s in lines if s in shown))
    width = 0.8 + 3.4 * len(shown)
    figure.set_size_inches(width, 0.9 + 2.9 * len(stages))
    axes = figure.subplots(len(stages), len(shown), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for row, stage in zip(axes, stages, strict=True):
        for axis, selection in zip(row, shown, strict=True):
            handles["dense"] = axis.axhline(_dense(comparison), color="0.4", linestyle="--", linewidth=1)
            for index, name in enumerate(names):
                if (name, selection) in lines:
                    handles[name] = _curve(
                        axis, comparison.budgets, lines[name, selection], stage, index, limited.name, comparison.factor
                    )
            axis.set_title(f"{selection}, {STAGES[stage]}", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(comparison.metric_name)
    for axis in axes[-1]:
        axis.set_xlabel(f"{limited.label}, share of dense")
    # In the legend, a long name is about 2.4 inches wide.
    columns = max(1, min(len(handles), int(width / 2.4)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _curve(
    axis: Any, budgets: Sequence[str], rows: Sequence[Row], stage: str, index: int, cost: str, factor: int
) -> Any:
    """Draws one curve with error bars, which show the standard deviation over seeds.

    Args:
        axis: The matplotlib axes.
        budgets: The names of the budgets. The curve has one point for each budget.
        rows: The rows of one criterion and selection.
        stage: The key of the metric, see `STAGES`.
        index: The number of the curve. It determines the colour and the marker.
        cost: The name of the resource for the horizontal axis.
        factor: The factor of the shown metrics, see `Cells.factor`.

    Returns:
        The matplotlib object that was drawn, which the legend needs.
    """
    points = []
    for budget in budgets:
        here = [row for row in rows if row["budget"] == budget and stage in row]
        if here:
            points.append((spread(row[cost] for row in here)[0], *spread(row[stage] for row in here)))
    xs, means, spreads = zip(*sorted(points), strict=True) if points else ((), (), ())
    return axis.errorbar(
        xs,
        [factor * mean for mean in means],
        [factor * (spread or 0) for spread in spreads],
        marker="osD^vPX"[index % 7],
        markersize=4,
        linewidth=1.2,
        capsize=2,
        color=f"C{index % 10}",
    )


def _lines(figure: "Figure", comparison: Cells, shown: Sequence[str], stages: Sequence[str]) -> None:
    """Draws a line for each criterion, in one panel for each stage. The criterion with the best metric is at the top.

    Args:
        figure: The matplotlib figure.
        comparison: The rows to draw.
        shown: The names of the selections to draw.
        stages: The keys of the metrics to draw, see `STAGES`.
    """
    # "its own" is the selection of pruners of other libraries. If there is only one other selection, its name is left
    # out.
    own = [selection for selection in shown if selection != "its own"]
    sides = {
        criterion if len(own) < 2 or selection == "its own" else f"{criterion}, {selection}": rows
        for (criterion, selection), rows in comparison.lines().items()
        if selection in shown and any(stages[0] in row for row in rows)
    }
    found = {
        stage: {name: spread(r[stage] for r in rows if stage in r) for name, rows in sides.items()} for stage in stages
    }
    # The last line is drawn at the top, so the best metric comes last.
    order = sorted(sides, key=lambda name: found[stages[-1]][name][0], reverse=not comparison.higher_is_better)
    # The width of the longest name in inches.
    names = 0.065 * max(map(len, order))
    figure.set_size_inches(0.6 + names + 3.4 * len(stages), 1.2 + 0.26 * len(order))
    axes = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    for axis, stage in zip(axes, stages, strict=True):
        means, spreads = zip(*(found[stage][name] for name in order), strict=True)
        axis.axvline(_dense(comparison), color="0.4", linestyle="--", linewidth=1, label="dense")
        bars = [comparison.factor * (each or 0) for each in spreads]
        axis.errorbar(
            [comparison.factor * mean for mean in means], range(len(order)), xerr=bars, fmt="o", markersize=4, capsize=2
        )
        axis.set_yticks(range(len(order)), order, fontsize=8)
        axis.set_title(f"{comparison.budgets[0]}, {STAGES[stage]}", fontsize=9)
        axis.set_xlabel(comparison.metric_name)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)


def _dense(comparison: Cells) -> float:
    """Returns the mean metric of the dense model over all seeds, in % if the metric is shown in %."""
    return comparison.factor * spread(row["metric"] for row in comparison.lines()["dense", ""])[0]
