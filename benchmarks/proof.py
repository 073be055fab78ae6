"""Compares criteria, selections and other pruning libraries at the same MACs, with three seeds.

    python -m benchmarks.proof digits-vit
    python -m benchmarks.proof digits-vit --ablation
    python -m benchmarks.proof cifar10-vit --data DIR
    python -m benchmarks.proof cifar10-swin --data DIR --distilled

Every method starts from the same dense models and gets the same data, budgets and fine-tuning. The dense model and
random scores are in the table too. The figure is the accuracy on test images, before and after fine-tuning.

--ablation changes one setting of the masks or of the learned thresholds at a time, without fine-tuning. --distilled
fine-tunes with the labels and the outputs of the dense model, at half of the MACs.

The result is docs/results/proof-NAME, ablation-NAME or distilled-NAME, with comparison.json, table.md and accuracy.png.
Each cell of the table is written when it is done, so a stopped benchmark continues.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import xprune
from benchmarks.fastnas import fastnas_peers
from benchmarks.peers import peers
from benchmarks.record import RESULTS
from benchmarks.workloads import LIMITS, WORKLOADS, dense, first, splits
from xprune.criteria.captum.methods import IntegratedGradients
from xprune.criteria.xpruner.criterion import XPruner

SEEDS = (0, 1, 2)
LEARNED: dict[str, Any] = {
    "learned, frozen": xprune.LearnedThresholds(weights="frozen"),
    "learned, joint": xprune.LearnedThresholds(weights="joint"),
}
FAST: dict[str, Any] = {"random": "random", "magnitude": "magnitude", "taylor": "taylor"}


def grids(name: str) -> list[xprune.Grid]:
    """Returns the comparisons of a workload. They run in this order, and each runs all seeds before the next starts."""
    tune = WORKLOADS[name].tune

    def grid(criteria: Mapping[str, Any], selections: Mapping[str, Any], *shares: float, **more: Any) -> xprune.Grid:
        budgets = tuple(xprune.Budget(macs=share) for share in shares)
        return xprune.Grid(criteria, selections, budgets, SEEDS, tune, **more)

    if name == "digits-vit":
        criteria = {**FAST, "integrated gradients": "captum:IntegratedGradients", "xpruner": "xpruner"}
        plain, shares = {"uniform": "uniform", "global": "global"}, (0.15, 0.3, 0.5)
        return [
            grid(criteria, plain, *shares, peers=peers()),
            *(grid(criteria, LEARNED, share) for share in shares),
            grid({}, {}, 0.5, peers=fastnas_peers()),
        ]
    # The larger data sets get fewer cells, so that two CPU cores can run them.
    criteria = {**FAST, "integrated gradients": IntegratedGradients(batches=10), "xpruner": "xpruner"}
    theirs = {label: peer for label, peer in peers().items() if "isomorphic" in label}
    some = {label: criteria[label] for label in ("random", "taylor", "xpruner")}
    return [
        grid(criteria, {"global": "global"}, 0.3, peers=theirs),
        grid(criteria, {"global": "global"}, 0.5, peers={**theirs, **fastnas_peers()}),
        grid(some, LEARNED, 0.3),
        grid(some, {"uniform": "uniform"}, 0.3),
    ]


def ablations() -> list[xprune.Grid]:
    """Returns comparisons in which one setting at a time differs from the default.

    The settings are those of the masks of X-Pruner and the slope of learned thresholds. "rows alone" are masks of
    classes without the mask that classes share. Their mean or maximum makes the plan.
    """
    rows: dict[str, Any] = {"shared": 0.0, "aggregate": "mean"}
    masks = {
        "as they are": XPruner(),
        "shared steps alone": XPruner(shared=1.0),
        "l1 sparsity": XPruner(sparsity="l1"),
        "l2 sparsity": XPruner(sparsity="l2"),
        "lambda_sparse 0.03": XPruner(lambda_sparse=0.03),
        "lambda_sparse 0.3": XPruner(lambda_sparse=0.3),
        "lambda_sparse 3": XPruner(lambda_sparse=3.0),
        "lambda_smooth 10, units": XPruner(lambda_smooth=10.0, smoothness="units"),
        "rows alone: one-vs-rest": XPruner(**rows),
        "rows alone: one-vs-rest-kept": XPruner(objective="one-vs-rest-kept", **rows),
        "rows alone: one-vs-rest-kept, max": XPruner(objective="one-vs-rest-kept", shared=0.0, aggregate="max"),
        "rows alone: random-row": XPruner(objective="random-row", **rows),
        "rows alone: label, the paper's": XPruner(objective="label", **rows),
        "rows alone: label, lambda_smooth 10": XPruner(objective="label", lambda_smooth=10.0, **rows),
    }
    slopes = {
        f"learned, slope {a:g} to {b:g}": xprune.LearnedThresholds(weights="frozen", slope=(a, b))
        for a, b in ((5.0, 5.0), (10.0, 50.0), (50.0, 50.0), (200.0, 200.0))
    }
    # With a larger budget, all settings are equally good on digits.
    budgets = (xprune.Budget(macs=0.15),)
    return [
        xprune.Grid(masks, {"global": "global"}, budgets, SEEDS, None),
        xprune.Grid({"taylor": "taylor"}, {"global": "global", **slopes}, budgets, SEEDS, None),
    ]


def distilled(name: str) -> list[xprune.Grid]:
    """Returns a comparison at half of the MACs. All fine-tuning also learns from the outputs of the dense model."""
    tune, theirs = replace(WORKLOADS[name].tune, distill=0.9), peers()
    theirs = {label: peer for label, peer in theirs.items() if "isomorphic" in label}
    criteria, budgets = {**FAST, "xpruner": "xpruner"}, (xprune.Budget(macs=0.5),)
    return [xprune.Grid(criteria, {"global": "global"}, budgets, SEEDS, tune, theirs)]


def main(
    name: Annotated[str, typer.Argument(help=", ".join(WORKLOADS))],
    data: Annotated[Path | None, typer.Option(help="folder with the packed images; digits need none")] = None,
    cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense"),
    out: Annotated[Path | None, typer.Option(help="folder for the result; default: docs/results/proof-NAME")] = None,
    ablation: Annotated[
        bool, typer.Option(help="compare settings of masks and thresholds, without fine-tuning")
    ] = False,
    teach: Annotated[
        bool, typer.Option("--distilled", help="fine-tune with the outputs of the dense model, at half of the MACs")
    ] = False,
) -> None:
    """Trains the dense models that are missing, runs the cells that are missing, and draws table and picture."""
    # The models are tiny. With several threads, the threads spend their time waiting for each other.
    torch.set_num_threads(1)
    prefix = "ablation" if ablation else "distilled" if teach else "proof"
    workload, folder = WORKLOADS[name], out or RESULTS / f"{prefix}-{name}"

    def case(seed: int) -> xprune.Case:
        """Returns the dense model, batches and sites of a seed."""
        found = splits(workload, data, seed)
        model = dense(name, data, seed, cache)
        train, held_out = found.train, found.test
        if workload.data in LIMITS:
            train, held_out = (
                first(loader, n) for loader, n in zip((train, held_out), LIMITS[workload.data], strict=True)
            )
        inputs = next(iter(held_out))[0][:2]
        # Not every library can prune the convolutional stem, so it is left out for all.
        stem = ["patch_embed.*"] if workload.data != "digits" else []
        return xprune.Case(model, train, held_out, xprune.find_sites(model, inputs, exclude=stem))

    settings = {"workload": name, "dense": asdict(workload.dense), "limits": LIMITS.get(workload.data)}
    flags = [*["--ablation"] * ablation, *["--distilled"] * teach, *["--data DIR"] * bool(data)]
    settings["command"] = " ".join(["python -m benchmarks.proof", name, *flags])
    for grid in ablations() if ablation else distilled(name) if teach else grids(name):
        comparison = xprune.compare(case, grid, folder, **settings)
    (folder / "table.md").write_text(comparison.markdown())
    comparison.plot(folder / "accuracy.png")


if __name__ == "__main__":
    typer.run(main)
