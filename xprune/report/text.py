"""The tables of a result as text: metrics, what went where, what was left alone."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from xprune.core.plan import Plan
from xprune.core.record import Metrics
from xprune.core.scores import Scores
from xprune.core.site import Sites


def metrics_table(metrics: Mapping[str, Metrics], dense: tuple[int | None, int | None] | None = None) -> Table:
    """One row per model: metric, loss, MACs, parameters, latency.

    Args:
        metrics: By the model's name.
        dense: MACs and parameters of the dense model, which shares are of; (None, None): shown without a share. Not
            given: those of the first row.
    """
    first = next(iter(metrics.values()))
    macs, params = (first.macs, first.params) if dense is None else dense
    table = Table(title=f"measured on {first.samples} {first.data} samples", title_justify="left")
    for heading in (
        "model",
        first.metric_name,
        "loss",
        "MACs",
        "parameters",
        "latency" if first.latency_rows is None else f"latency (batch {first.latency_rows})",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in metrics.items():
        costs = (
            amount(row.macs, macs),
            amount(row.params, params),
            "-" if row.latency_ms is None else f"{row.latency_ms:.1f} ms",
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


def found_tables(sites: Sites) -> tuple[Table, ...]:
    """One row per site that was found; and, where modules were left alone, one row for each reason."""
    table = Table(title="what can go", title_justify="left")
    for heading in ("module", "units", "of features", "known by"):
        table.add_column(heading, justify="right" if heading == "of features" else "left", overflow="fold")
    for site in sites:
        known = site.adapter or ("proof" if site.kind == "head" else "the graph, or proof")
        table.add_row(site.name, f"{site.size} {site.kind}s", str(site.width), known)
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


def amount(value: int | None, dense: int | None) -> str:
    """A count with its unit and its share of the dense model's, where that is known; "-" where the count is not."""
    if value is None:
        return "-"
    number = next(
        f"{value / scale:.3g} {unit}"
        for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
        if value >= scale or scale == 1
    )
    return f"{number} ({value / dense:.1%})" if dense else number
