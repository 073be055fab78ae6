"""Writes the HTML page of a frontier. Its script draws the picture, and explains the budget that the reader chooses."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xprune.artefact.files import check_file, is_stamped, stamped
from xprune.core.unit_kind import unit_kind
from xprune.errors import ModelError
from xprune.report import NEEDED
from xprune.report.measure import Measure
from xprune.report.text import amount, measured
from xprune.tradeoff.drawing import label_of
from xprune.tradeoff.points import FrontierRecord, Point, name_of, number


def write(frontier: FrontierRecord, path: str | Path) -> Path:
    """Writes the page to a file. See `Frontier.report`."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ModelError(f"A report needs {', '.join(missing)}: pip install 'xprune[report]'.")
    path = Path(path)
    check_file(path, is_stamped)
    # The page is rendered before the file is opened, so after an error the old page is unchanged.
    page = render(frontier)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stamped(page), encoding="utf-8")
    return path


def render(frontier: FrontierRecord) -> str:
    """Returns the HTML of the page. The HTML contains all data and scripts, including plotly.js."""
    # Both packages belong to the extra `report`, and `xprune.report.charts` needs them too.
    import jinja2
    from plotly.offline import get_plotlyjs

    from xprune.report import charts

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xprune", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = Measure.of(frontier.dense)
    context: dict[str, Any] = {
        "frontier": frontier,
        "metric": shown,
        "title": title(frontier),
        "resource": label_of(frontier.resource),
        "criterion": frontier.settings.get("criterion", {}).get("name", "a criterion"),
        "costs": [(name, label_of(name)) for name in frontier.measures],
        "headings": _headings(frontier),
        "rows": _rows(frontier),
        "data": _data(frontier),
        "layout": charts.figure_layout(),
        "colours": {"kept": charts.KEPT, "removed": charts.REMOVED, "ink": charts.INK},
        "resources": measured({"dense": frontier.dense}),
        "settings": _settings(frontier),
        # The browser would end the script element at the first "</script" inside of plotly.js.
        "plotly": get_plotlyjs().replace("</script", "<\\/script"),
    }
    return environment.get_template("tradeoff/page.html.jinja").render(context)


def title(frontier: FrontierRecord) -> str:
    """Returns the finding in one line, such as "30 % of the MACs keep the accuracy within 1 point of dense"."""
    shown, resource = Measure.of(frontier.dense), label_of(frontier.resource)
    if shown.factor == 100:
        found = frontier.least(within=0.01)
        if found is not None:
            return f"{name_of(found)} of the {resource} keep the {shown.name} within 1 point of the dense model"
        return f"No budget keeps the {shown.name} within 1 point of the dense model"
    return f"{shown.title} against {resource}"


def _headings(frontier: FrontierRecord) -> list[str]:
    """Returns the headings of the table, without that of the first column."""
    costs = [kind.label for kind in measured({"dense": frontier.dense})]
    timed = ["latency"] * (frontier.dense.latency_ms is not None)
    shown = Measure.of(frontier.dense)
    return [*costs, *timed, shown.name + shown.unit, "change", *["chance"] * bool(frontier.chance)]


def _rows(frontier: FrontierRecord) -> list[tuple[str, list[str]]]:
    """Returns the rows of the table: the name of a model and its cells, in the order of the headings."""
    dense, shown = frontier.dense, Measure.of(frontier.dense)
    kinds, timed = measured({"dense": dense}), dense.latency_ms is not None
    chance = {point.asked: point for point in frontier.chance}

    def row(metrics: Any, change: str, by_chance: str, time: float | None) -> list[str]:
        """Returns the cells of a model."""
        costs = [amount(metrics.costs, dense.costs, kind) for kind in kinds]
        ms = "-" if metrics.latency_ms is None else f"{metrics.latency_ms:.1f} ms"
        timing = [ms if time is None else f"{ms} ({time:.1%})"] * timed
        return [*costs, *timing, number(metrics.metric, shown), change, *[by_chance] * bool(chance)]

    rows = [("dense", row(dense, "", "", None))]
    for point in frontier.points:
        other = chance.get(point.asked)
        change = number(point.metrics.metric - dense.metric, shown, signed=True)
        by_chance = number(other.metrics.metric, shown) if other else "-"
        rows.append((name_of(point), row(point.metrics, change, by_chance, point.time)))
    return rows


def _data(frontier: FrontierRecord) -> dict[str, Any]:
    """Returns the data that the script of the page reads."""
    shown, dense = Measure.of(frontier.dense), frontier.dense

    def of(point: Point) -> dict[str, Any]:
        """Returns the data of one point."""
        shares = {name: 100 * frontier.share(point, name) for name in frontier.measures}
        return {
            "name": name_of(point),
            "asked": point.asked,
            "metric": shown.factor * point.metrics.metric,
            "loss": point.metrics.loss,
            # JSON has no NaN.
            "shares": {name: share for name, share in shares.items() if share == share},
            "latency": point.metrics.latency_ms,
            "counts": list(point.counts),
        }

    given = frontier.settings.get("budget", {})
    more = {name: given[name] for name, usual in _USUAL.items() if given.get(name, usual) != usual}
    return {
        "resource": frontier.resource,
        "metric": {"name": shown.name, "unit": shown.unit, "percent": shown.factor == 100},
        "dense": {"metric": shown.factor * dense.metric, "loss": dense.loss, "latency": dense.latency_ms},
        "points": [of(point) for point in frontier.points],
        "chance": [of(point) for point in frontier.chance],
        "labels": {name: label_of(name) for name in frontier.measures},
        "sites": [{**site, "kinds": unit_kind(site["kind"]).plural} for site in frontier.sites],
        "criterion": frontier.settings.get("criterion", {}).get("name", "pruned"),
        "more": more,
    }


_USUAL = {"min_units": 1, "round_to": "auto", "of": "model", "target": None}
"""The settings of a budget that the code on the page leaves out, because they are the default."""


def _settings(frontier: FrontierRecord) -> list[tuple[str, str]]:
    """Returns the rows (name, value) of the section Provenance. Rows without a value are left out."""
    rows = []
    for name, value in frontier.settings.items():
        if name not in ("coverage", "refused", "least"):
            rows.append((name.replace("_", " "), _flat(value)))
    return [(name, value) for name, value in rows if value]


def _flat(value: Any) -> str:
    """Returns plain data as one line of text."""
    if isinstance(value, Mapping):
        parts = [f"{key} {_flat(each)}" for key, each in value.items() if each not in (None, [], ())]
        return ", ".join(part.removeprefix("name ") for part in parts)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
