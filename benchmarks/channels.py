"""Residual channels: what pruning them too is worth, at the same MACs, on the same terms.

    python -m benchmarks.channels cifar10-vit --data DIR

Each criterion with heads and neurons alone and with channels too, the same fine-tuning, every cell kept as it ends.
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
CRITERIA = ({"magnitude": "magnitude", "taylor": "taylor", "random": "random"}, {"xpruner": "xpruner"})


def main(
    name: Annotated[str, typer.Argument(help=", ".join(WORKLOADS))],
    data: Annotated[Path | None, typer.Option(help="folder with the packed images")] = None,
    cache: Annotated[Path, typer.Option(help="where dense weights are kept")] = Path("dense"),
    seed: Annotated[list[int] | None, typer.Option(help="repeatable, default 0, 1, 2")] = None,
) -> None:
    """Runs the cells that are not there yet, with and without channels in turn, and writes a table of each."""
    torch.set_num_threads(1)  # tiny operations on several threads slow each other down
    workload, folder = WORKLOADS[name], RESULTS / f"channels-{name}"
    settings = {"workload": name, "dense": asdict(workload.dense), "limits": LIMITS.get(workload.data)}
    for criteria, kind in itertools.product(CRITERIA, UNITS):
        grid = xprune.Grid(criteria, budgets=BUDGETS, seeds=tuple(seed or (0, 1, 2)), finetune=workload.tune)
        command = f"python -m benchmarks.channels {name} --data DIR"
        case = partial(_case, name, data, cache, UNITS[kind])
        found = xprune.compare(case, grid, folder / kind, command=command, units=list(UNITS[kind]), **settings)
        (folder / kind / "table.md").write_text(found.markdown())


def _case(name: str, data: Path | None, cache: Path, units: Sequence[str], seed: int) -> xprune.Case:
    """A seed's dense model and batches, with units of these kinds to prune."""
    workload = WORKLOADS[name]
    found, model = splits(workload, data, seed), dense(name, data, seed, cache)
    loaders = found.train, found.test
    if workload.data in LIMITS:
        loaders = tuple(first(loader, n) for loader, n in zip(loaders, LIMITS[workload.data], strict=True))
    return xprune.Case(model, *loaders, units=units)


if __name__ == "__main__":
    typer.run(main)
