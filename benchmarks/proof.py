"""The proofs: every criterion and selection, dense, chance and other libraries, on the same terms, three seeds.

python -m benchmarks.proof digits-vit
python -m benchmarks.proof digits-vit --ablation       # settings of masks and thresholds, no fine-tuning
python -m benchmarks.proof cifar10-vit --data DIR
python -m benchmarks.proof cifar10-swin --data DIR --distilled      # fine-tuning that the dense model teaches
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
    """What is run, in this order, each over all seeds before the next."""
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
    """The paper's ablation: one setting away from ours at a time, plans of classes' rows, the slope of thresholds."""
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
    budgets = (xprune.Budget(macs=0.15),)  # milder ones part nothing on digits
    return [
        xprune.Grid(masks, {"global": "global"}, budgets, SEEDS, None),
        xprune.Grid({"taylor": "taylor"}, {"global": "global", **slopes}, budgets, SEEDS, None),
    ]


def distilled(name: str) -> list[xprune.Grid]:
    """Half of the MACs, the same fine-tuning with the dense model's outputs beside the labels, for every side."""
    tune, theirs = replace(WORKLOADS[name].tune, distill=0.9), peers()
    theirs = {label: peer for label, peer in theirs.items() if "isomorphic" in label}
    criteria, budgets = {**FAST, "xpruner": "xpruner"}, (xprune.Budget(macs=0.5),)
    return [xprune.Grid(criteria, {"global": "global"}, budgets, SEEDS, tune, theirs)]


def main(
    name: Annotated[str, typer.Argument(help=", ".join(WORKLOADS))],
    data: Annotated[Path | None, typer.Option(help="folder with the packed images")] = None,
    cache: Annotated[Path, typer.Option(help="where dense weights are kept")] = Path("dense"),
    out: Annotated[Path | None, typer.Option(help="docs/results/proof-NAME where not given")] = None,
    ablation: Annotated[bool, typer.Option(help="settings of masks and thresholds instead")] = False,
    teach: Annotated[bool, typer.Option("--distilled", help="fine-tune by distillation, at half of the MACs")] = False,
) -> None:
    """Trains what dense models are missing, runs the grids from where they stopped, and draws the picture."""
    torch.set_num_threads(1)  # tiny operations on several threads slow each other down
    what = "ablation" if ablation else "distilled" if teach else "proof"
    workload, folder = WORKLOADS[name], out or RESULTS / f"{what}-{name}"

    def case(seed: int) -> xprune.Case:
        found = splits(workload, data, seed)
        model = dense(name, data, seed, cache)
        train, held_out = found.train, found.test
        if workload.data in LIMITS:
            train, held_out = (
                first(loader, n) for loader, n in zip((train, held_out), LIMITS[workload.data], strict=True)
            )
        inputs = next(iter(held_out))[0][:2]
        stem = ["patch_embed.*"] if workload.data != "digits" else []  # of which not every side knows
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
