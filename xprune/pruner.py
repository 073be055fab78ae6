"""The class `Pruner`, which prunes a model in one call.

`xprune.pipeline.Run` does the work, with a method for each stage. The class here calls these methods in order and
collects their results.
"""

import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from xprune.core.budget import Budget
from xprune.core.checkpoint import Checkpoint
from xprune.core.interfaces import Criterion, Selection
from xprune.core.registry import plain_settings, resolve
from xprune.core.site import Site
from xprune.core.target import Target
from xprune.core.task import Task
from xprune.criteria import CRITERIA
from xprune.environment import hardware, versions
from xprune.errors import TrainingError
from xprune.modules.copies import unwrap
from xprune.pipeline import Run
from xprune.result import PruneResult
from xprune.selections import SELECTIONS
from xprune.tasks import TASKS
from xprune.training.finetune import Finetune
from xprune.training.runtime import stage


class Pruner:
    """A complete pruning procedure for one model: score, select, cut, fine-tune and measure.

    Args:
        model: The dense model. It is not changed. `find_sites` must find at least one site in it.
        criterion: The criterion, which computes the scores. A name from `xprune.CRITERIA`, which may be followed by
            settings as in "taylor,kind=abs", or an instance of `xprune.Criterion`.
        budget: How much the pruned model may cost. None means half of the dense model's MACs.
        selection: The selection, which turns the scores into a plan. A name from `xprune.SELECTIONS`, which may be
            followed by settings, or an instance of `xprune.Selection`.
        finetune: The settings of the fine-tuning after surgery. None means that the pruned model is not fine-tuned.
        task: Reads batches and computes the loss and the metric. An instance of `xprune.Task`, or a name from
            `xprune.TASKS`, which may be followed by settings as in "regression,measure=RMSE". None means classification
            of (inputs, labels).
        sites: The sites that may lose units. None means the sites that `find_sites` finds with the first training
            batch.
        units: The unit kinds to find, such as ["head"]. None means the kinds that `find_sites` finds by default. This
            argument is used only if `sites` is None.
        exclude: Patterns of the names of sites that keep all units, such as ["blocks.0.*"]. This argument is used only
            if `sites` is None.
        inside: Patterns of the part of the model to prune, such as ["vision_model.*"], see `find_sites`. The rest of
            the model keeps all units. With `Budget(of="part")`, the budget is a fraction of the cost of this part. If
            you give `sites`, do not give `inside`: the part is then the one that the sites were found in.
        seed: The seed of all random choices.
        checkpoint_dir: The folder where scoring, selection and fine-tuning save their progress. If the program was
            killed, the next run with the same folder continues from there. Progress is saved every ten minutes, or as
            often as `xprune.Checkpoint` says. None means that nothing is saved during the run.
        latency: If True, the time of a forward pass is measured for the dense model and the pruned model, which run in
            turn on the first training batch. If False, the metrics contain no latency.

    Raises:
        PluginError: The criterion, the selection or the task is unknown, or its settings are wrong.
        ModelError: `model` is not an `nn.Module`, or PEFT or FSDP has wrapped its layers.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> pruner = xprune.Pruner(model, "magnitude", xprune.Budget(macs=0.5), finetune=None, latency=False)
        >>> result = pruner.run(batches)
        Units cover 96 % of the model's MACs (2 sites). No module was left alone.
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
        task: str | Task | None = None,
        *,
        sites: Sequence[Site] | None = None,
        units: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        inside: str | Sequence[str] = (),
        seed: int = 0,
        checkpoint_dir: str | Path | Checkpoint | None = None,
        latency: bool = True,
    ) -> None:
        self.model = unwrap(model)
        self.criterion: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
        self.budget = budget or Budget(macs=0.5)
        self.selection: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        self.finetune = finetune
        self.task: Task = resolve(task or "classification", TASKS, Task, "task")
        self.sites, self.units, self.exclude, self.inside = sites, units, exclude, inside
        self.seed, self.checkpoint_dir, self.latency = seed, checkpoint_dir, latency

    @stage()
    def run(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None) -> PruneResult:
        """Prunes the model: scores the units, selects those that stay, removes the others, fine-tunes, and measures.

        Before the scoring, it prints one line: the share of the model's MACs that the units cover, and which modules
        were left alone and why. The result has the same as `result.coverage`.

        Args:
            train_loader: Training batches. The criterion, a selection that learns, and fine-tuning use them.
            val_loader: Batches on which the loss and the metric are measured. None means that they are measured on the
                training batches. The metrics then say so.

        Returns:
            The pruned model, together with the plan, the scores, the metrics and the settings.

        Raises:
            DataError: A loader is empty, can be read only once, or does not fit the task.
            ModelError: The model has no sites, or its forward fails.
            BudgetError: No plan can meet the budget. The message says the smallest fraction that can be reached.
            PluginError: The criterion or the selection does not do what its base class demands, or the selection needs
                more updates than fine-tuning makes.
            TrainingError: The loss is not finite, or `checkpoint_dir` cannot be used.
            SurgeryError: The proof failed: the pruned model does not compute what the gated dense model computes.
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
            inside=self.inside,
            latency=self.latency,
            resources=self.budget.limited,
            # The time that the budget limits is also the time that the result shows.
            target=self.budget.target if isinstance(self.budget.target, Target) else Target(),
        )
        return self.carry_out(run)

    @stage()
    def carry_out(self, run: Run) -> PruneResult:
        """Does the work of `Pruner.run` with a `Run` that several pruners share.

        The shared `Run` stores its sites, its costs and the metrics of the dense model. So the next pruner need not
        compute them again.

        Args:
            run: A `Run` with the model and the task of this pruner. It also has the sites, the loaders, and whether
                latency is measured. `sites`, `units`, `exclude`, `inside` and `latency` of this pruner are ignored.

        Returns:
            The same as `Pruner.run`.
        """
        # This check raises the error for an impossible budget or setting now, not after hours of scoring.
        run.check(self.budget, self.selection, self.finetune)
        run.tell_coverage()
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
        if metrics["pruned"].dense_ms is not None:
            # The dense model ran in turn with the pruned one. With this time, the rows of a table fit to each other.
            metrics["dense"] = replace(run.dense, latency_ms=metrics["pruned"].dense_ms)
        if self.finetune:
            pruned = run.finetune(
                pruned,
                self.finetune,
                # If the selection trained the weights, it has used some of fine-tuning's updates.
                taken=selected.updates,
                seed=self.seed,
                checkpoint_dir=self._folder("finetune"),
            )
            # Fine-tuning changes no shape, so the fine-tuned model has the costs of the pruned model.
            metrics["finetuned"] = run.measure(pruned, like=metrics["pruned"])
        settings = self._settings(run.train, run.inside)
        return PruneResult(
            pruned, selected.plan, scores, metrics, settings, self.model, run.data, run.task, run.coverage
        )

    def _settings(self, loader: Iterable[Any], inside: tuple[str, ...]) -> dict[str, Any]:
        """Returns the settings of this pruner, the date, the hardware and the versions as a dict that JSON can hold."""
        dataset = getattr(loader, "dataset", None)
        chosen = {"selection": self.selection, "budget": self.budget, "finetune": self.finetune}
        return {
            **{name: plain_settings(kind) for name, kind in chosen.items() if kind},
            **({"inside": list(inside)} if inside else {}),
            "task": self.task.name or type(self.task).__name__,
            # Reports and pictures show these names, also after the result was saved and loaded.
            "classes": None if self.task.class_names is None else list(self.task.class_names),
            "seed": self.seed,
            # It is None if the loader is a list of batches, or if its data set has no length.
            "training_samples": len(dataset) if isinstance(dataset, Sized) else None,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": hardware(),
            "versions": versions(),
        }

    def _check_folder(self) -> None:
        """Raises TrainingError if `checkpoint_dir` is the name of a file. It is called before any work is done."""
        where = Checkpoint.of(self.checkpoint_dir)
        if where is not None and where.path.exists() and not where.path.is_dir():
            raise TrainingError(
                f"checkpoint_dir={str(where.path)!r} is a file, wanted a folder. Give the name of a folder instead."
            )

    def _folder(self, stage: str) -> Checkpoint | None:
        """Returns where a stage saves its progress, and how often. Returns None if there is no `checkpoint_dir`."""
        where = Checkpoint.of(self.checkpoint_dir)
        return where and where.inside(stage)
