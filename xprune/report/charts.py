"""The charts of a report. Each function makes a plotly figure from the facts, as plain data that plotly.js draws."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from xprune.core.unit_kind import kinds_of
from xprune.report.classmap import ClassMap
from xprune.report.collect import Facts, short

KEPT, REMOVED, INK = "#0b5394", "#b8520a", "#1c2733"
"""Colours of kept units, removed units and text. Blue and orange differ for colour-blind readers and in grey."""
BLUES = [[0, "#f2f6fa"], [0.5, "#7fb0d8"], [1, "#08306b"]]
ORANGES = [[0, "#fdf4ec"], [0.5, "#f0a765"], [1, "#8c3a00"]]
ROWS = 40
"""The largest number of classes in a chart. If there are more, the chart shows those that lost most accuracy."""
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK}


def class_map(facts: Facts, found: ClassMap) -> dict[str, Any]:
    """Makes a heat map with a row for each class, and a column for each unit or bin. Kept units are blue."""
    values, kept = found.values.numpy(), np.asarray(found.kept)
    names = [_text(facts.classes[index]) for index in found.classes]
    figure = go.Figure()
    # There are two layers, one for kept and one for removed units. Each is NaN where the other one has values. The
    # script of the page prints the name of the layer below the chart.
    for title, shown, scale in (("kept", kept, BLUES), ("removed", ~kept, ORANGES)):
        figure.add_heatmap(
            z=np.where(shown, values, np.nan).astype(np.float32),
            x0=0,
            y0=0,
            zmin=0,
            zmax=100,
            colorscale=scale,
            showscale=False,
            hoverongaps=False,
            name=title,
            hovertemplate="%{z:.0f} of 100<extra>" + title + "</extra>",
        )
    spans, labels = found.sites, short([name for name, _, _ in found.sites])
    edges = [start - 0.5 for _, start, _ in spans[1:]]
    figure.update_layout(
        shapes=[_line(x) for x in edges],
        height=max(260, min(620, 110 + 22 * len(names))),
        dragmode="zoom",
        margin={"t": 8},
        xaxis={
            "tickvals": [(start + stop - 1) / 2 for _, start, stop in spans],
            "ticktext": labels,
            "title": {"text": _text(_pattern([name for name, _, _ in spans]))},
            "showgrid": False,
        },
        yaxis={"autorange": "reversed", "automargin": True, "showgrid": False, **_class_ticks(names)},
    )
    return _plain(figure)


def accuracy(facts: Facts) -> dict[str, Any]:
    """Makes a chart with a row for each class: its accuracy before pruning, and after.

    A line connects the two accuracies. The class that lost most accuracy is on top. If the run has another metric for
    each class, the chart shows this metric.
    """
    rows, shown = facts.accuracy[:ROWS], facts.metric
    names = [f"{_text(facts.classes[row.index])}" for row in rows]
    figure = go.Figure()
    for row, name in zip(rows, names, strict=True):
        figure.add_scatter(
            x=[shown.factor * row.before, shown.factor * row.after],
            y=[name, name],
            mode="lines",
            line={"color": "#c5ccd3", "width": 3},
            hoverinfo="skip",
            showlegend=False,
        )
    last = "pruned, fine-tuned" if "finetuned" in facts.metrics else "pruned"
    for title, values, colour, symbol, size in (
        ("dense", [row.before for row in rows], INK, "circle-open", 14),
        (last, [row.after for row in rows], KEPT, "circle", 8),
    ):
        figure.add_scatter(
            x=[shown.factor * value for value in values],
            y=names,
            mode="markers",
            name=title,
            marker={"color": colour, "size": size, "symbol": symbol, "line": {"width": 1.5}},
            customdata=[row.samples for row in rows],
            hovertemplate="%{y}: "
            + ("%{x:.1f} % of" if shown.factor == 100 else "%{x:.4g} on")
            + " %{customdata} samples<extra>"
            + title
            + "</extra>",
        )
    figure.update_layout(
        height=110 + 24 * len(rows),
        xaxis={"title": {"text": _text(shown.name) + shown.unit}, "fixedrange": True, "automargin": True},
        yaxis={
            # plotly draws the first row at the bottom. This range puts it on top.
            "range": [len(rows) - 0.4, -0.6],
            "automargin": True,
            "fixedrange": True,
            "type": "category",
            "dtick": 1,
        },
        dragmode=False,
    )
    return _plain(figure)


def losses(facts: Facts) -> dict[str, Any]:
    """Makes a chart with a point for each class, which shows how much its accuracy changed, in order of the change."""
    rows, shown = facts.accuracy, facts.metric
    points = " points" if shown.factor == 100 else ""
    figure = go.Figure(
        go.Scatter(
            x=list(range(1, len(rows) + 1)),
            y=[shown.factor * (row.after - row.before) for row in rows],
            mode="markers",
            marker={"color": KEPT, "size": 5},
            text=[_text(facts.classes[row.index]) for row in rows],
            hovertemplate="%{text}: %{y:+.3g}" + points + "<extra></extra>",
        )
    )
    figure.update_layout(
        height=300,
        xaxis={"title": {"text": "classes in order of their change"}, "fixedrange": True},
        yaxis={"title": {"text": "change" + points.replace(" ", ", ")}, "fixedrange": True},
        dragmode=False,
    )
    return _plain(figure)


def training(facts: Facts) -> dict[str, Any]:
    """Makes charts of two quantities over the steps of training: how many units each site keeps, and its threshold.

    The first quantity is the percentage of units that the site keeps. There is one chart for each pair of a unit kind
    and a quantity. Each site has a line. The lines of sites near the output of the model are darker.
    """
    kinds = kinds_of(facts.sites)
    titles = [f"{quantity}, {kind.plural}" for quantity in ("share kept", "threshold") for kind in kinds]
    figure = make_subplots(rows=2 * len(kinds), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.07)
    steps = [record["step"] + 1 for record in facts.history]
    for line, (field, kind) in enumerate(((f, k) for f in ("rates", "thresholds") for k in kinds), start=1):
        chosen = [index for index, site in enumerate(facts.sites) if site.kind == kind.name]
        shades = _depths(len(chosen))
        for index, shade in zip(chosen, shades, strict=True):
            factor = 100 if field == "rates" else 1
            name = _text(facts.sites[index].name)
            figure.add_scatter(
                x=steps,
                y=[factor * record[field][index] for record in facts.history],
                mode="lines",
                name=name,
                line={"color": shade, "width": 1.8},
                showlegend=False,
                hovertemplate=name + "<br>step %{x}: %{y:.3g}<extra></extra>",
                row=line,
                col=1,
            )
            # A diamond after the end of each line shows the percentage that the plan keeps. The line ends near the
            # diamond and not on it, because a last shift of all thresholds makes the plan.
            if field == "rates":
                figure.add_scatter(
                    x=[steps[-1] * 1.03],
                    y=[100 * len(facts.sites[index].kept) / facts.sites[index].size],
                    mode="markers",
                    name=name,
                    marker={"color": shade, "size": 8, "symbol": "diamond"},
                    showlegend=False,
                    hovertemplate=name + "<br>the plan keeps %{y:.3g} %<extra></extra>",
                    row=line,
                    col=1,
                )
        title = "% of units" if field == "rates" else "rank"
        figure.update_yaxes(title_text=title, rangemode="tozero", fixedrange=True, row=line, col=1)
    figure.update_xaxes(fixedrange=True)
    figure.update_xaxes(title_text="step", row=2 * len(kinds), col=1)
    figure.update_annotations(font={"size": 13}, x=0, xanchor="left")
    figure.update_layout(height=90 + 190 * 2 * len(kinds), dragmode=False, hovermode="closest")
    return _plain(figure)


def faithfulness(facts: Facts) -> dict[str, Any]:
    """Makes a chart of the accuracy over the percentage of deleted units, with two lines for each name.

    One line is the accuracy on samples of the class whose units are deleted. The other line is the accuracy on samples
    of all other classes. Both are means over the classes.
    """
    figure, shown = go.Figure(), facts.metric
    number = "%{y:.1f} %" if shown.factor == 100 else "%{y:.4g}"
    colours = [KEPT, REMOVED, "#1b7f5c", "#7b4fa3", "#a08500", "#555f6b", "#c0398b", "#2b9fc4"]
    for index, (name, curve) in enumerate(facts.faithfulness.items()):
        for which, dash in (("own", "solid"), ("others", "dot")):
            figure.add_scatter(
                x=[100 * f for f in curve["fractions"]],
                y=[shown.factor * a for a in curve[which]],
                mode="lines+markers",
                name=f"{_text(name)}: {which}",
                line={"color": colours[index % len(colours)], "dash": dash, "width": 2},
                marker={"size": 5},
                hovertemplate="%{x:.0f} % of units: " + number + f"<extra>{_text(name)}, {which}</extra>",
            )
    figure.update_layout(
        height=380 + 11 * 2 * len(facts.faithfulness),
        xaxis={"title": {"text": "units deleted or inserted, %"}, "fixedrange": True},
        yaxis={"title": {"text": _text(shown.name) + shown.unit}, "rangemode": "tozero", "fixedrange": True},
        dragmode=False,
    )
    return _plain(figure)


def figure_layout() -> dict[str, Any]:
    """Returns the plotly layout of all charts, including the charts that the script of the page makes."""
    axis = {"gridcolor": "#e6eaee", "zerolinecolor": "#c5ccd3", "linecolor": "#c5ccd3", "ticks": ""}
    return {
        "font": FONT,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 50, "r": 12, "t": 34, "b": 46},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"font": {"family": FONT["family"]}, "align": "left"},
        "xaxis": axis,
        "yaxis": axis,
    }


def _plain(figure: go.Figure) -> dict[str, Any]:
    """Returns a figure as plain data. Replaces plotly's default template, which is long, by our layout."""
    figure.update_layout(template=go.layout.Template(layout=figure_layout()))
    found: dict[str, Any] = json.loads(figure.to_json())
    return found


