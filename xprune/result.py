"""The result of one run: the pruned model with its plan, scores, metrics and settings.

`PruneResult` is a `xprune.core.record.Record` that can also be saved, loaded, reported and plotted.
"""

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
    """The result of `Pruner.run`: the pruned model, and all that explains it.

    Attributes:
        model: The pruned model, in eval mode. It has smaller weights and is otherwise an ordinary module.
        plan: The units that stay at each site. Sites and indices are those of the dense model.
        scores: The score of each unit of the dense model.
        metrics: Name of a model -> its loss, metric and costs. The names are "dense", "pruned" (after surgery) and, if
            the run fine-tuned, "finetuned".
        settings: Selection, budget, fine-tuning, seed, date, hardware and versions of the run, as plain data.
        dense: The dense model itself, not a copy. None in a result that was loaded from a folder.
        data: The loader that the metrics were measured on. None in a result that was loaded from a folder.
        task: The task of the run. None in a result that was loaded from a folder.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> def build():
        ...     mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        ...     return nn.Sequential(nn.Flatten(), mlp)
        >>> batches = [(torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> pruner = xprune.Pruner(build(), "magnitude", xprune.Budget(params=0.6), finetune=None, latency=False)
        >>> result = pruner.run(batches)
        >>> result.plan.counts  # of 16 neurons
        (9,)
        >>> folder = result.save("pruned")
        >>> again = xprune.PruneResult.load("pruned", build)
        >>> torch.equal(again.model(batches[0][0]), result.model(batches[0][0]))
        True
    """

    def summary(self) -> str:
        """Writes the result as text for the terminal.

        Returns:
            A table of the metrics and a table of the sites. Two lines follow if they apply. One says how many classes
            have no class-wise scores. The other says how many modules have a class of xprune.
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
        """Writes one HTML page that shows which units were removed and why. The page works without a network.

        Args:
            path: The file to write. A page that xprune wrote there before is replaced. Any other file is refused.
            classes: Names of the classes, by index. None: classes are shown as numbers.
            faithfulness: Name of a criterion or order -> the result of `xprune.explain.faithfulness`, or curves in the
                form that `Faithfulness.means` returns. None: the page has no such section.

        Returns:
            The path of the page.

        Raises:
            ModelError: The packages of `pip install 'xprune[report]'` are missing, or names or curves do not fit.
            ArtefactError: Another file has this name.
        """
        from xprune.report import write

        return write(self, path, classes=classes, faithfulness=faithfulness)

    def plot(self, kind: str, ax: "Axes | None" = None, classes: Sequence[str] | None = None) -> "Axes":
        """Draws a picture for a paper with matplotlib.

        Args:
            kind: "units", "classes", "training" or "accuracy". `xprune.report.plots.plot` describes them.
            ax: The axes to draw on. None: new axes on a new figure.
            classes: Names of the classes, by index. None: classes are shown as numbers.

        Returns:
            The axes. `axes.figure.savefig(...)` writes the picture to a file.

        Raises:
            ModelError: The kind is unknown, the result has no data for it, or matplotlib is not installed.
        """
        from xprune.report.plots import plot

        return plot(self, kind, ax, classes)

    def save(self, directory: str | Path, arch: str | tuple[str, Mapping[str, Any]] | None = None) -> Path:
        """Saves the pruned model, plan, scores, metrics and settings in a folder. `xprune.save` describes the files.

        The dense model and the data are not saved. `PruneResult.load` reads all of the rest back. `xprune.load` reads
        only the model.

        Args:
            directory: The folder: a new one, an empty one, or one that holds an artefact and nothing else.
            arch: The dense architecture: a timm name, or a pair of name and keyword arguments. None: found from the
                model if possible. If not, a warning says that loading will need `model_fn`.

        Returns:
            The folder.

        Raises:
            ArtefactError: The folder cannot be used, or `arch` does not rebuild the model.
        """
        history = provenance(self.model)
        extra = {
            "criterion": self.scores.criterion,
            "info": dict(self.scores.info),
            "scale": self.scores.scale,
            "metrics": {name: metrics.to_json() for name, metrics in self.metrics.items()},
            "settings": dict(self.settings),
            # The plan in the header leads from the very first dense model to this one. If the model was pruned more
            # than once, that is not the plan of this run, so the plan of this run is saved too.
            "plan": None if history and history.plan == self.plan else self.plan.to_json(),
        }
        return save(self.model, directory, arch=arch, extra=extra, tensors_beside=_tensors(self.scores))

    @staticmethod
    def load(directory: str | Path, model_fn: Callable[[], nn.Module] | None = None) -> "PruneResult":
        """Loads a result that `save` wrote.

        Args:
            directory: The folder.
            model_fn: A function that builds the dense model. None: it is built from the architecture that was saved.

        Returns:
            The result. Its `dense`, `data` and `task` are None.

        Raises:
            ArtefactError: The folder holds no artefact, a damaged one, or a model without a result. Also if no
                architecture was saved and `model_fn` is None.
        """
        header, tensors = read_header(directory), read_tensors(directory)
        extra = header["extra"]
        if not tensors or "settings" not in extra:
            raise ArtefactError(
                f"{directory} holds a model, but no result: it was not written by PruneResult.save. "
                "Read the model with xprune.load."
            )
        try:
            plan = Plan.from_json(extra["plan"] or header["plan"])
            metrics = {name: Metrics(**row) for name, row in extra["metrics"].items()}
            scores = _scores(plan, extra, tensors)
        except (XPruneError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(f"{directory} is tampered with or damaged: {error}") from error
        return PruneResult(load(directory, model_fn), plan, scores, metrics, extra["settings"])


def _needs_xprune(model: nn.Module) -> str:
    """Returns a line that names the classes of xprune in the model. Empty if the model has none."""
    found = classes_of_xprune(model)
    if not found:
        return ""
    names = ", ".join(sorted({name.rpartition(".")[2] for name in found.values()}))
    return (
        f"{len(found)} modules have a class of xprune ({names}): a program that reads a pickle of the whole model "
        "needs xprune.\n"
    )


def _tensors(scores: Scores) -> dict[str, Tensor]:
    """Returns all tensors of the scores under names for a file: "<site>:score", "<site>:classwise" and so on."""
    named = {f"{site.name}:score": value for site, value in zip(scores.sites, scores.values, strict=True)}
    for site, table in zip(scores.sites, scores.classwise or (), strict=False):
        # Factors of low rank are saved as factors: the whole table may be too large for memory.
        parts = vars(table) if isinstance(table, LowRank) else {"classwise": table}
        named |= {f"{site.name}:{part}": value for part, value in parts.items()}
    return named


def _scores(plan: Plan, extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scores:
    """Returns the scores that `_tensors` turned into named tensors.

    Args:
        plan: The plan of the result, whose sites are those of the scores.
        extra: The part of the header that `PruneResult.save` added: criterion, info and scale.
        tensors: The named tensors.
    """
    names = [site.name for site in plan.sites]
    classwise: list[Tensor | LowRank] = []
    for name in names:
        if f"{name}:classwise" in tensors:
            classwise.append(tensors[f"{name}:classwise"])
        elif f"{name}:left" in tensors:
            classwise.append(LowRank(*(tensors[f"{name}:{part}"] for part in ("left", "right", "offset"))))
    values = tuple(tensors[f"{name}:score"] for name in names)
    return Scores(plan.sites, values, extra["criterion"], tuple(classwise) or None, extra["info"], extra["scale"])
