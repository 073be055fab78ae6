"""Makes the HTML of the report from the facts, with a template."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.image import imsave
from plotly.offline import get_plotlyjs
from torch import Tensor

from xprune.core.record import Metrics
from xprune.core.unit_kind import kinds_of, unit_kind
from xprune.report import charts, findings
from xprune.report.classmap import CLASSES
from xprune.report.collect import Facts, SiteFacts
from xprune.report.gained import gain_note, gain_text, latency_text, milliseconds
from xprune.report.pictures import Pictures
from xprune.report.text import amount, measured

STAGES = {"dense": "dense", "pruned": "pruned", "finetuned": "pruned and fine-tuned"}
"""Name of a stage in `Facts.metrics` -> its name on the page."""
SIDE = 192
"""The smallest length in pixels of the longer side of a picture. Smaller pictures are enlarged."""


def render(facts: Facts) -> str:
    """Returns the HTML of the page. The HTML contains all pictures, data and scripts, including plotly.js."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xprune.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,  # a missing variable raises an error instead of printing an empty text
    )
    figures = _figures(facts)
    metrics = list(facts.metrics.values())
    context: dict[str, Any] = {
        "facts": facts,
        "findings": findings,
        "figures": figures,
        "layout": charts.figure_layout(),
        "colours": {"kept": charts.KEPT, "removed": charts.REMOVED},
        # The browser would end the script element at the first "</script" inside of plotly.js.
        "plotly": get_plotlyjs().replace("</script", "<\\/script"),
        "rows": [_row(name, row, facts) for name, row in facts.metrics.items()],
        "resources": measured(facts.metrics),
        "kinds": {kind.name: kind for kind in kinds_of(facts.sites)},
        "milliseconds": milliseconds,
        "gains": any(row.speedup is not None for row in metrics),
        "gain_note": gain_note(facts.metrics, facts.settings),
        "first": metrics[0],
        "last": metrics[-1],
        "stage": STAGES.get(list(facts.metrics)[-1], list(facts.metrics)[-1]),
        "blocks": _blocks(facts),
        "by_site": _by_site(facts),
        "chosen": _chosen(facts),
        "units": _units(facts),
        "rows_shown": charts.ROWS,
        "classes_shown": CLASSES,
        "examples": _examples(facts) if isinstance(facts.pictures, Pictures) else [],
        "settings": _settings(facts),
    }
    return environment.get_template("template.html.jinja").render(context)


def _figures(facts: Facts) -> dict[str, Any]:
    """Returns the id of an HTML element -> the chart to draw in it. Charts without data are left out."""
    found = {f"map-{each.kind}": charts.class_map(facts, each) for each in facts.maps}
    if facts.accuracy:
        found["accuracy"] = charts.accuracy(facts)
    if len(facts.accuracy) > charts.ROWS:
        found["losses"] = charts.losses(facts)
    if facts.history:
        found["training"] = charts.training(facts)
    if facts.faithfulness:
        found["faithfulness"] = charts.faithfulness(facts)
    return found


def _row(name: str, metrics: Metrics, facts: Facts) -> dict[str, Any]:
    """Returns the cells of one row in the table of metrics, as text."""
    dense = next(iter(facts.metrics.values()))
    metric = findings.percent(metrics.metric) if metrics.metric_name == "accuracy" else f"{metrics.metric:.4g}"
    return {
        "name": STAGES.get(name, name),
        "metric": metric,
        "loss": f"{metrics.loss:.3f}",
        "costs": [
            (resource.label, amount(metrics.costs, dense.costs, resource).replace("%", "\N{NO-BREAK SPACE}%"))
            for resource in measured(facts.metrics)
        ],
        "latency": latency_text(metrics),
        "gain": gain_text(metrics, dense),
    }


def _blocks(facts: Facts) -> list[tuple[str, list[tuple[int, SiteFacts]]]]:
    """Returns a pair for each block of the model: its path, and its sites as pairs (index, site)."""
    found: dict[str, list[tuple[int, SiteFacts]]] = {}
    for index, site in enumerate(facts.sites):
        found.setdefault(site.block or site.name, []).append((index, site))
    return list(found.items())


def _by_site(facts: Facts) -> dict[int, list[tuple[int, Any]]]:
    """Returns index of a site -> its units as pairs (index, unit). Only for units that are drawn one by one."""
    found: dict[int, list[tuple[int, Any]]] = {}
    for index, unit in enumerate(facts.units):
        found.setdefault(unit.site, []).append((index, unit))
    return found


