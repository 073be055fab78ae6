"""PruneResult: the pruned model, why it is what it is, and what it costs and gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xprune.artefact.portable import classes_of_xprune
from xprune.artefact.save_load import load, read_header, read_tensors, save
from xprune.core.plan import Plan
from xprune.core.provenance import provenance
from xprune.core.record import Metrics, Record
from xprune.core.scores import LowRank, Scores
from xprune.errors import ArtefactError, XPruneError
from xprune.explain.curves import Named
from xprune.report.text import metrics_table, render, sites_table, unseen

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PruneResult(Record):
    """What `Pruner.run` returns: a `Record` that can be saved, reported and plotted."""

    def summary(self) -> str:
        """The result as text.

        Returns:
            A table of the metrics and one of the sites. Then, each where it is so, a line on classes that the scores
            say nothing of, and one on modules whose class is xprune's.
        """
        tables = render(metrics_table(self.metrics), sites_table(self.plan))
        return tables + unseen(self.scores) + _needs_xprune(self.model)

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
        from xprune.report.plots import plot

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


def _needs_xprune(model: nn.Module) -> str:
    """A line that names the classes of xprune in the model, empty where it holds none."""
    found = classes_of_xprune(model)
    if not found:
        return ""
    names = ", ".join(sorted({name.rpartition(".")[2] for name in found.values()}))
    return (
        f"{len(found)} modules are of classes of xprune ({names}): whoever reads a pickle of the whole model needs "
        "xprune.\n"
    )


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
