"""Runs a comparison: a grid of criteria, selections, budgets and seeds, all with the same model and data.

Each combination in the grid is a cell. A cell is saved as soon as it has run. If the program was killed, the next call
continues with the first cell that is not saved.
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
from xprune.modules.forward import error_text
from xprune.pipeline import Run
from xprune.selections import SELECTIONS
from xprune.training.finetune import Finetune
from xprune.training.runtime import is_main_process, stage

FILE = "comparison.json"
"""The name of the file with the results. `compare` writes it in the folder `out`."""
RUNNING = ".xprune-running"
"""The name of the folder for the checkpoints of the cell that is running. `compare` removes it at the end.

The name begins with a dot and contains "xprune", so that no other program uses the same folder.
"""


@dataclass(frozen=True)
class Case:
    """The model and the data of a comparison.

    Args:
        model: The dense model. It is not changed.
        train: Training batches. Criteria, selections and fine-tuning use them.
        held_out: Batches on which the metrics are measured. They are used for nothing else.
        sites: The sites that may lose units. None means the sites that `find_sites` finds with the first training
            batch.
        units: The unit kinds to find. None means the kinds that `find_sites` finds by default. This argument is used
            only if `sites` is None.
        exclude: Patterns of the names of sites that keep all units. This argument is used only if `sites` is None.
        inside: Patterns of the part of the model to prune, such as ["vision_model.*"], see `find_sites`. Budgets with
            `of="part"` are fractions of the cost of this part. If you give `sites`, do not give `inside`.

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
    inside: str | Sequence[str] = ()


Peer = Callable[[Case, Budget, int], nn.Module]
"""A pruner of another library: a function of a case, a budget and a seed that returns a pruned model.

It must not fine-tune the model. The comparison fine-tunes all models with the same settings.
"""