def _chosen(facts: Facts) -> int:
    """Returns the index of the unit that the page shows first: the removed unit with the highest score."""
    removed = [i for i, unit in enumerate(facts.units) if not unit.kept]
    return min(removed or range(len(facts.units)), key=lambda i: facts.units[i].rank_all, default=0)


def _units(facts: Facts) -> dict[str, Any]:
    """Returns the data from which the script `page.js` explains a unit. The script reads these keys."""
    sites = {
        index: {
            "name": site.name,
            "kind": site.kind,
            "kinds": unit_kind(site.kind).plural,
            "size": site.size,
            "kept": len(site.kept),
            "cut": site.cut,
            "learned": site.learned,
        }
        for index, site in enumerate(facts.sites)
        if unit_kind(site.kind).singly
    }
    units = [vars(unit) | {"classes": [[facts.classes[c], p] for c, p in unit.classes]} for unit in facts.units]
    maps = {
        f"map-{each.kind}": {"columns": each.labels, "rows": [facts.classes[c] for c in each.classes]}
        for each in facts.maps
    }
    return {"sites": sites, "units": units, "maps": maps, "comparable": facts.scale != "site"}


def _settings(facts: Facts) -> list[tuple[str, str]]:
    """Returns the rows (name, value) of the section Provenance. Rows without a value are left out."""
    first, settings = next(iter(facts.metrics.values())), dict(facts.settings)
    rows = [("criterion", facts.criterion), ("criterion, settings", _flat(facts.info))]
    for name in ("selection", "budget", "finetune"):
        if settings.get(name):
            rows.append((name, _flat(settings.pop(name))))
    rows.append(("classes without scores", f"{len(facts.unseen):,}" if facts.unseen else ""))
    trained = settings.pop("training_samples", None)
    training = f", {trained} training samples" if trained else ""
    rows.append(("data", f"{first.samples} {first.data} samples{training}"))
    rows += [(name.replace("_", " "), _flat(value)) for name, value in settings.items()]
    return [(name, value) for name, value in rows if value]


def _flat(value: Any) -> str:
    """Returns plain data as one line of text. A list (a, b) becomes "a to b"."""
    if isinstance(value, Mapping):
        parts = [f"{key} {_flat(each)}" for key, each in value.items() if each not in (None, [], ())]
        return ", ".join(part.removeprefix("name ") for part in parts)
    if isinstance(value, float):
        return f"{value:.4g}"
    return " to ".join(map(_flat, value)) if isinstance(value, (list, tuple)) else str(value)


def _examples(facts: Facts) -> list[dict[str, Any]]:
    """Returns the example inputs with their pictures, in the form that the template reads."""
    assert isinstance(facts.pictures, Pictures)
    found = []
    for example in facts.pictures.examples:
        answers = {
            name: f"{facts.classes[index] if index < len(facts.classes) else index} ({findings.percent(chance, 0)})"
            for name, (index, chance) in (("dense", example.dense), ("pruned", example.pruned))
        }
        label = facts.classes[example.label] if example.label < len(facts.classes) else f"class {example.label}"
        pictures = [("input", _png(example.image))]
        pictures += [(title, _png(example.image, values)) for title, values in example.maps.items()]
        broken = example.pruned[0] != example.label
        found.append({"label": label, "broken": broken, "answers": answers, "pictures": pictures})
    return found


def _png(image: Tensor, values: Tensor | None = None) -> str:
    """Returns a picture as a "data:" address that holds a PNG: an image, or a map over a grey image.

    Args:
        image: The image, float (height, width) or (height, width, 3), from 0 to 1.
        values: A map with a number for each patch, float (rows, columns), from 0 to 1. None to draw only the image.
    """
    rgb = image[..., None].expand(*image.shape, 3) if image.dim() == 2 else image
    side = max(rgb.shape[:2])
    if side < SIDE:
        # Each pixel becomes a square of equal pixels, so that pixels and patches keep sharp edges.
        factor = -(-SIDE // side)  # rounded up
        rgb = rgb.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    pixels = rgb.numpy()
    if values is not None:
        height, width = pixels.shape[:2]
        # For each row and each column of pixels, the index of the patch.
        rows = torch.arange(height) * values.shape[0] // height
        columns = torch.arange(width) * values.shape[1] // width
        heat = colormaps["inferno"](values[rows][:, columns].numpy())[..., :3]
        pixels = 0.35 * pixels.mean(-1, keepdims=True) + 0.65 * heat
    buffer = io.BytesIO()
    imsave(buffer, np.clip(pixels, 0, 1), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