def _text(name: str) -> str:
    """Escapes a name for a label. plotly would read tags in the name as HTML."""
    return escape(name, quote=False)


def _pattern(names: Sequence[str]) -> str:
    """Returns one pattern for several names: "blocks.N.attn" for "blocks.0.attn", "blocks.1.attn" and so on."""
    first, label = names[0], short(names)[0]
    return first if label == first else first.replace(label, "N", 1)


def _class_ticks(names: Sequence[str]) -> dict[str, Any]:
    """Returns the ticks of an axis of classes: all names, or about ten names if there are more than ROWS classes."""
    if len(names) <= ROWS:
        return {"tickvals": list(range(len(names))), "ticktext": list(names)}
    shown = list(range(0, len(names), max(1, len(names) // 10)))
    return {"tickvals": shown, "ticktext": [names[i] for i in shown]}


def _line(x: float) -> dict[str, Any]:
    """Returns a vertical line at `x` over the whole height of a chart. It separates two sites."""
    return {"type": "line", "xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1} | {
        "line": {"color": INK, "width": 0.8}
    }


def _depths(count: int) -> list[str]:
    """Returns `count` colours for the sites of a model, from light for the first site to dark for the last."""
    positions = [0.9 - 0.85 * i / max(count - 1, 1) for i in range(count)]
    shades: list[str] = sample_colorscale("Cividis", positions)
    return shades
