"""compare: a grid of criteria x selections x budgets x seeds, every cell on the same terms, kept cell by cell."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import get_console
from torch import nn

from xprune.comparison.table import Comparison, Kept, Key
from xprune.core.budget import Budget
from xprune.core.interfaces import Criterion, Selection
from xprune.core.registry import resolve
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.task import Task
from xprune.costs.measure import count_resources
from xprune.criteria import CRITERIA
from xprune.discovery.find import find_sites
from xprune.explain.deletion import faithfulness
from xprune.pipeline import make_context, score, select_trained
from xprune.selections import SELECTIONS
from xprune.surgery.apply import apply
from xprune.tasks.classification import Classification
from xprune.training.evaluate import evaluate
from xprune.training.finetune import Finetune, finetune
from xprune.training.loop import length
from xprune.training.runtime import accelerator, check_loader

FILE = "comparison.json"


@dataclass(frozen=True)
class Case:
    """What one seed of a comparison runs on.

    model      dense; it is not changed
    train      batches that scores, thresholds and weights learn from
    held_out   batches that figures are measured on, which train and choose nothing
    sites      what may be pruned; None: find_sites(model, ...)
    """

    model: nn.Module
    train: Iterable[Any]
    held_out: Iterable[Any]
    sites: Sequence[Site] | None = None


Peer = Callable[[Case, Budget, int], nn.Module]
"""Another library's whole way from a case, a budget and a seed to a pruned model, not fine-tuned."""


@dataclass(frozen=True)
class Grid:
    """What is compared, each under the name it has in the table.

    criteria, selections   name -> name of a plug-in or instance
    budgets, seeds         every cell is run for each of them
    finetune               the same for every cell, dense included: updates that a selection takes for weights that
                           learn along are taken off; None: none
    peers                  name -> another library's pruner, which makes its own selection
    task                   None: classification
    faithfulness           measure, on held-out data, what each class loses beyond the others when the units go that
                           class-wise scores say it needs most: `deletion_gap`, once for each criterion, 14 passes
    """

    criteria: Mapping[str, str | Criterion]
    selections: Mapping[str, str | Selection] = field(default_factory=lambda: {"global": "global"})
    budgets: tuple[Budget, ...] = (Budget(macs=0.5),)
    seeds: tuple[int, ...] = (0, 1, 2)
    finetune: Finetune | None = Finetune()  # noqa: RUF009 - immutable
    peers: Mapping[str, Peer] = field(default_factory=dict)
    task: Task | None = None
    faithfulness: bool = False


def compare(case: Case | Callable[[int], Case], grid: Grid, out: str | Path, **settings: Any) -> Comparison:
    """Runs the cells of the grid that `out`/comparison.json does not have yet, dense first, and keeps each one there.

    A cell that a criterion or selection of other settings made is run again, and replaced.

    case       one for all seeds, or a function of the seed
    settings   plain data to write down beside the results: which data, which recipe

    Every cell of a seed starts from the same dense model and has as many updates of weights. Scores are taken once
    for all selections, and once for all budgets where the criterion does not learn at one. Raises ArtefactError where
    the file holds another grid's settings, PluginError for an unknown criterion or selection before anything runs.
    """
    for name, kinds, base, label in (
        *((c, CRITERIA, Criterion, "criterion") for c in grid.criteria.values()),
        *((s, SELECTIONS, Selection, "selection") for s in grid.selections.values()),
    ):
        resolve(name, kinds, base, label)
    folder = Path(out)
    more = {"faithfulness": True} if grid.faithfulness else {}
    kept = Kept(folder / FILE, {"finetune": asdict(grid.finetune) if grid.finetune else None, **more, **settings})
    for seed in grid.seeds:
        todo = [key for key in _keys(grid, seed) if not kept.has(key, _made_by(grid, key))]
        if todo:
            run = _Seed(case(seed) if callable(case) else case, grid, seed, folder / "running")
            for key in todo:
                get_console().log(f"seed {seed}: {key[1]} {key[2]} {key[3]}")
                kept.add(key, {"made_by": _made_by(grid, key), **run.cell(*key[1:])})
    if accelerator().is_main_process:
        shutil.rmtree(folder / "running", ignore_errors=True)
    return kept.comparison()


def budget_name(budget: Budget) -> str:
    """What a budget asks for: "macs 0.5", "params 0.3"."""
    return budget.name


def _keys(grid: Grid, seed: int) -> Iterator[Key]:
    """Every cell of a seed, in an order in which scores can be shared."""
    yield seed, "dense", "", ""
    for criterion in grid.criteria:
        for budget in grid.budgets:
            for selection in grid.selections:
                yield seed, criterion, selection, budget_name(budget)
    for peer in grid.peers:
        for budget in grid.budgets:
            yield seed, peer, "its own", budget_name(budget)


