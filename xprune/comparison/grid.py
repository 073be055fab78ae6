"""compare: a grid of criteria x selections x budgets x seeds, every cell on the same terms, kept cell by cell."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import get_console
from torch import nn

from xprune.comparison.cell_file import CellFile, Key
from xprune.comparison.keys import cell_digest, subject
from xprune.comparison.table import Comparison
from xprune.core.budget import Budget
from xprune.core.interfaces import Criterion, Selection
from xprune.core.registry import resolve
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.task import Task
from xprune.criteria import CRITERIA
from xprune.errors import ArtefactError, DataError
from xprune.explain.deletion import faithfulness
from xprune.pipeline import Run
from xprune.selections import SELECTIONS
from xprune.training.finetune import Finetune
from xprune.training.runtime import is_main_process, stage

FILE = "comparison.json"
RUNNING = ".xprune-running"  # removed at the end, so the name has to be nobody else's


@dataclass(frozen=True)
class Case:
    """What one seed of a comparison runs on.

    Args:
        model: Dense. It is not changed.
        train: Batches that scores, thresholds and weights learn from.
        held_out: Batches that figures are measured on, which train and choose nothing.
        sites: What may be pruned. None: what `find_sites` finds on the first training batch.
        units: Kinds of unit to look for, where `sites` is None.
        exclude: Patterns of site names to leave alone, where `sites` is None.
    """

    model: nn.Module
    train: Iterable[Any]
    held_out: Iterable[Any]
    sites: Sequence[Site] | None = None
    units: Sequence[str] | None = None
    exclude: Sequence[str] = ()


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


@stage()
def compare(case: Case | Callable[[int], Case], grid: Grid, out: str | Path, **settings: Any) -> Comparison:
    """Runs the cells of the grid that `out`/comparison.json does not have yet, dense first, and keeps each one there.

    A cell is taken from the file only where all that made it is the same: the dense weights and the model's structure,
    the sites, the data, the task, and every setting. What differs is run under a key of its own. The rows that were
    there before stay in the file, under "others", and are not shown. They are shown again once they match again.

    Every cell of a seed starts from the same dense model and has as many updates of weights. Scores are taken once
    for all selections, and once for all budgets where the criterion does not learn at one.

    Args:
        case: One for all seeds, or a function of the seed. It is made for every seed, to tell what the cells are of.
        grid: What is compared.
        out: A directory, which is made where it is not there.
        settings: Plain data to write down beside the results: which data, which recipe.

    Returns:
        The rows that belong to this case and this recipe. Of a case for all seeds: those of all its seeds, criteria
        and budgets that the file has. Of a function of the seed: those of the grid's seeds.

    Raises:
        ArtefactError: The file is not a comparison, or was made with other `settings` or another fine-tuning.
        PluginError: A criterion or selection is not known. Nothing has run then.
    """
    for name, kinds, base, label in (
        *((c, CRITERIA, Criterion, "criterion") for c in grid.criteria.values()),
        *((s, SELECTIONS, Selection, "selection") for s in grid.selections.values()),
    ):
        resolve(name, kinds, base, label)
    if not grid.seeds:
        raise DataError("the grid has no seeds: give at least one, for example seeds=(0, 1, 2).")
    folder = Path(out)
    _check_out(folder)
    more = {"faithfulness": True} if grid.faithfulness else {}
    kept = CellFile(folder / FILE, {"finetune": asdict(grid.finetune) if grid.finetune else None, **more, **settings})
    named = _named(grid)
    run: Run | None = None
    for seed in grid.seeds:
        if callable(case) or run is None:
            now = case(seed) if callable(case) else case
            run = Run(
                now.model,
                now.train,
                now.held_out,
                task=grid.task,
                sites=now.sites,
                units=now.units,
                exclude=now.exclude,
                latency=False,
                resources=tuple(dict.fromkeys(name for budget in grid.budgets for name in budget.shares)),
            )
            for budget in grid.budgets:
                run.costs.limits(budget)  # what cannot be reached is said before any cell runs
            kept.tell(seed if callable(case) else None, subject(run))
        cells = _Seed(now, run, grid, seed, folder / RUNNING, kept.subject(seed) or "")
        for key in _keys(grid, seed):
            made_by, digest = _made_by(grid, key), _digest(grid, key)
            if not kept.has(key, digest):
                get_console().print(f"seed {seed}: {key[1]} {key[2]} {key[3]}", highlight=False, soft_wrap=True)
                of_names = {part: names[name] for part, names, name in _of(named, key) if name in names}
                made = {"made_by": made_by, "settings": of_names}
                kept.add(key, digest, {**made, **cells.cell(digest, *key[1:])})
    kept.hide({key[1:3] for key in _keys(grid, 0)}, named)
    if is_main_process():
        _clear(folder / RUNNING)
    return kept.comparison()


def _check_out(folder: Path) -> None:
    """Raises ArtefactError, before anything runs, where no file can be written to the folder."""
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file, wanted a folder for the results: give another name.")
    standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(standing, os.W_OK):
        raise ArtefactError(f"{folder} cannot be written to: give another folder.")


def _clear(running: Path) -> None:
    """Removes what killed cells have left: our own checkpoints, and folders that are then empty."""
    for path in sorted(running.rglob("*"), reverse=True):
        if path.name.lstrip(".").startswith("checkpoint.safetensors"):
            path.unlink(missing_ok=True)
        elif path.is_dir():
            with suppress(OSError):
                path.rmdir()
    with suppress(OSError):
        running.rmdir()


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


def _of(named: Mapping[str, Mapping[str, str]], key: Key) -> list[tuple[str, Mapping[str, str], str]]:
    """(part, what its names stand for, its name in this cell) of the criterion and the selection."""
    return [("criterion", named["criterion"], key[1]), ("selection", named["selection"], key[2])]


def _named(grid: Grid) -> dict[str, dict[str, str]]:
    """What the names of the grid stand for: criteria (and peers) and selections, by a digest of each."""
    criteria = {name: resolve(kind, CRITERIA, Criterion, "criterion") for name, kind in grid.criteria.items()}
    selections = {name: resolve(kind, SELECTIONS, Selection, "selection") for name, kind in grid.selections.items()}
    parts: dict[str, Mapping[str, Any]] = {"criterion": {**criteria, **grid.peers}, "selection": selections}
    return {part: {name: cell_digest({"is": kind}) for name, kind in kinds.items()} for part, kinds in parts.items()}


def _digest(grid: Grid, key: Key) -> str:
    """A name for the settings of a cell: what makes it beside the model and the data."""
    seed, criterion, selection, budget = key
    parts: dict[str, Any] = {"seed": seed, "finetune": grid.finetune}
    if criterion in grid.criteria:
        parts["criterion"] = resolve(grid.criteria[criterion], CRITERIA, Criterion, "criterion")
        parts["selection"] = resolve(grid.selections[selection], SELECTIONS, Selection, "selection")
        parts["faithfulness"] = grid.faithfulness
    elif criterion in grid.peers:
        parts["peer"] = grid.peers[criterion]
    parts["budget"] = next((each for each in grid.budgets if budget_name(each) == budget), None)
    return cell_digest(parts)


class _Seed:
    """The cells of one seed."""

    def __init__(self, case: Case, run: Run, grid: Grid, seed: int, running: Path, subject: str) -> None:
        self.subject = subject
        self.case, self.run, self.grid, self.seed, self.running = case, run, grid, seed, running
        self.budgets = {budget_name(budget): budget for budget in grid.budgets}
        self.scores: dict[tuple[str, str], Scores] = {}
        self.gap: dict[str, float] = {}

    def cell(self, digest: str, criterion: str, selection: str, budget: str) -> dict[str, Any]:
        """The figures of one cell; `digest` names its settings, so that another cell's checkpoints are not met."""
        folder = self.running / f"{self.seed}-{self.subject}-{digest}"
        if criterion == "dense":
            return self._figures(self.run.model, folder, 0)
        if criterion in self.grid.peers:
            start = time.perf_counter()
            try:
                pruned = self.grid.peers[criterion](self.case, self.budgets[budget], self.seed)
            except Exception as error:  # another library's failure is a result, not the end of the grid
                return {"failed": f"{type(error).__name__}: {error}"}
            return {"score_seconds": time.perf_counter() - start, **self._figures(pruned, folder, 0)}
        scores, seconds = self._scores(criterion, budget, folder)
        start = time.perf_counter()
        selected = self.run.select(
            scores,
            self.budgets[budget],
            self.grid.selections[selection],
            self.grid.finetune,
            seed=self.seed,
            checkpoint_dir=folder / "select",
        )
        pruned = self.run.cut(selected)
        times = {**self.gap, "score_seconds": seconds, "select_seconds": time.perf_counter() - start}
        return {**times, "kept": list(selected.plan.counts), **self._figures(pruned, folder, selected.updates)}

    def _scores(self, criterion: str, budget: str, folder: Path) -> tuple[Scores, float]:
        """(scores, seconds they took)."""
        chosen: Criterion = resolve(self.grid.criteria[criterion], CRITERIA, Criterion, "criterion")
        key = criterion, budget if chosen.at_budget else ""
        if key not in self.scores:
            _ = self.run.costs  # measured once for all cells: no criterion's seconds
            start = time.perf_counter()
            found = self.run.score(chosen, self.budgets[budget], seed=self.seed, checkpoint_dir=folder / "score")
            self.scores = {key: found}  # the ones before are not asked for again
            self._took = time.perf_counter() - start
            self.gap = {}
            if self.grid.faithfulness and found.classwise is not None:
                curves = faithfulness(
                    self.run.model,
                    found,
                    self.run.data,
                    insertion=False,
                    chance=0,
                    agnostic=False,
                    task=self.run.task,
                    seed=self.seed,
                )
                self.gap = {"deletion_gap": curves.gap}
        return self.scores[key], self._took

    def _figures(self, model: nn.Module, folder: Path, taken: int) -> dict[str, Any]:
        """Metric and cost, as cut and fine-tuned."""
        dense = self.run.dense
        cut = dense if model is self.run.model else self.run.measure(model)
        figures: dict[str, Any] = {name: share(cost, dense.costs.get(name)) for name, cost in cut.costs.items()}
        figures |= {"updates_before": taken, "metric": cut.metric, "loss": cut.loss}
        if self.grid.finetune is None:
            return figures
        start = time.perf_counter()
        model = self.run.finetune(
            model, self.grid.finetune, taken=taken, seed=self.seed, checkpoint_dir=folder / "finetune"
        )
        figures["finetune_seconds"] = time.perf_counter() - start
        tuned = self.run.measure(model, like=cut)
        return {**figures, "tuned_metric": tuned.metric, "tuned_loss": tuned.loss}


def share(part: float | None, whole: float | None) -> float:
    """A cost as a share of the dense model's; NaN where one of them was not measured."""
    return part / whole if part is not None and whole else math.nan