@dataclass(frozen=True)
class Grid:
    """The criteria, selections, budgets and seeds to compare. Each combination of them is a cell.

    Args:
        criteria: The criteria, by the name to show in the table. Each is a name from `xprune.CRITERIA`, which may be
            followed by settings, or an instance.
        selections: The selections, by the name to show in the table. Each is a name from `xprune.SELECTIONS`, which may
            be followed by settings, or an instance.
        budgets: The budgets. Each says how much the pruned model may cost.
        seeds: The seeds. All other combinations are run once for each seed.
        finetune: The settings of fine-tuning. They are the same for all cells and for the dense model. If a selection
            trains weights, its updates are subtracted from those of fine-tuning. None means that no model is
            fine-tuned.
        peers: Pruners of other libraries, by the name to show in the table. See `Peer`. They are not combined with the
            selections.
        task: Reads batches and computes the loss and the metric. None means classification of (inputs, labels).
        faithfulness: If True, faithfulness is measured for each criterion with class-wise scores. The result is
            "deletion_gap" in the rows: how much more of the metric a class loses than other classes, if the units that
            it needs most are removed. This takes 14 forward passes over the held-out batches for each criterion. If
            False, it is not measured.

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
    """Prunes a model in all combinations of a grid, and saves each result in the file `out`/comparison.json.

    A cell is one combination. All cells of a seed start from the same dense model and make the same number of updates
    of the weights. The first cell is the dense model itself. The scores of a criterion are computed once for all
    selections. They are also computed once for all budgets, unless the criterion learns for one budget.

    First, it prints one line: which share of the model's MACs the units cover, and what was left alone and why.

    If the file contains the result of a cell already, the cell is not run again. This is so only if nothing has
    changed: the weights and the structure of the dense model, the sites, the data, the task, and all settings. If
    something has changed, the cell is run, and its old row moves to the entry "others" of the file. If everything is as
    before in a later call, the old row is shown again.

    Args:
        case: The model and the data. If each seed has its own model or data, a function that returns the case for a
            seed. It is called for all seeds, even if the results of a seed are in the file. The function has to be
            called to find out whether these results are still valid.
        grid: The criteria, selections, budgets and seeds.
        out: The folder for the results. It is created if it does not exist.
        **settings: Data to save with the results, such as the name of the data set. JSON must be able to hold them.
            Results with other settings need another folder.

    Returns:
        The comparison. It contains the rows of the file for this case and these settings. If `case` is a function,
        these are only rows for the seeds of the grid. Otherwise they include rows for seeds, criteria and budgets that
        the grid does not contain.

    Raises:
        ArtefactError: The folder cannot be used, the file is not the file of a comparison, or it was made with other
            `settings` or other settings of fine-tuning.
        PluginError: A criterion or a selection is unknown. This error is raised before any cell is run.
        BudgetError: No plan can meet one of the budgets.
        DataError: The grid has no seeds, or a loader does not fit the task.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> grid = xprune.Grid({"chance": "random", "norm": "magnitude"}, seeds=(0,), finetune=None)
        >>> found = compare(xprune.Case(model, batches, batches), grid, "results")
        Units cover 96 % of the model's MACs (2 sites). No module was left alone.
        seed 0: dense
        seed 0: chance global macs 0.5
        seed 0: norm global macs 0.5
        >>> [row["macs"] <= 0.5 for row in found.rows]
        [False, True, True]
    """
    # Raises PluginError for an unknown name before any cell is run.
    for name, kinds, base, label in (
        *((c, CRITERIA, Criterion, "criterion") for c in grid.criteria.values()),
        *((s, SELECTIONS, Selection, "selection") for s in grid.selections.values()),
    ):
        resolve(name, kinds, base, label)
    if not grid.seeds:
        raise DataError("the grid has no seeds: give at least one, for example seeds=(0, 1, 2).")
    folder = Path(out)
    _check_out(folder)
    # Files of older versions have no key "faithfulness". So the key is left out if faithfulness is not measured.
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
                inside=now.inside,
                latency=False,
                resources=tuple(dict.fromkeys(name for budget in grid.budgets for name in budget.limited)),
            )
            for budget in grid.budgets:
                # Raises BudgetError for an impossible budget before any cell of this seed is run.
                run.costs.limits(budget)
            kept.set_subject(seed if callable(case) else None, subject(run))
            kept.set_coverage(seed, run.coverage)
        cells = _Seed(now, run, grid, seed, folder / RUNNING, kept.subject(seed) or "")
        for key in _keys(grid, seed):
            made_by, digest = _made_by(grid, key), _digest(grid, key)
            if not kept.has(key, digest):
                get_console().print(f"seed {seed}: {key[1]} {key[2]} {key[3]}", highlight=False, soft_wrap=True)
                of_names = {part: names[name] for part, names, name in _names_in_cell(named, key) if name in names}
                made = {"made_by": made_by, "settings": of_names}
                kept.add(key, digest, {**made, **cells.cell(digest, *key[1:])})
    # The criterion and the selection of a line do not depend on the seed. So any seed will do here, such as 0.
    kept.hide({key[1:3] for key in _keys(grid, 0)}, named)
    if is_main_process():
        _clear(folder / RUNNING)
    return kept.comparison()


def _check_out(folder: Path) -> None:
    """Raises ArtefactError if no file can be written to the folder. It is called before any cell is run."""
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file, wanted a folder for the results. Give another name.")
    # If the folder does not exist, the nearest existing parent folder has to be writable.
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise ArtefactError(f"{folder} cannot be written to. Give another folder.")


def _clear(running: Path) -> None:
    """Removes the checkpoints of cells that were killed, and the folders that are empty then."""
    # In reverse order, a folder comes after its files. A file that xprune did not write stays, and so does its folder.
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
    """Yields the key of every cell of a seed. In this order, cells with the same scores come one after another."""
    yield seed, "dense", "", ""
    for criterion in grid.criteria:
        for budget in grid.budgets:
            for selection in grid.selections:
                yield seed, criterion, selection, budget_name(budget)
    for peer in grid.peers:
        for budget in grid.budgets:
            yield seed, peer, "its own", budget_name(budget)


def _made_by(grid: Grid, key: Key) -> str:
    """Returns a text with the criterion and the selection of a cell and all their settings.

    The text is empty for the dense model and for pruners of other libraries.
    """
    if key[1] not in grid.criteria:
        return ""
    criterion = resolve(grid.criteria[key[1]], CRITERIA, Criterion, "criterion")
    return f"{criterion!r}, {resolve(grid.selections[key[2]], SELECTIONS, Selection, 'selection')!r}"


def _names_in_cell(named: Mapping[str, Mapping[str, str]], key: Key) -> list[tuple[str, Mapping[str, str], str]]:
    """Returns the names in a cell whose settings the file records: the criterion's name and the selection's name.

    Args:
        named: The result of `_digests_of_names`.
        key: The key of the cell.

    Returns:
        Two tuples (part, digests, name). `part` is "criterion" or "selection", `digests` holds the digest of every name
        of this part in the grid, and `name` is the name in this cell.
    """
    return [("criterion", named["criterion"], key[1]), ("selection", named["selection"], key[2])]


def _digests_of_names(grid: Grid) -> dict[str, dict[str, str]]:
    """Returns a digest of the settings that each name in the grid means.

    Returns:
        A dict with two dicts. "criterion": the digest for each name of a criterion or a peer. "selection": the digest
        for each name of a selection.
    """
    criteria = {name: resolve(kind, CRITERIA, Criterion, "criterion") for name, kind in grid.criteria.items()}
    selections = {name: resolve(kind, SELECTIONS, Selection, "selection") for name, kind in grid.selections.items()}
    parts: dict[str, Mapping[str, Any]] = {"criterion": {**criteria, **grid.peers}, "selection": selections}
    return {part: {name: cell_digest({"is": kind}) for name, kind in kinds.items()} for part, kinds in parts.items()}


def _digest(grid: Grid, key: Key) -> str:
    """Returns a digest of all settings of a cell. The model and the data are not part of it: see `subject`."""
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
    """Runs the cells of one seed.

    Args:
        case: The model and the data. Pruners of other libraries get them.
        run: The run that all cells of the seed share.
        grid: The criteria, selections and budgets.
        seed: The seed.
        running: The folder for the checkpoints of the cell that is running.
        subject: The digest of the model and the data.
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
            The results, with the keys that `Cells` describes.
        """
        # The name of the folder contains both digests. So a cell does not find the checkpoints of another cell.
        folder = self.running / f"{self.seed}-{self.subject}-{digest}"
        if criterion == "dense":
            return self._figures(self.run.model, folder, 0)
        if criterion in self.grid.peers:
            start = time.perf_counter()
            try:
                pruned = self.grid.peers[criterion](self.case, self.budgets[budget], self.seed)
            except Exception as error:
                # A failure of another library is saved as the result of this cell, and the next cell is run.
                return {"failed": error_text(error)}
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
        """Returns the scores of a criterion, and how many seconds their computation took.

        The scores of the last criterion are kept, so they are computed once for all selections. They are also used for
        all budgets, unless the criterion learns for one budget.

        Args:
            criterion: The name of the criterion.
            budget: The name of the budget.
            folder: The folder for checkpoints.
        """
        chosen: Criterion = resolve(self.grid.criteria[criterion], CRITERIA, Criterion, "criterion")
        key = criterion, chosen.budget_key(self.budgets[budget])
        if key not in self.scores:
            # All cells share the measured costs. So they are measured before the time of this criterion starts.
            _ = self.run.costs
            start = time.perf_counter()
            found = self.run.score(chosen, self.budgets[budget], seed=self.seed, checkpoint_dir=folder / "score")
            # Only the last scores are kept, because earlier ones are not needed again in the order of `_keys`.
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
            model: The pruned model, or the dense model.
            folder: The folder for checkpoints.
            taken: The number of updates of the weights that the selection has used.

        Returns:
            A dict with the metric, the loss and the costs after surgery. If the grid asks for fine-tuning, also the
            metric and the loss after fine-tuning.
        """
        dense = self.run.dense
        cut = dense if model is self.run.model else self.run.measure(model)
        figures: dict[str, Any] = {name: share(cost, dense.costs.get(name)) for name, cost in cut.costs.items()}
        figures |= {"updates_before": taken, "metric": cut.metric, "loss": cut.loss}
        # Rows of accuracies have no such keys, as in files of older versions.
        named = {
            "metric_name": cut.metric_name,
            "higher_is_better": cut.higher_is_better,
            "percent": self.run.task.percent,
        }
        usual = {"metric_name": "accuracy", "higher_is_better": True, "percent": True}
        figures |= {key: value for key, value in named.items() if value != usual[key]}
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
    """Returns a cost as a fraction of the dense model's cost. Returns NaN if one of them is not known, or `whole` is 0.

    Args:
        part: The cost of the pruned model. None if it is not known.
        whole: The cost of the dense model. None if it is not known.
    """
    return part / whole if part is not None and whole else math.nan
