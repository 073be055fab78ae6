"""The class `PruneResult`, the result of one run: the pruned model with its plan, scores, metrics and settings.

It extends `xprune.core.record.Record` with methods that save, load, report and plot the result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xprune.artefact.portable import classes_of_xprune
from xprune.artefact.save_load import load, read_header, read_tensors, save
from xprune.core.coverage import Coverage
from xprune.core.plan import Plan
from xprune.core.provenance import provenance
from xprune.core.record import Metrics, Record
from xprune.core.scores import LowRank, Scores
from xprune.errors import ArtefactError, XPruneError
from xprune.explain.curves import Named
from xprune.report.gained import gain_note
from xprune.report.text import coverage_text, metrics_table, render, sites_table, unseen

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PruneResult(Record):
    """The result of `Pruner.run`: the pruned model, and everything that explains how it was pruned.

    Attributes:
        model: The pruned model, in eval mode. It has smaller weights. Apart from that, it is an ordinary PyTorch
            module.
        plan: The units that stay at each site. The sites and the indices of the units are those of the dense model.
        scores: The scores of all units of the dense model.
        metrics: The loss, the metric and the costs of each model, by name: "dense" (before pruning), "pruned" (after
            surgery), and "finetuned" if the run fine-tuned the model.
        settings: The selection, the budget, the settings of fine-tuning, the seed, the date, the hardware and the
            versions of the run. They are a dict that JSON can hold.
        dense: The dense model itself, not a copy. None if the result was loaded from a folder.
        data: The loader of the data that the metrics were measured on. None if the result was loaded from a folder.
        task: The task of the run. None if the result was loaded from a folder.
        coverage: The share of the dense model's MACs that the units cover, and the modules that were left alone. None
            if the result was saved by an older release, which did not save it.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> def build():
        ...     mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        ...     return nn.Sequential(nn.Flatten(), mlp)
        >>> batches = [(torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> pruner = xprune.Pruner(build(), "magnitude", xprune.Budget(params=0.6), finetune=None, latency=False)
        >>> result = pruner.run(batches)
        Units cover 100 % of the model's MACs (1 site). No module was left alone.
        >>> result.plan.counts  # of 16 neurons
        (9,)
        >>> folder = result.save("pruned")
        >>> again = xprune.PruneResult.load("pruned", build)
        >>> torch.equal(again.model(batches[0][0]), result.model(batches[0][0]))
        True
    """

    def summary(self) -> str:
        """Returns the result as text for the terminal.

        Returns:
            A table of the metrics, a table of the sites, and a line that says which share of the model's MACs the units
            cover and what was left alone. If the model is slower than the dense model, or gains little time, a line
            says so and what can help. If only a part of the model was pruned, another line says which fraction of
            the cost of this part the plan keeps. If all units of a site have the same score, a line says so. If some
            classes have no class-wise scores, a line says how many. If some modules of the pruned model have a class
            that xprune defines, another line says which.
        """
        tables = render(metrics_table(self.metrics), sites_table(self.plan))
        gain = gain_note(self.metrics, self.settings)
        notes = "".join(f"{note}\n" for note in (gain, self.scores.note) if note)
        return tables + coverage_text(self) + notes + unseen(self.scores, self.class_names) + _needs_xprune(self.model)

    def report(
        self,
        path: str | Path,
        *,
        classes: Sequence[str] | None = None,
        faithfulness: Named | None = None,
    ) -> Path:
        """Writes an HTML page that shows which units were removed and why. The page needs no internet connection.

        Args:
            path: The file to write. If xprune wrote a page with this name before, that page is replaced. Any other
                existing file is refused.
            classes: The names of the classes, by class index. None means the names that the task of the run has. If it
                has none, they are "class 0", "class 1" and so on.
            faithfulness: Results of `xprune.explain.faithfulness`, by a name to show on the page, such as the name of
                the criterion. Instead of a result, an entry may be a dict in the form that `Faithfulness.means`
                returns. None means that the page has no section about faithfulness.

        Returns:
            The path of the page.

        Raises:
            ModelError: The packages of `pip install 'xprune[report]'` are missing, or the class names or the curves do
                not fit the result.
            ArtefactError: `path` is a file that xprune did not write.
        """
        from xprune.report import write

        return write(self, path, classes=classes, faithfulness=faithfulness)

    def plot(self, kind: str, ax: "Axes | None" = None, classes: Sequence[str] | None = None) -> "Axes":
        """Draws a picture of the result with matplotlib.

        Args:
            kind: What to draw: "units", "classes", "training" or "accuracy". `xprune.report.plots.plot` describes them.
            ax: The matplotlib axes to draw on. None means new axes on a new figure.
            classes: The names of the classes, by class index. None means the names that the task of the run has. If it
                has none, they are "class 0", "class 1" and so on.

        Returns:
            The axes. To write the picture to a file, call `axes.figure.savefig(...)`.

        Raises:
            ModelError: The kind is unknown, the result does not contain the data for it, or matplotlib is not
                installed.
        """
        from xprune.report.plots import plot

        return plot(self, kind, ax, classes)

    def save(self, directory: str | Path, arch: str | tuple[str, Mapping[str, Any]] | None = None) -> Path:
        """Saves the pruned model, the plan, the scores, the metrics and the settings in a folder.

        `xprune.save` describes the files. The dense model and the data are not saved. `PruneResult.load` loads the
        whole result. `xprune.load` loads only the model.

        Args:
            directory: The folder. It may be new, empty, or contain only an artefact, which is replaced.
            arch: The architecture of the dense model: a timm name, or a tuple of the name and a dict of keyword
                arguments. None means that xprune derives it from the model. If this is not possible, a warning says
                that loading will need `model_fn`.

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
            "coverage": None if self.coverage is None else self.coverage.to_json(),
            # The header contains the plan that leads from the original dense model to this one. If the model was pruned
            # more than once, the plan of this run is a different one, so it is saved too.
            "plan": None if history and history.plan == self.plan else self.plan.to_json(),
        }
        return save(self.model, directory, arch=arch, extra=extra, tensors_beside=_tensors(self.scores))

    @staticmethod
    def load(directory: str | Path, model_fn: Callable[[], nn.Module] | None = None) -> "PruneResult":
        """Loads a result that `save` wrote.

        Args:
            directory: The folder.
            model_fn: A function without arguments that builds the dense model. None means that the model is built from
                the architecture that was saved.

        Returns:
            The result. Its attributes `dense`, `data` and `task` are None.

        Raises:
            ArtefactError: The folder contains no artefact, a damaged one, or one without a result. It is also raised if
                no architecture was saved and `model_fn` is None.
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
            # Files of older releases have no coverage.
            coverage = Coverage.from_json(extra["coverage"]) if extra.get("coverage") is not None else None
        except (XPruneError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(f"{directory} is tampered with or damaged: {error}") from error
        model = load(directory, model_fn)
        return PruneResult(model, plan, scores, metrics, extra["settings"], coverage=coverage)


def _needs_xprune(model: nn.Module) -> str:
    """Returns a line of text about the modules of a model whose class xprune defines. "" if there are none.

    A program without xprune cannot read a pickle of a model with such modules.
    """
    found = classes_of_xprune(model)
    if not found:
        return ""
    names = ", ".join(sorted({name.rpartition(".")[2] for name in found.values()}))
    return (
        f"{len(found)} modules have a class of xprune ({names}): a program that reads a pickle of the whole model "
        "needs xprune.\n"
    )


def _tensors(scores: Scores) -> dict[str, Tensor]:
    """Returns all tensors of the scores by their names in a file, such as "<site>:score" or "<site>:classwise"."""
    named = {f"{site.name}:score": value for site, value in zip(scores.sites, scores.values, strict=True)}
    for site, table in zip(scores.sites, scores.classwise or (), strict=False):
        # A `LowRank` table is saved as its small matrices, because the whole table may be too large for memory.
        parts = vars(table) if isinstance(table, LowRank) else {"classwise": table}
        named |= {f"{site.name}:{part}": value for part, value in parts.items()}
    return named


def _scores(plan: Plan, extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scores:
    """Returns the scores whose tensors `_tensors` has named. It is used to load a result.

    Args:
        plan: The plan of the result. Its sites are also the sites of the scores.
        extra: The entries of the header that `PruneResult.save` added. The criterion, the info and the scale are used.
        tensors: The tensors by their names in the file.
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