def _made_by(grid: Grid, key: Key) -> str:
    """The criterion and the selection of a cell, with all their settings."""
    if key[1] not in grid.criteria:
        return ""
    criterion = resolve(grid.criteria[key[1]], CRITERIA, Criterion, "criterion")
    return f"{criterion!r}, {resolve(grid.selections[key[2]], SELECTIONS, Selection, 'selection')!r}"


class _Seed:
    """The cells of one seed."""

    def __init__(self, case: Case, grid: Grid, seed: int, running: Path) -> None:
        self.case, self.grid, self.seed, self.running = case, grid, seed, running
        self.task = grid.task or Classification()
        inputs = check_loader(case.train, self.task)
        check_loader(case.held_out, self.task)
        self.example = self.task.example(inputs)
        self.sites = tuple(case.sites) if case.sites is not None else find_sites(case.model, self.example)
        self.budgets = {budget_name(budget): budget for budget in grid.budgets}
        self.updates = grid.finetune.epochs * length(case.train, "compare") if grid.finetune else 0
        self.scores: dict[tuple[str, str], Scores] = {}
        self.gap: dict[str, float] = {}
        self.asked = list(dict.fromkeys(name for budget in grid.budgets for name in budget.shares))
        self.dense = count_resources(case.model, self.example, self.asked)

    def cell(self, criterion: str, selection: str, budget: str) -> dict[str, Any]:
        """The figures of one cell."""
        folder = self.running / "-".join(part for part in (str(self.seed), criterion, selection, budget) if part)
        if criterion == "dense":
            return self._figures(self.case.model, folder, 0)
        if criterion in self.grid.peers:
            start = time.perf_counter()
            try:
                pruned = self.grid.peers[criterion](self.case, self.budgets[budget], self.seed)
            except Exception as error:  # another library's failure is a result, not the end of the grid
                return {"failed": f"{type(error).__name__}: {error}"}
            return {"score_seconds": time.perf_counter() - start, **self._figures(pruned, folder, 0)}
        scores, seconds = self._scores(criterion, budget, folder)
        start = time.perf_counter()
        context = make_context(
            self.case.model,
            self.case.train,
            example_inputs=self.example,
            task=self.task,
            seed=self.seed,
            checkpoint_dir=folder / "select",
            updates=self.updates,
        )
        chosen = self.grid.selections[selection]
        plan, model = select_trained(self.case.model, context, scores, self.budgets[budget], chosen)
        pruned = apply(model, plan, self.example)
        times = {**self.gap, "score_seconds": seconds, "select_seconds": time.perf_counter() - start}
        return {**times, "kept": list(plan.counts), **self._figures(pruned, folder, plan.info.get("updates", 0))}

    def _scores(self, criterion: str, budget: str, folder: Path) -> tuple[Scores, float]:
        """(scores, seconds they took)."""
        chosen: Criterion = resolve(self.grid.criteria[criterion], CRITERIA, Criterion, "criterion")
        key = criterion, budget if chosen.at_budget else ""
        if key not in self.scores:
            start = time.perf_counter()
            found = score(
                self.case.model,
                self.sites,
                self.case.train,
                chosen,
                budget=self.budgets[budget],
                task=self.task,
                seed=self.seed,
                checkpoint_dir=folder / "score",
            )
            self.scores = {key: found}  # the ones before are not asked for again
            self._took = time.perf_counter() - start
            self.gap = {}
            if self.grid.faithfulness and found.classwise is not None:
                curves = faithfulness(
                    self.case.model,
                    found,
                    self.case.held_out,
                    insertion=False,
                    chance=0,
                    agnostic=False,
                    task=self.task,
                    seed=self.seed,
                )
                self.gap = {"deletion_gap": curves.gap}
        return self.scores[key], self._took

    def _figures(self, model: nn.Module, folder: Path, taken: int) -> dict[str, Any]:
        """Metric and cost, as cut and fine-tuned."""
        counted = count_resources(model, self.example, self.asked)
        figures: dict[str, Any] = {name: cost / self.dense[name] for name, cost in counted.items()}
        figures["updates_before"] = taken
        cut = evaluate(model, self.case.held_out, task=self.task, data="held-out")
        figures |= {"metric": cut.metric, "loss": cut.loss}
        if self.grid.finetune is None:
            return figures
        start = time.perf_counter()
        model = finetune(
            model,
            self.case.train,
            self.grid.finetune,
            teacher=self.case.model if self.grid.finetune.distill else None,
            task=self.task,
            seed=self.seed,
            checkpoint_dir=folder / "finetune",
            taken=taken,
        )
        figures["finetune_seconds"] = time.perf_counter() - start
        tuned = evaluate(model, self.case.held_out, task=self.task, data="held-out")
        return {**figures, "tuned_metric": tuned.metric, "tuned_loss": tuned.loss}
