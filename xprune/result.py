"""PruneResult: the pruned model, why it is what it is, and what it costs and gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from xprune.artefact import save
from xprune.evaluate import Metrics
from xprune.plan import Plan
from xprune.scores import Scores
from xprune.sites import Sites


@dataclass(frozen=True)
class PruneResult:
    """What `Pruner.run` returns.

    model     an ordinary module, physically smaller, in eval mode
    plan      the units that stayed, relative to the model that was given
    scores    of every unit of that model
    metrics   "dense", "pruned" (after surgery) and, where it was asked for, "finetuned"
    """

    model: nn.Module
    plan: Plan
    scores: Scores
    metrics: Mapping[str, Metrics]

    def summary(self) -> str:
        """A table of the metrics and one of the sites, as text."""
        return render(metrics_table(self.metrics), sites_table(self.plan))

    def save(self, directory: str | Path, arch: str | tuple[str, Mapping[str, Any]] | None = None) -> Path:
        """Writes the artefact that `xprune.load` reads, with metrics and scores beside the model; see `xprune.save`."""
        extra = {
            "criterion": self.scores.criterion,
            "info": dict(self.scores.info),
            "metrics": {name: metrics.to_json() for name, metrics in self.metrics.items()},
            "scores": {s.name: v.tolist() for s, v in zip(self.scores.sites, self.scores.values, strict=True)},
        }
        return save(self.model, directory, arch=arch, extra=extra)


def metrics_table(metrics: Mapping[str, Metrics]) -> Table:
    """One row per model: metric, loss, MACs, parameters, latency."""
    first = next(iter(metrics.values()))
    table = Table(title=f"measured on {first.samples} {first.data} samples", title_justify="left")
    for heading in (
        "model",
        first.metric_name,
        "loss",
        "MACs",
        "parameters",
        f"latency (batch {first.latency_rows})",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in metrics.items():
        costs = (
            _amount(row.macs, first.macs),
            _amount(row.params, first.params),
            f"{row.latency_ms or 0:.1f} ms",
        )
        table.add_row(name, f"{row.metric:.4f}", f"{row.loss:.4f}", *costs)
    return table


def sites_table(plan: Plan) -> Table:
    """One row per site: units kept of units there were, with a bar."""
    table = Table(title="what went where", title_justify="left")
    for heading in ("site", "units", "kept", "of", ""):
        table.add_column(heading, justify="right" if heading in ("kept", "of") else "left")
    for site, count in zip(plan.sites, plan.counts, strict=True):
        filled = round(20 * count / site.size)
        table.add_row(site.name, f"{site.kind}s", str(count), str(site.size), "█" * filled + "░" * (20 - filled))
    return table


def found_table(sites: Sites) -> Table:
    """One row per site that was found, then one per module that was left alone, with the reason."""
    table = Table(title="what can go", title_justify="left")
    for heading in ("module", "units", "of features", "feed, or why", "known by"):
        table.add_column(heading, justify="right" if heading == "of features" else "left")
    for site in sites:
        known = site.adapter or ("proof" if site.kind == "head" else "the graph, or proof")
        table.add_row(site.name, f"{site.size} {site.kind}s", str(site.width), site.layer, known)
    for index, (path, why) in enumerate(sites.left.items()):
        if not index:
            table.add_section()
        table.add_row(path, "left alone", "", why, "")
    return table


def render(*tables: Table) -> str:
    """Tables as plain text."""
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def _amount(value: int | None, dense: int | None) -> str:
    if value is None or not dense:
        return "-"
    number = next(
        f"{value / scale:.3g} {unit}"
        for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
        if value >= scale or scale == 1
    )
    return f"{number} ({value / dense:.1%})"
