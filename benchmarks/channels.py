"""Residual channels: what pruning them too is worth, at the same MACs, on the same terms.

    python -m benchmarks.channels cifar10-vit --data DIR

Each criterion with heads and neurons alone and with channels too, the same fine-tuning, every cell kept as it ends.
"""

from collections.abc import Iterator
from dataclasses import asdict
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
    for criteria, each in ((criteria, each) for criteria in CRITERIA for each in seed or (0, 1, 2)):
        for kind, case in _cases(name, data, cache, each):
            grid = xprune.Grid(criteria, budgets=BUDGETS, seeds=(each,), finetune=workload.tune)
            command = f"python -m benchmarks.channels {name} --data DIR"
            found = xprune.compare(case, grid, folder / kind, command=command, units=list(UNITS[kind]), **settings)
            (folder / kind / "table.md").write_text(found.markdown())


def _cases(name: str, data: Path | None, cache: Path, seed: int) -> Iterator[tuple[str, xprune.Case]]:
    """The same dense model and batches, with heads and neurons to prune, and with channels too."""
    workload = WORKLOADS[name]
    found, model = splits(workload, data, seed), dense(name, data, seed, cache)
    loaders = found.train, found.test
    if workload.data in LIMITS:
        loaders = tuple(first(loader, n) for loader, n in zip(loaders, LIMITS[workload.data], strict=True))
    inputs = next(iter(loaders[1]))[0][:2]
    for kind, units in UNITS.items():
        yield kind, xprune.Case(model, *loaders, xprune.find_sites(model, inputs, units=units))


if __name__ == "__main__":
    typer.run(main)
