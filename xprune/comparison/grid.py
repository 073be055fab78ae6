"""Runs a comparison: a grid of criteria, selections, budgets and seeds, all on the same model and data.

Each cell of the grid is saved as soon as it has run. A comparison that was killed continues with the next cell.
"""

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
"""The name of the file with the results, in the folder that `compare` is given."""
RUNNING = ".xprune-running"
"""The name of the folder for checkpoints of the cell that runs. It is removed at the end, so no one else may use it."""


@dataclass(frozen=True)
class Case:
    """The model and the data of a comparison.

    Args:
        model: The dense model. It is not changed.
        train: Batches that criteria, selections and fine-tuning look at or learn from.
        held_out: Batches on which the metrics are measured. Nothing learns from them or chooses by them.
        sites: The sites that may lose units. None: those that `find_sites` finds with the first training batch.
        units: Unit kinds to look for. None: those that `find_sites` looks for by default. Used only if `sites` is None.
        exclude: Patterns of names of sites that keep all units. Used only if `sites` is None.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> case = xprune.Case(model, train=batches, held_out=batches, units=["neuron"])
    """

    model: nn.Module
    train: Iterable[Any]
    held_out: Iterable[Any]
    sites: Sequence[Site] | None = None
    units: Sequence[str] | None = None
    exclude: Sequence[str] = ()


Peer = Callable[[Case, Budget, int], nn.Module]
"""A pruner of another library: a function of a case, a budget and a seed that returns a pruned model.

The model is not fine-tuned: the comparison does that with the same settings for all.
"""


