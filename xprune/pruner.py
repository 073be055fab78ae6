"""Pruner: the whole path in one call, a short function over the stages."""

import json
import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from xprune.core.budget import Budget
from xprune.core.interfaces import Criterion, Selection
from xprune.core.record import Metrics
from xprune.core.registry import resolve
from xprune.core.site import Site
from xprune.core.task import Task
from xprune.costs.latency import latency
from xprune.costs.measure import count_resources
from xprune.criteria import CRITERIA
from xprune.discovery.find import find_sites
from xprune.environment import hardware, versions
from xprune.modules.copies import unwrap
from xprune.pipeline import make_context, score, select_trained
from xprune.result import PruneResult
from xprune.selections import SELECTIONS
from xprune.surgery.apply import apply
from xprune.tasks.classification import Classification
from xprune.training.evaluate import evaluate
from xprune.training.finetune import Finetune, finetune
from xprune.training.loop import length
from xprune.training.runtime import check_loader


class Pruner:
    """Prunes a model to a budget.

    model            any model whose attentions an adapter knows, or whose MLPs the graph finds; it is not changed
    criterion        a name from CRITERIA, or an instance
    budget           what the pruned model may cost
    selection        a name from SELECTIONS, or an instance
    finetune         settings of fine-tuning, None for none
    task             how to read a batch and what the loss is; None: classification of (inputs, labels)
    sites            what may be pruned; None: find_sites(model, ...) on the first batch
    seed             of every random choice
    checkpoint_dir   where long loops keep their state, so that a killed run goes on; None for nowhere
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
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.criterion: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
        self.budget = budget or Budget(macs=0.5)
        self.selection: Selection = resolve(selection, SELECTIONS, Selection, "selection")
        self.finetune, self.task = finetune, task or Classification()
        self.sites, self.seed, self.checkpoint_dir = sites, seed, checkpoint_dir

    def run(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None) -> PruneResult:
        """Scores, selects, cuts, fine-tunes and measures.

        train_loader   batches that scores are taken on and that fine-tuning learns from
        val_loader     batches that figures are measured on; without it they are measured on the training data and
                       labelled so
        """
        inputs = check_loader(train_loader, self.task)
        if val_loader is not None:
            check_loader(val_loader, self.task)
        example = self.task.example(inputs)
        sites = tuple(self.sites) if self.sites is not None else find_sites(self.model, example)
        measured = [self._measure(self.model, inputs, train_loader, val_loader)]
        scores = score(
            self.model,
            sites,
            train_loader,
            self.criterion,
            budget=self.budget,
            task=self.task,
            seed=self.seed,
            checkpoint_dir=self._folder("score"),
        )
        context = make_context(
            self.model,
            train_loader,
            task=self.task,
            seed=self.seed,
            checkpoint_dir=self._folder("select"),
            updates=self.finetune.epochs * length(train_loader, "fine-tuning") if self.finetune else 0,
        )
        plan, model = select_trained(self.model, context, scores, self.budget, self.selection)
        pruned = apply(model, plan, example)
        measured.append(self._measure(pruned, inputs, train_loader, val_loader))
        if self.finetune:
            pruned = finetune(
                pruned,
                train_loader,
                self.finetune,
                teacher=self.model if self.finetune.distill else None,
                task=self.task,
                seed=self.seed,
                checkpoint_dir=self._folder("finetune"),
                taken=plan.info.get("updates", 0),
            )
            measured.append(self._measure(pruned, inputs, train_loader, val_loader))
        metrics = dict(zip(("dense", "pruned", "finetuned"), measured, strict=False))
        data = train_loader if val_loader is None else val_loader
        return PruneResult(pruned, plan, scores, metrics, self._settings(train_loader), self.model, data, self.task)

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

    def _folder(self, stage: str) -> Path | None:
        return Path(self.checkpoint_dir) / stage if self.checkpoint_dir is not None else None

    def _measure(
        self, model: nn.Module, inputs: Any, train_loader: Iterable[Any], val_loader: Iterable[Any] | None
    ) -> Metrics:
        data, loader = ("training", train_loader) if val_loader is None else ("validation", val_loader)
        return evaluate(model, loader, task=self.task, data=data).with_costs(
            **count_resources(model, self.task.example(inputs), self.budget.shares),
            latency_ms=latency(model, inputs),
            latency_rows=self.task.size(self.task.unpack(next(iter(train_loader)))[1]),
        )


def _plain(settings: Any) -> dict[str, Any]:
    """The name of a plug-in and the fields of a dataclass, whatever is not plain as text."""
    fields: dict[str, Any] = {}
    if is_dataclass(settings) and not isinstance(settings, type):
        fields = json.loads(json.dumps(asdict(settings), default=str))
    return {"name": settings.name, **fields} if hasattr(settings, "name") else fields
