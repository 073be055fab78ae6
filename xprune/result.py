"""PruneResult: the pruned model, why it is what it is, and what it costs and gives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from xprune.artefact import load, read_header, read_tensors, save
from xprune.errors import ArtefactError, XPruneError
from xprune.evaluate import Metrics
from xprune.explain.curves import Named
from xprune.plan import Plan
from xprune.provenance import provenance
from xprune.scores import LowRank, Scores
from xprune.sites import Sites
from xprune.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PruneResult:
    """What `Pruner.run` returns.

    model     an ordinary module, physically smaller, in eval mode
    plan      the units that stayed, relative to the model that was given
    scores    of every unit of that model
    metrics   "dense", "pruned" (after surgery) and, where it was asked for, "finetuned"
    settings  of the run, with hardware and versions, plain data
    dense     the model that was given, data that figures were measured on, and the task: what a report looks at for
              pictures. References, not copies; None in a result that was read from a directory
    """

    model: nn.Module
    plan: Plan
    scores: Scores
    metrics: Mapping[str, Metrics]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dense: nn.Module | None = None
    data: Iterable[Any] | None = None
    task: Task | None = None

    def summary(self) -> str:
        """A table of the metrics and one of the sites, as text; and the classes that scores say nothing of."""
        return render(metrics_table(self.metrics), sites_table(self.plan)) + unseen(self.scores)

    def report(
        self,
        path: str | Path,
        *,
        classes: Sequence[str] | None = None,
        faithfulness: Named | None = None,
    ) -> Path:
        """Writes one HTML page that says what was cut and why; it needs no network. See `xprune.report.write`."""
        from xprune.report import write

        return write(self, path, classes=classes, faithfulness=faithfulness)

    def plot(self, kind: str, ax: "Axes | None" = None, classes: Sequence[str] | None = None) -> "Axes":
        """A picture for a paper, on the matplotlib axes given or new ones; see `xprune.plots` for the kinds."""
        from xprune.plots import plot

        return plot(self, kind, ax, classes)

    def save(self, directory: str | Path, arch: str | tuple[str, Mapping[str, Any]] | None = None) -> Path:
        """Writes the artefact that `xprune.load` reads, with what a report needs beside the model; see `xprune.save`.

        The data and the dense model are not saved.
        """
        before = provenance(self.model)
        extra = {
            "criterion": self.scores.criterion,
            "info": dict(self.scores.info),
            "scale": self.scores.scale,
            "metrics": {name: metrics.to_json() for name, metrics in self.metrics.items()},
            "settings": dict(self.settings),
            # The header's plan is relative to the first model of all: where this one was pruned before, not the run's.
            "plan": None if before and before.plan == self.plan else self.plan.to_json(),
        }
        return save(self.model, directory, arch=arch, extra=extra, tensors_beside=_tensors(self.scores))

    @staticmethod
    def load(directory: str | Path, model_fn: Callable[[], nn.Module] | None = None) -> "PruneResult":
        """The result that was saved, without the dense model and the data; see `xprune.load`.

        Raises ArtefactError where the directory holds a model alone.
        """
        header, tensors = read_header(directory), read_tensors(directory)
        extra = header["extra"]
        if not tensors or "settings" not in extra:
            raise ArtefactError(f"{directory} holds a model, but no result: it was not written by PruneResult.save.")
        try:
            plan = Plan.from_json(extra["plan"] or header["plan"])
            metrics = {name: Metrics(**row) for name, row in extra["metrics"].items()}
            scores = _scores(plan, extra, tensors)
        except (XPruneError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(f"{directory} is tampered with or damaged: {error}") from error
        return PruneResult(load(directory, model_fn), plan, scores, metrics, extra["settings"])


def _tensors(scores: Scores) -> dict[str, Tensor]:
    """Scores under names that a file can hold."""
    named = {f"{site.name}:score": value for site, value in zip(scores.sites, scores.values, strict=True)}
    for site, table in zip(scores.sites, scores.classwise or (), strict=False):
        parts = vars(table) if isinstance(table, LowRank) else {"classwise": table}
        named |= {f"{site.name}:{part}": value for part, value in parts.items()}
    return named


def _scores(plan: Plan, extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scores:
    names = [site.name for site in plan.sites]
    classwise: list[Tensor | LowRank] = []
    for name in names:
        if f"{name}:classwise" in tensors:
            classwise.append(tensors[f"{name}:classwise"])
        elif f"{name}:left" in tensors:
            classwise.append(LowRank(*(tensors[f"{name}:{part}"] for part in ("left", "right", "offset"))))
    values = tuple(tensors[f"{name}:score"] for name in names)
    return Scores(plan.sites, values, extra["criterion"], tuple(classwise) or None, extra["info"], extra["scale"])


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
            amount(row.macs, first.macs),
            amount(row.params, first.params),
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
    """A count with its unit and its share of the dense model's; "-" where it is not known."""
    if value is None or not dense:
        return "-"
    number = next(
        f"{value / scale:.3g} {unit}"
        for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
        if value >= scale or scale == 1
    )
    return f"{number} ({value / dense:.1%})"