@dataclass(frozen=True)
class Grid:
    """The criteria, selections, budgets and seeds to compare. Each combination of them is a cell.

    Args:
        criteria: Name in the table -> a criterion: a name from `xprune.CRITERIA`, also with settings, or an instance.
        selections: Name in the table -> a selection: a name from `xprune.SELECTIONS`, also with settings, or an
            instance.
        budgets: How much the pruned models may cost.
        seeds: A cell is run for each seed.
        finetune: Settings of fine-tuning, the same for all cells and for the dense model. If a selection trains
            weights, its updates are subtracted from fine-tuning's. None: nothing is fine-tuned.
        peers: Name in the table -> a pruner of another library, see `Peer`. It makes its own selection.
        task: Reads a batch, and computes the loss and the metric. None: classification of (inputs, labels).
        faithfulness: True: for each criterion with class-wise scores, also measures on the held-out batches how much
            more a class loses than the others if the units that it needs most are removed. This is "deletion_gap" in
            the rows. It takes 14 passes over the held-out batches for each criterion. False: does not.

    Example:
        >>> import xprune
        >>> grid = xprune.Grid(
        ...     criteria={"chance": "random", "Taylor": "taylor", "Taylor, signed": "taylor,kind=abs"},
        ...     selections={"global": "global", "uniform": "uniform"},
        ...     budgets=(xprune.Budget(macs=0.7), xprune.Budget(macs=0.5)),
        ... )
        >>> len(grid.criteria) * len(grid.selections) * len(grid.budgets) * len(grid.seeds)
        36
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
    """Runs all cells of a grid, and saves each result in `out`/comparison.json.

    All cells of a seed start from the same dense model and make the same number of updates of the weights. The dense
    model is the first cell. Scores are computed once for all selections. They are computed once for all budgets too,
    unless the criterion learns at a budget.

    A cell that is in the file already is not run again. This holds only if all that it was made from is the same: the
    weights and the structure of the dense model, the sites, the data, the task, and all settings. If something differs,
    the cell is run. The old row stays in the file under "others". It is shown again when all matches again.

    Args:
        case: The model and the data. Or a function that makes them from a seed, if each seed has its own. It is called
            for all seeds, also if their cells are in the file, because only then they can be compared with the file.
        grid: The criteria, selections, budgets and seeds.
        out: The folder for the results. It is made if it does not exist.
        **settings: Plain data to save with the results, such as the name of the data set. Results with other settings
            need another folder.

    Returns:
        The rows that belong to this case and these settings. One case for all seeds: all such rows of the file, also
        for seeds, criteria and budgets that the grid does not have. A function of the seed: only rows of the grid's
        seeds.

    Raises:
        ArtefactError: The folder cannot be used, its file is not a comparison, or the file was made with other
            `settings` or other fine-tuning.
        PluginError: A criterion or a selection is unknown. Nothing has run then.
        BudgetError: A budget cannot be met.
        DataError: The grid has no seeds, or a loader does not fit the task.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> grid = xprune.Grid({"chance": "random", "norm": "magnitude"}, seeds=(0,), finetune=None)
        >>> found = compare(xprune.Case(model, batches, batches), grid, "results")
        seed 0: dense
        seed 0: chance global macs 0.5
        seed 0: norm global macs 0.5
        >>> [row["macs"] <= 0.5 for row in found.rows]
        [False, True, True]
    """
    # Unknown names are refused before anything runs.
    for name, kinds, base, label in (
        *((c, CRITERIA, Criterion, "criterion") for c in grid.criteria.values()),
        *((s, SELECTIONS, Selection, "selection") for s in grid.selections.values()),
    ):
        resolve(name, kinds, base, label)
    if not grid.seeds:
        raise DataError("the grid has no seeds: give at least one, for example seeds=(0, 1, 2).")
    folder = Path(out)
    _check_out(folder)
    # A grid without faithfulness has no such key, as files of older versions have none.
    extra = {"faithfulness": True} if grid.faithfulness else {}
    kept = CellFile(folder / FILE, {"finetune": asdict(grid.finetune) if grid.finetune else None, **extra, **settings})
    named = _digests_of_names(grid)
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
                # Raises BudgetError for a budget that cannot be met, before any cell runs.
                run.costs.limits(budget)
            kept.set_subject(seed if callable(case) else None, subject(run))
        cells = _Seed(now, run, grid, seed, folder / RUNNING, kept.subject(seed) or "")
        for key in _keys(grid, seed):
            made_by, digest = _made_by(grid, key), _digest(grid, key)
            if not kept.has(key, digest):
                get_console().print(f"seed {seed}: {key[1]} {key[2]} {key[3]}", highlight=False, soft_wrap=True)
                of_names = {part: names[name] for part, names, name in _names_in_cell(named, key) if name in names}
                made = {"made_by": made_by, "settings": of_names}
                kept.add(key, digest, {**made, **cells.cell(digest, *key[1:])})
    # Criteria and selections of a line do not depend on the seed: 0 is any seed.
    kept.hide({key[1:3] for key in _keys(grid, 0)}, named)
    if is_main_process():
        _clear(folder / RUNNING)
    return kept.comparison()


def _check_out(folder: Path) -> None:
    """Raises ArtefactError, before anything runs, if no file can be written to the folder."""
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file, wanted a folder for the results. Give another name.")
    # The folder may be new. Then the nearest parent that exists has to be writable.
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise ArtefactError(f"{folder} cannot be written to. Give another folder.")


def _clear(running: Path) -> None:
    """Removes the checkpoints that killed cells have left, and the folders that are empty then."""
    # In reverse order, a folder comes after its files. A file that is not ours stays, and its folder with it.
    for path in sorted(running.rglob("*"), reverse=True):
        if path.name.lstrip(".").startswith("checkpoint.safetensors"):
            path.unlink(missing_ok=True)
        elif path.is_dir():
            with suppress(OSError):
                path.rmdir()
    with suppress(OSError):
        running.rmdir()


def budget_name(budget: Budget) -> str:
    """Returns the name of a budget in tables, such as "macs 0.5" or "params 0.3"."""
    return budget.name


def _keys(grid: Grid, seed: int) -> Iterator[Key]:
    """Yields the key of every cell of a seed, in an order in which neighbouring cells can share scores."""
    yield seed, "dense", "", ""
    for criterion in grid.criteria:
        for budget in grid.budgets:
            for selection in grid.selections:
                yield seed, criterion, selection, budget_name(budget)
    for peer in grid.peers:
        for budget in grid.budgets:
            yield seed, peer, "its own", budget_name(budget)


def _made_by(grid: Grid, key: Key) -> str:
    """Returns the criterion and the selection of a cell with all settings, as text. Empty for dense and peers."""
    if key[1] not in grid.criteria:
        return ""
    criterion = resolve(grid.criteria[key[1]], CRITERIA, Criterion, "criterion")
    return f"{criterion!r}, {resolve(grid.selections[key[2]], SELECTIONS, Selection, 'selection')!r}"


def _names_in_cell(named: Mapping[str, Mapping[str, str]], key: Key) -> list[tuple[str, Mapping[str, str], str]]:
    """Returns two triples: "criterion" or "selection", the digests of all its names, and its name in this cell."""
    return [("criterion", named["criterion"], key[1]), ("selection", named["selection"], key[2])]


def _digests_of_names(grid: Grid) -> dict[str, dict[str, str]]:
    """Returns a digest of the settings behind each name of the grid.

    Returns:
        "criterion": name -> digest, for criteria and peers. "selection": name -> digest.
    """
    criteria = {name: resolve(kind, CRITERIA, Criterion, "criterion") for name, kind in grid.criteria.items()}
    selections = {name: resolve(kind, SELECTIONS, Selection, "selection") for name, kind in grid.selections.items()}
    parts: dict[str, Mapping[str, Any]] = {"criterion": {**criteria, **grid.peers}, "selection": selections}
    return {part: {name: cell_digest({"is": kind}) for name, kind in kinds.items()} for part, kinds in parts.items()}


def _digest(grid: Grid, key: Key) -> str:
    """Returns a digest of all settings of a cell. The model and the data are in its subject."""
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
    """The cells of one seed, and how each of them is run.

    Args:
        case: The model and the data, for peers.
        run: The run that all cells share.
        grid: The criteria, selections and budgets.
        seed: The seed.
        running: Folder for checkpoints of the cell that runs.
        subject: Digest of the model and the data.
    """

    def __init__(self, case: Case, run: Run, grid: Grid, seed: int, running: Path, subject: str) -> None:
        self.subject = subject
        self.case, self.run, self.grid, self.seed, self.running = case, run, grid, seed, running
        self.budgets = {budget_name(budget): budget for budget in grid.budgets}
        self.scores: dict[tuple[str, str], Scores] = {}
        self.gap: dict[str, float] = {}

    def cell(self, digest: str, criterion: str, selection: str, budget: str) -> dict[str, Any]:
        """Runs one cell.

        Args:
            digest: The digest of the settings of the cell.
            criterion: The name of the criterion or the peer, or "dense".
            selection: The name of the selection.
            budget: The name of the budget.

        Returns:
            The results, as `Cells` describes them.
        """
        # The folder has the digests in its name, so a cell never finds the checkpoints of another cell.
        folder = self.running / f"{self.seed}-{self.subject}-{digest}"
        if criterion == "dense":
            return self._figures(self.run.model, folder, 0)
        if criterion in self.grid.peers:
            start = time.perf_counter()
            try:
                pruned = self.grid.peers[criterion](self.case, self.budgets[budget], self.seed)
            except Exception as error:
                # The failure of another library is a result. The rest of the grid still runs.
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
        """Returns the scores of a criterion, and the seconds that they took.

        Scores of the last criterion are kept, so they are computed once for all selections. They serve all budgets,
        unless the criterion learns at a budget.
        """
        chosen: Criterion = resolve(self.grid.criteria[criterion], CRITERIA, Criterion, "criterion")
        key = criterion, budget if chosen.at_budget else ""
        if key not in self.scores:
            # The costs are measured before the clock starts: all cells share them, so no criterion pays for them.
            _ = self.run.costs
            start = time.perf_counter()
            found = self.run.score(chosen, self.budgets[budget], seed=self.seed, checkpoint_dir=folder / "score")
            # Only the last scores are kept: in the order of `_keys`, earlier ones are not needed again.
            self.scores = {key: found}
            self._seconds = time.perf_counter() - start
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
        return self.scores[key], self._seconds

    def _figures(self, model: nn.Module, folder: Path, taken: int) -> dict[str, Any]:
        """Measures a pruned model, fine-tunes it, and measures it again.

        Args:
            model: The pruned model, or the dense one.
            folder: Folder for checkpoints.
            taken: Updates of the weights that the selection has used.

        Returns:
            The metric, the loss and the costs after surgery. The metric and the loss after fine-tuning, if any.
        """
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
    """Returns a cost as a share of the dense model's cost. NaN if one is not known, or the latter is 0."""
    return part / whole if part is not None and whole else math.nan
