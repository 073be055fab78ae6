"""Makes tables for the terminal: metrics, kept units of each site, sites that were found, modules left alone."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from xprune.core.coverage import percent
from xprune.core.plan import Plan
from xprune.core.record import Metrics, Record
from xprune.core.registry import registered
from xprune.core.resource import Resource
from xprune.core.scores import Scores
from xprune.core.site import Sites
from xprune.core.unit_kind import unit_kind
from xprune.report.gained import gain_text, latency_text


def metrics_table(metrics: Mapping[str, Metrics], dense: Mapping[str, float] | None = None) -> Table:
    """Makes a table with a row for each model: its metric, loss, costs, latency and gain.

    The column of the latency also says how many times as fast as the dense model a pruned model is. If no speed-up was
    measured, there is no column for the gain.

    Args:
        metrics: Mapping from the name of a model to its metrics. The gain is relative to the first one.
        dense: Mapping from the name of a resource to the cost of the dense model. The table shows each cost also as a
            percentage of this cost. If a resource is missing here, the table shows no percentage. None: the costs of
            the first model in `metrics`.

    Example:
        >>> dense, pruned = Metrics(0.9, 0.31, 100, macs=2_000_000), Metrics(0.8, 0.54, 100, macs=1_000_000)
        >>> table = metrics_table({"dense": dense, "pruned": pruned})
        >>> [list(column.cells) for column in table.columns[:4]]
        [['dense', 'pruned'], ['0.9000', '0.8000'], ['0.3100', '0.5400'], ['2 M (100.0%)', '1 M (50.0%)']]
    """
    first, resources = next(iter(metrics.values())), measured(metrics)
    gains = any(row.speedup is not None for row in metrics.values())
    whole = first.costs if dense is None else dense
    table = Table(title=f"measured on {first.samples} {first.data} samples", title_justify="left")
    for heading in (
        "model",
        first.metric_name,
        "loss",
        *(resource.label for resource in resources),
        "latency" if first.latency_rows is None else f"latency (batch {first.latency_rows})",
        *(["gain"] if gains else []),
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in metrics.items():
        costs = [amount(row.costs, whole, resource) for resource in resources]
        times = [latency_text(row), *([gain_text(row, first)] if gains else [])]
        table.add_row(name, f"{row.metric:.4f}", f"{row.loss:.4f}", *costs, *times)
    return table


def measured(metrics: Mapping[str, Metrics]) -> list[Resource]:
    """Returns the resources that were measured for at least one model, in the order of `xprune.RESOURCES`."""
    names = {name for row in metrics.values() for name in row.costs}
    return [resource for name, resource in registered("resources").items() if name in names]


def sites_table(plan: Plan) -> Table:
    """Makes a table with a row for each site: how many units it keeps, and a bar of 20 characters."""
    table = Table(title="units kept at each site", title_justify="left")
    for heading in ("site", "units", "kept", "of", ""):
        table.add_column(heading, justify="right" if heading in ("kept", "of") else "left")
    for site, count in zip(plan.sites, plan.counts, strict=True):
        filled = round(20 * count / site.size)
        table.add_row(
            site.name, unit_kind(site.kind).plural, str(count), str(site.size), "█" * filled + "░" * (20 - filled)
        )
    return table


def found_tables(sites: Sites) -> tuple[Table, ...]:
    """Makes one or two tables: the sites that were found, and the modules that are left alone.

    The first table has a row for each site. The second table has a row for each reason, with the paths of all modules
    with this reason. If no module is left alone, there is no second table.
    """
    table = Table(title="sites: units that can be removed", title_justify="left")
    for heading in ("site", "units", "features per unit", "found by"):
        table.add_column(heading, justify="right" if heading == "features per unit" else "left", overflow="fold")
    for site in sites:
        kind = unit_kind(site.kind)
        table.add_row(site.name, kind.many(site.size), str(site.width), site.adapter or kind.found_by)
    reasons: dict[str, list[str]] = {}
    for path, why in sites.left.items():
        reasons.setdefault(why, []).append(path)
    if not reasons:
        return (table,)
    left = Table("modules", "reason", title="modules left alone", title_justify="left", show_lines=True)
    left.columns[0].overflow = "fold"  # fold long paths: a user could not copy a path that is cut off
    for why, paths in reasons.items():
        left.add_row("\n".join(paths), why)
    return table, left


def coverage_text(record: Record) -> str:
    """Returns lines about what the units cover and what was left alone, the part that was pruned, and the allowed time.

    The second line is there only if a part of the model was pruned, and the third one only if the budget limits the
    latency.
    """
    lines = [record.coverage.text if record.coverage else "", part_text(record), allowed_time_text(record.plan)]
    return "".join(f"{line}\n" for line in lines if line)


def part_text(record: Record) -> str:
    """Returns which fraction of the cost of the pruned part, or of the model, the plan keeps. "" for a whole model.

    It is the fraction that the budget limits.
    """
    inside, info = record.settings.get("inside"), record.plan.info
    if not inside or not info.get("predicted"):
        return ""
    labels = {name: resource.label for name, resource in registered("resources").items()}
    kept = " and ".join(
        f"{percent(share)} of the {labels.get(name, name)}" for name, share in info["predicted"].items()
    )
    if info.get("of") == "part":
        return f"The budget is that of the part {', '.join(inside)}: the plan keeps {kept} of this part."
    return f"The budget is that of the whole model: the plan keeps {kept}."


def allowed_time_text(plan: Plan) -> str:
    """Returns which time a plan has for a budget of the latency, and which time was measured. "" for other budgets.

    Example:
        >>> note = {"asked": 0.5, "realised": 0.492, "target": "device=cpu, batch=16"}
        >>> print(allowed_time_text(Plan((), (), {"latency": note})))
        The budget allows 50 % of the dense model's time, and the pruned model takes 49.2 % (device=cpu, batch=16).
    """
    note = plan.info.get("latency")
    if not isinstance(note, Mapping):
        return ""
    asked = f"The budget allows {note['asked'] * 100:.3g} % of the dense model's time"
    if note.get("realised") is None:
        return f"{asked}. The plan follows the table ({note['target']}), and its model was not measured there."
    return f"{asked}, and the pruned model takes {note['realised'] * 100:.3g} % ({note['target']})."


def unseen(scores: Scores, names: Sequence[str] | None = None) -> str:
    """Returns a text about classes without class-wise scores, and what to do. "" if there are none.

    Args:
        scores: The scores of a run.
        names: The names of the classes. If None, the text gives the class indices.
    """
    classes = scores.unseen
    if not classes or scores.classwise is None:
        return ""
    shown = [names[index] if names is not None and index < len(names) else str(index) for index in classes[:5]]
    text = ", ".join(shown) + (", ..." if len(classes) > 5 else "")
    return (
        f"{len(classes):,} of {scores.classwise[0].shape[0]:,} classes have no class-wise scores ({text}): the "
        "criterion saw no sample of them. Use more steps or more data.\n"
    )


def render(*tables: Table) -> str:
    """Prints tables into a string, as plain text that is 110 characters wide.

    Example:
        >>> table = Table("site", "kept")
        >>> table.add_row("blocks.0.attn", "3")
        >>> "blocks.0.attn" in render(table)
        True
    """
    console = Console(width=110, no_color=True, force_terminal=False)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get()


def amount(costs: Mapping[str, float], dense: Mapping[str, float], resource: Resource) -> str:
    """Returns the cost of a model as text, with the percentage of the cost of the dense model.

    If the cost of the dense model is unknown, there is no percentage. If the cost was not measured, the text is "-".
    """
    value, whole = costs.get(resource.name), dense.get(resource.name)
    if value is None:
        return "-"
    # The number has three digits and a prefix, such as 1.26 G or 22.1 M.
    scale, prefix = next((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if value >= s or s == 1)
    number = f"{value / scale:.3g} {prefix}{resource.unit}".rstrip()
    return f"{number} ({value / whole:.1%})" if whole else number
