"""The Pruner: prunes a model in one call.

The work is done by the stages of `xprune.pipeline.Run`. This module calls them in order and collects what they return.
"""

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
    """A complete pruning procedure for one model: score, select, cut, fine-tune and measure.

    Args:
        model: The dense model. It is not changed. `find_sites` must find at least one site in it.
        criterion: Computes the scores. A name from `xprune.CRITERIA`, also with settings such as "taylor,kind=abs", or
            an instance of `xprune.Criterion`.
        budget: How much the pruned model may cost. None: half of the dense model's MACs.
        selection: Turns the scores into a plan. A name from `xprune.SELECTIONS`, also with settings, or an instance of
            `xprune.Selection`.
        finetune: Settings of the fine-tuning that follows surgery. None: the pruned model is not fine-tuned.
        task: Reads a batch, and computes the loss and the metric. None: classification of (inputs, labels).
        sites: The sites that may lose units. None: those that `find_sites` finds with the first training batch.
        units: Unit kinds to look for, such as ["head"]. None: those that `find_sites` looks for by default. Used only
            if `sites` is None.
        exclude: Patterns of names of sites that keep all units, such as ["blocks.0.*"]. Used only if `sites` is None.
        seed: Seeds all random choices.
        checkpoint_dir: Folder where scoring, selection and fine-tuning save their progress. A run that was killed
            continues from there. None: nothing is saved during the run.
        latency: True: measures how long a forward pass takes, for the dense and for the pruned model. False: the
            metrics contain no latency.

    Raises:
        PluginError: The criterion or the selection is unknown, or its settings are wrong.
        ModelError: The model cannot be pruned in its present form: a PEFT wrapper, weights sharded by FSDP, or no
            `nn.Module` at all.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> pruner = xprune.Pruner(model, "magnitude", xprune.Budget(macs=0.5), finetune=None, latency=False)
        >>> result = pruner.run(batches)
        >>> result.metrics["pruned"].macs <= 0.5 * result.metrics["dense"].macs
        True
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
        """Scores the units, selects those that stay, removes the others, fine-tunes, and measures each model.

        Args:
            train_loader: Batches for the criterion, for a selection that learns, and for fine-tuning.
            val_loader: Batches on which loss and metric are measured. None: the training batches. The metrics then
                say that they were measured on training data.

        Returns:
            The pruned model, with its plan, scores, metrics and settings.

        Raises:
            DataError: A loader is empty, can be read only once, or does not fit the task.
            ModelError: The model has no sites, or its forward fails.
            BudgetError: The budget cannot be met. The message gives the smallest fraction that can.
            PluginError: The criterion or the selection breaks its contract, or takes more updates than there are.
            TrainingError: The loss is not finite, or `checkpoint_dir` cannot be used.
            SurgeryError: The pruned model does not give the outputs of the gated dense model.
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
        """Does the work of `run` with a `Run` that several pruners share.

        The shared `Run` keeps its sites, its costs and the metrics of the dense model. The next pruner uses them again.

        Args:
            run: A `Run` of this pruner's model and task. The sites, the loaders and the choice to measure latency are
                taken from it. This pruner's own `sites`, `units`, `exclude` and `latency` are ignored.

        Returns:
            The same as `run`.
        """
        # An impossible budget or setting is refused here, before the criterion works for hours.
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
                # A selection that trained the weights has used some of fine-tuning's updates.
                taken=selected.updates,
                seed=self.seed,
                checkpoint_dir=self._folder("finetune"),
            )
            # Fine-tuning changes no shape, so the costs of the pruned model hold and are not measured again.
            metrics["finetuned"] = run.measure(pruned, like=metrics["pruned"])
        settings = self._settings(run.train)
        return PruneResult(pruned, selected.plan, scores, metrics, settings, self.model, run.data, self.task)

    def _settings(self, loader: Iterable[Any]) -> dict[str, Any]:
        """Returns the settings of this pruner, with the date, the hardware and the versions, as plain data."""
        dataset = getattr(loader, "dataset", None)
        chosen = {"selection": self.selection, "budget": self.budget, "finetune": self.finetune}
        return {
            **{name: _plain(kind) for name, kind in chosen.items() if kind},
            "seed": self.seed,
            # A list of batches has no dataset, and a stream has no length.
            "training_samples": len(dataset) if isinstance(dataset, Sized) else None,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": hardware(),
            "versions": versions(),
        }

    def _check_folder(self) -> None:
        """Raises TrainingError, before any work, if `checkpoint_dir` is the name of a file."""
        folder = None if self.checkpoint_dir is None else Path(self.checkpoint_dir)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise TrainingError(
                f"checkpoint_dir={str(folder)!r} is a file, wanted a folder. Give the name of a folder instead."
            )

    def _folder(self, stage: str) -> Path | None:
        """Returns the folder where a stage saves its progress. None if there is no `checkpoint_dir`."""
        return Path(self.checkpoint_dir) / stage if self.checkpoint_dir is not None else None


def _plain(settings: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass, and the name if it is a plug-in or a budget, as data that JSON can hold."""
    fields: dict[str, Any] = {}
    if is_dataclass(settings) and not isinstance(settings, type):
        # The way through JSON turns tuples into lists, and fields that JSON does not know into text.
        fields = json.loads(json.dumps(asdict(settings), default=str))
    return {"name": settings.name, **fields} if hasattr(settings, "name") else fields
