"""Pruner: the whole path in one call, thin over `pipeline.Run`."""

import json
import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from xprune.core.budget import Budget
from xprune.core.interfaces import Criterion, Selection
from xprune.core.registry import resolve
from xprune.core.site import Site
from xprune.core.task import Task
from xprune.criteria import CRITERIA
from xprune.environment import hardware, versions
from xprune.errors import TrainingError
from xprune.modules.copies import unwrap
from xprune.pipeline import Run
from xprune.result import PruneResult
from xprune.selections import SELECTIONS
from xprune.tasks.classification import Classification
from xprune.training.finetune import Finetune
from xprune.training.runtime import stage


class Pruner:
    """Prunes a model to a budget.

    Args:
        model: Any model whose attentions an adapter knows, or whose MLPs the graph finds. It is not changed.
        criterion: A name from CRITERIA, or an instance.
        budget: What the pruned model may cost. None: half of the MACs.
        selection: A name from SELECTIONS, or an instance.
        finetune: Settings of fine-tuning. None for none.
        task: How to read a batch, and the loss. None: classification of (inputs, labels).
        sites: What may be pruned. None: what `find_sites` finds on the first batch.
        units: Kinds of unit to look for, where `sites` is None.
        exclude: Patterns of site names to leave alone, where `sites` is None.
        seed: Of every random choice.
        checkpoint_dir: Where long loops keep their state, so that a killed run goes on. None for nowhere.
        latency: Time the dense and the pruned model. False: the figures have no latency.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: str | Criterion = "xpruner",
        budget: Budget | None = None,
        selection: str | Selection = "global",
        finetune: Finetune | None = Finetune(),  # noqa: B008 - immutable
        task: Task | None = None,
        *,
        sites: Sequence[Site] | None = None,
        units: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
        latency: bool = True,
    ) -> None:
        self.model = unwrap(model)
        self.criterion: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
        self.budget = budget or Budget(macs=0.5)
        self.selection: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        self.finetune, self.task = finetune, task or Classification()
        self.sites, self.units, self.exclude = sites, units, exclude
        self.seed, self.checkpoint_dir, self.latency = seed, checkpoint_dir, latency

    @stage()
    def run(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None) -> PruneResult:
        """Scores, selects, cuts, fine-tunes and measures.

        Args:
            train_loader: Batches that scores are taken on and that fine-tuning learns from.
            val_loader: Batches that figures are measured on. None: they are measured on the training data and
                labelled so.
        """
        self._check_folder()
        run = Run(
            self.model,
            train_loader,
            val_loader,
            task=self.task,
            sites=self.sites,
            units=self.units,
            exclude=self.exclude,
            latency=self.latency,
            resources=tuple(self.budget.shares),
        )
        return self.carry_out(run)

    @stage()
    def carry_out(self, run: Run) -> PruneResult:
        """`run`, on a run that others share: what it has measured already is not measured again.

        Args:
            run: A run of this pruner's model and task. Its sites, loaders and timing count, not this pruner's.
        """
        run.check(self.budget, self.selection, self.finetune)
        metrics = {"dense": run.dense}
        scores = run.score(self.criterion, self.budget, seed=self.seed, checkpoint_dir=self._folder("score"))
        selected = run.select(
            scores,
            self.budget,
            self.selection,
            self.finetune,
            seed=self.seed,
            checkpoint_dir=self._folder("select"),
        )
        pruned = run.cut(selected)
        metrics["pruned"] = run.measure(pruned)
        if self.finetune:
            pruned = run.finetune(
                pruned,
                self.finetune,
                taken=selected.updates,
                seed=self.seed,
                checkpoint_dir=self._folder("finetune"),
            )
            metrics["finetuned"] = run.measure(pruned, like=metrics["pruned"])
        settings = self._settings(run.train)
        return PruneResult(pruned, selected.plan, scores, metrics, settings, self.model, run.data, self.task)

    def _settings(self, loader: Iterable[Any]) -> dict[str, Any]:
        """What the run was made with and on, plain data."""
        rows = getattr(loader, "dataset", None)
        chosen = {"selection": self.selection, "budget": self.budget, "finetune": self.finetune}
        return {
            **{name: _plain(kind) for name, kind in chosen.items() if kind},
            "seed": self.seed,
            "training_samples": len(rows) if isinstance(rows, Sized) else None,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": hardware(),
            "versions": versions(),
        }

    def _check_folder(self) -> None:
        """TrainingError, before any work, where checkpoints cannot be kept in the folder given."""
        folder = None if self.checkpoint_dir is None else Path(self.checkpoint_dir)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise TrainingError(f"checkpoint_dir={str(folder)!r} is a file, wanted a folder: give another name.")

    def _folder(self, stage: str) -> Path | None:
        return Path(self.checkpoint_dir) / stage if self.checkpoint_dir is not None else None


def _plain(settings: Any) -> dict[str, Any]:
    """The name of a plug-in and the fields of a dataclass, whatever is not plain as text."""
    fields: dict[str, Any] = {}
    if is_dataclass(settings) and not isinstance(settings, type):
        fields = json.loads(json.dumps(asdict(settings), default=str))
    return {"name": settings.name, **fields} if hasattr(settings, "name") else fields
