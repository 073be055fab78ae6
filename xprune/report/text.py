"""The tables of a result as text: metrics, what went where, what was left alone."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from xprune.core.plan import Plan
from xprune.core.record import Metrics
from xprune.core.registry import registered
from xprune.core.resource import Resource
from xprune.core.scores import Scores
from xprune.core.site import Sites
from xprune.core.unit_kind import unit_kind


def metrics_table(metrics: Mapping[str, Metrics], dense: Mapping[str, float] | None = None) -> Table:
    """One row per model: metric, loss, each resource that was measured, latency.

    Args:
        metrics: By the model's name.
        dense: What the dense model costs, by the names of resources, which shares are of. A resource that is not there
            is shown without a share. None: what the first row costs.
    """
    first, resources = next(iter(metrics.values())), measured(metrics)
    whole = first.costs if dense is None else dense
    table = Table(title=f"measured on {first.samples} {first.data} samples", title_justify="left")
    for heading in (
        "model",
        first.metric_name,
        "loss",
        *(resource.label for resource in resources),
        "latency" if first.latency_rows is None else f"latency (batch {first.latency_rows})",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in metrics.items():
        costs = [amount(row.costs, whole, resource) for resource in resources]
        timed = "-" if row.latency_ms is None else f"{row.latency_ms:.1f} ms"
        table.add_row(name, f"{row.metric:.4f}", f"{row.loss:.4f}", *costs, timed)
    return table


def measured(metrics: Mapping[str, Metrics]) -> list[Resource]:
    """The resources that some model was measured in, in the order of their table."""
    names = {name for row in metrics.values() for name in row.costs}
    return [resource for name, resource in registered("resources").items() if name in names]


def sites_table(plan: Plan) -> Table:
    """One row per site: units kept of units there were, with a bar."""
    table = Table(title="what went where", title_justify="left")
    for heading in ("site", "units", "kept", "of", ""):
        table.add_column(heading, justify="right" if heading in ("kept", "of") else "left")
    for site, count in zip(plan.sites, plan.counts, strict=True):
        filled = round(20 * count / site.size)
        table.add_row(
            site.name, unit_kind(site.kind).plural, str(count), str(site.size), "█" * filled + "░" * (20 - filled)
        )
    return table


def found_tables(sites: Sites) -> tuple[Table, ...]:
    """One row per site that was found; and, where modules were left alone, one row for each reason."""
    table = Table(title="what can go", title_justify="left")
    for heading in ("module", "units", "of features", "known by"):
        table.add_column(heading, justify="right" if heading == "of features" else "left", overflow="fold")
    for site in sites:
        kind = unit_kind(site.kind)
        table.add_row(site.name, kind.many(site.size), str(site.width), site.adapter or kind.found_by)
    reasons: dict[str, list[str]] = {}
    for path, why in sites.left.items():
        reasons.setdefault(why, []).append(path)
    if not reasons:
        return (table,)
    left = Table("modules", "why", title="what is left alone", title_justify="left", show_lines=True)
    left.columns[0].overflow = "fold"
    for why, paths in reasons.items():
        left.add_row("\n".join(paths), why)
    return table, left


def unseen(scores: Scores) -> str:
    """How many classes have no scores of their own, and what to do; empty where all have."""
    classes = scores.unseen
    if not classes or scores.classwise is None:
        return ""
    names = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
    return (
        f"{len(classes):,} of {scores.classwise[0].shape[0]:,} classes have no class-wise scores ({names}): no sample "
        "told of them. More steps or more data reach them.\n"
    )


def render(*tables: Table) -> str:
    """Tables as plain text."""
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def amount(costs: Mapping[str, float], dense: Mapping[str, float], resource: Resource) -> str:
    """What a model costs of a resource, and its share of what the dense model costs, where that is known; else "-"."""
    value, whole = costs.get(resource.name), dense.get(resource.name)
    if value is None:
        return "-"
    scale, prefix = next((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if value >= s or s == 1)
    number = f"{value / scale:.3g} {prefix}{resource.unit}".rstrip()
    return f"{number} ({value / whole:.1%})" if whole else number
