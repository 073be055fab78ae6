"""Draws pictures for papers with matplotlib: `plot(result, kind)` draws one picture on axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xprune.core.record import Record
from xprune.core.unit_kind import kinds_of, unit_kind
from xprune.errors import ModelError
from xprune.report.classmap import maps
from xprune.report.collect import by_class, history, names_of, short
from xprune.report.measure import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT, REMOVED = "#0b5394", "#b8520a"
"""Blue for kept and orange for removed units, as in the report."""
LINES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dotted"}
"""Line style of matplotlib -> its name in the label of an axis."""
ROWS = 40
"""The largest number of classes in a picture. If there are more, it shows those that lost most accuracy."""


def plot(result: Record, kind: str, ax: "Axes | None" = None, classes: Sequence[str] | None = None) -> "Axes":
    """Draws one kind of picture of a result. `ax.figure.savefig(...)` writes the picture to a file.

    Args:
        result: The result of a run.
        kind: "units" shows the percentage of units that each site keeps. "classes" shows how much each class uses each
            head, with removed heads in orange. "training" shows the percentage of units that each site keeps at each
            step while thresholds are learned. "accuracy" shows the accuracy of each class before and after pruning.
        ax: The axes to draw on. None: new axes on a new figure.
        classes: Names of the classes, in the order of the class indices. None: the names that the task of the run
            has. If it has none, they are "class 0", "class 1" and so on.

    Returns:
        The axes with the picture.

    Raises:
        ModelError: The kind is unknown, the result has no such data, or matplotlib is not installed.

    Example:
        Usually, the result comes from `Pruner.run`. Here it is made by hand, so that the example is fast.

        >>> import torch, xprune
        >>> site = xprune.Site("mlp", "neuron", size=4, width=1, consumers=("mlp.fc2",))
        >>> plan = xprune.Plan((site,), ((0, 2),))
        >>> scores = xprune.Scores((site,), (torch.rand(4),), "random")
        >>> metrics = {"dense": xprune.Metrics(0.9, 0.3, 100), "pruned": xprune.Metrics(0.8, 0.5, 100)}
        >>> result = xprune.PruneResult(torch.nn.Identity(), plan, scores, metrics)
        >>> plot(result, "units").get_xlabel()
        'units kept, %'
    """
    if kind not in KINDS:
        raise ModelError(f"kind={kind!r} is unknown. Give one of {', '.join(KINDS)}.")
    names = names_of(result, classes)
    if ax is None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ModelError("A plot needs matplotlib: pip install 'xprune[report]'.") from error
        # The Figure is not made with pyplot, because pyplot keeps every figure in memory and may open a window.
        ax = Figure(figsize=(6.4, 4.0), layout="constrained").add_subplot()
    KINDS[kind](result, ax, names)
    return ax


def _units(result: Record, ax: Any, names: Sequence[str]) -> None:
    """Draws a bar for each site, which shows the percentage of its units that was kept."""
    sites = [site.name for site in result.plan.sites]
    shares = [100 * n / site.size for n, site in zip(result.plan.counts, result.plan.sites, strict=True)]
    places = range(len(sites))
    ax.barh(
        places, [100] * len(sites), color="white", edgecolor=REMOVED, linestyle="--", linewidth=0.8, label="removed"
    )
    ax.barh(places, shares, color=KEPT, label="kept")
    for place, count, site in zip(places, result.plan.counts, result.plan.sites, strict=True):
        ax.text(101, place, f"{count}/{site.size}", va="center", fontsize=7)
    ax.set(yticks=places, xlabel="units kept, %", xlim=(0, 118))
    ax.set_yticklabels(sites, fontsize=7)
    ax.invert_yaxis()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _classes(result: Record, ax: Any, names: Sequence[str]) -> None:
    """Draws the class map of the first unit kind whose units are drawn one by one, such as heads."""
    found = next((each for each in maps(result) if unit_kind(each.kind).singly), None)
    if found is None:
        raise ModelError(
            f"kind='classes' needs class-wise scores of heads, or of another kind whose units are drawn one by one. "
            f"This result of {result.scores.criterion} has none."
        )
    values, kept = found.values.numpy(), np.asarray(found.kept)
    # One layer for kept and one for removed units. Each is NaN where the other one has values.
    for shown, colours in ((kept, "Blues"), (~kept, "Oranges")):
        ax.imshow(np.where(shown, values, np.nan), cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="none")
    for _, start, _ in found.sites[1:]:
        ax.axvline(start - 0.5, color="black", linewidth=0.6)
    ax.set_xticks([(start + stop - 1) / 2 for _, start, stop in found.sites], short([s for s, _, _ in found.sites]))
    if len(found.classes) <= ROWS:
        ax.set_yticks(range(len(found.classes)), [names[index] for index in found.classes], fontsize=7)
    ax.set(xlabel=f"{unit_kind(found.kind).plural} by site (blue kept, orange removed)", ylabel="class")


def _training(result: Record, ax: Any, names: Sequence[str]) -> None:
    """Draws a line for each site, which shows the percentage of its units that is kept at each step."""
    records = history(result)
    if not records:
        raise ModelError(
            "kind='training' needs the history of learned thresholds, and this result has none. Prune with "
            "selection='learned'."
        )
    from matplotlib import colormaps

    # The lines of sites near the output of the model are darker. The lightest yellow of the scale is not used, because
    # it cannot be seen on white.
    shades = colormaps["cividis"](np.linspace(0.9, 0.05, len(result.plan.sites)))
    for index, site in enumerate(result.plan.sites):
        rates = [100 * record["rates"][index] for record in records]
        style = unit_kind(site.kind).line
        ax.plot([r["step"] + 1 for r in records], rates, style, color=shades[index], linewidth=1.2, label=site.name)
    kinds = ", ".join(f"{LINES.get(kind.line, kind.line)}: {kind.plural}" for kind in kinds_of(result.plan.sites))
    ax.set(xlabel=f"step ({kinds})", ylabel="units kept, %", ylim=(0, None))
    ax.legend(fontsize=6, ncols=2, frameon=False)


def _accuracy(result: Record, ax: Any, names: Sequence[str]) -> None:
    """Draws the accuracy of each class before and after pruning. The class that lost most accuracy is on top.

    If the run has another metric for each class, the picture shows this metric.
    """
    rows, shown = by_class(result.metrics)[:ROWS], Measure.of(next(iter(result.metrics.values())))
    if not rows:
        raise ModelError("kind='accuracy' needs the accuracy of each class, and this run did not measure it.")
    places = range(len(rows))
    before, after = [shown.factor * row.before for row in rows], [shown.factor * row.after for row in rows]
    ax.hlines(places, before, after, color="0.8", linewidth=2, zorder=0)
    ax.scatter(before, places, s=55, facecolors="none", edgecolors="black", label="dense")
    ax.scatter(after, places, s=22, color=KEPT, label="pruned")
    ax.set_yticks(places, [names[row.index] for row in rows], fontsize=7)
    ax.set(xlabel=shown.name + shown.unit)
    ax.invert_yaxis()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


KINDS: Mapping[str, Callable[[Record, Any, Sequence[str]], None]] = {
    "units": _units,
    "classes": _classes,
    "training": _training,
    "accuracy": _accuracy,
}
"""Kind of a picture -> the function that draws it."""
