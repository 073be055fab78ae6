"""Compares masks that are learned once for any budget with masks that are learned anew at each budget.

    python -m benchmarks.elastic digits-vit-small
    python -m benchmarks.elastic cifar10-vit-small --data DIR
    python -m benchmarks.elastic cifar10-swin-small --data DIR
    python -m benchmarks.elastic cifar10-vit-small --data DIR --trial

The figure is the accuracy as cut, without fine-tuning, at 50, 30 and 20 % of the MACs, for three seeds. Both kinds of
masks take the same number of steps, and all steps train the row that classes share. The masks for any budget take them
once, the others once for each budget. The dense model, Taylor scores and random scores are in the table too.

--trial measures on validation images, which settings are chosen with. It also has masks that differ in one setting.

The result is docs/results/elastic-NAME or build/elastic-trial-NAME, with comparison.json and table.md. Each cell is
written when it is done, so a stopped benchmark continues.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import xprune
from benchmarks.record import RESULTS
from benchmarks.workloads import LIMITS, WORKLOADS, dense, first, splits
from xprune.criteria.xpruner.criterion import XPruner

SHARES = (0.5, 0.3, 0.2)
STEPS = 400
"""Steps of the shared row. They are as many as `XPruner()` takes: 600 steps, of which two thirds are shared."""


def criteria(trial: bool) -> dict[str, Any]:
    """Returns the criteria by the names in the table."""
    each = XPruner(steps=STEPS, shared=1.0)
    found: dict[str, Any] = {
        "random": "random",
        "taylor": "taylor",
        "masks, each budget": each,
        "masks, any budget": XPruner(steps=STEPS, shared=1.0, budgets="any"),
    }
    if trial:
        found["masks of 50 %, used for all"] = XPruner(steps=STEPS, shared=1.0)
    return found


def main(
    name: Annotated[str, typer.Argument(help=", ".join(WORKLOADS))],
    data: Annotated[Path | None, typer.Option(help="folder with the packed images; digits need none")] = None,
    cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense"),
    out: Annotated[Path | None, typer.Option(help="folder for the result; default: see above")] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 3,
    trial: Annotated[bool, typer.Option(help="measure on validation images, to choose settings")] = False,
) -> None:
    """Trains the dense models that are missing, runs the cells that are missing, and writes the table."""
    # The models are tiny. With several threads, the threads spend their time waiting for each other.
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    folder = out or (Path("build") / f"elastic-trial-{name}" if trial else RESULTS / f"elastic-{name}")

    def case(seed: int) -> xprune.Case:
        """Returns the dense model, batches and sites of a seed."""
        found, model = splits(workload, data, seed), dense(name, data, seed, cache)
        train, held_out = found.train, found.val if trial else found.test
        if workload.data in LIMITS:
            train, held_out = (
                first(loader, n) for loader, n in zip((train, held_out), LIMITS[workload.data], strict=True)
            )
        inputs = next(iter(held_out))[0][:2]
        stem = ["patch_embed.*"] if workload.data != "digits" else []
        return xprune.Case(model, train, held_out, xprune.find_sites(model, inputs, exclude=stem))

    settings = {"workload": name, "dense": asdict(workload.dense), "limits": LIMITS.get(workload.data)}
    flags = [*["--data DIR"] * bool(data), *["--trial"] * trial]
    settings["command"] = " ".join(["python -m benchmarks.elastic", name, *flags])
    budgets = tuple(xprune.Budget(macs=share) for share in SHARES)
    grid = xprune.Grid(criteria(trial), budgets=budgets, seeds=tuple(range(seeds)), finetune=None)
    comparison = xprune.compare(case, grid, folder, **settings)
    (folder / "table.md").write_text(comparison.markdown())
    comparison.plot(folder / "accuracy.png")


if __name__ == "__main__":
    typer.run(main)
