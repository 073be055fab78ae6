"""Compares pruning with and without residual channels, at the same MACs.

    python -m benchmarks.channels cifar10-swin --data DIR

Each criterion prunes the same dense models twice: only heads and neurons, then also the channels of the residual
stream. Data, budget and fine-tuning are the same. The result is docs/results/channels-NAME/without and .../with, each
with comparison.json and table.md. Each cell of the table is written when it is done, so a stopped benchmark continues.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

import xprune
from benchmarks.record import RESULTS
from benchmarks.workloads import LIMITS, WORKLOADS, dense, first, splits

UNITS = {"without": ("head", "neuron"), "with": ("head", "neuron", "channel")}
BUDGETS = (xprune.Budget(macs=0.3),)
# Two grids: the quick criteria are done, with and without channels, before the slow one starts.
CRITERIA = ({"magnitude": "magnitude", "taylor": "taylor", "random": "random"}, {"xpruner": "xpruner"})


def main(
    name: Annotated[str, typer.Argument(help=", ".join(WORKLOADS))],
    data: Annotated[Path | None, typer.Option(help="folder with the packed images; digits need none")] = None,
    cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense"),
    seed: Annotated[list[int] | None, typer.Option(help="can be repeated; default: 0, 1 and 2")] = None,
) -> None:
    """Runs the cells that are missing, with and without channels in turn, and writes both tables."""
    # The models are tiny. With several threads, the threads spend their time waiting for each other.
    torch.set_num_threads(1)
    workload, folder = WORKLOADS[name], RESULTS / f"channels-{name}"
    settings = {"workload": name, "dense": asdict(workload.dense), "limits": LIMITS.get(workload.data)}
    for criteria, kind in itertools.product(CRITERIA, UNITS):
        grid = xprune.Grid(criteria, budgets=BUDGETS, seeds=tuple(seed or (0, 1, 2)), finetune=workload.tune)
        command = f"python -m benchmarks.channels {name} --data DIR"
        case = partial(_case, name, data, cache, UNITS[kind])
        found = xprune.compare(case, grid, folder / kind, command=command, units=list(UNITS[kind]), **settings)
        (folder / kind / "table.md").write_text(found.markdown())


def _case(name: str, data: Path | None, cache: Path, units: Sequence[str], seed: int) -> xprune.Case:
    """Returns the dense model and the batches of a seed, to prune units of these kinds."""
    workload = WORKLOADS[name]
    found, model = splits(workload, data, seed), dense(name, data, seed, cache)
    loaders = found.train, found.test
    if workload.data in LIMITS:
        loaders = tuple(first(loader, n) for loader, n in zip(loaders, LIMITS[workload.data], strict=True))
    return xprune.Case(model, *loaders, units=units)


if __name__ == "__main__":
    typer.run(main)
