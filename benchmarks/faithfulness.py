"""Measures whether class-wise scores are faithful.

    python -m benchmarks.faithfulness digits-vit --seed 0 --seed 1 --seed 2 --cache DIR [--data DIR]

Scores are faithful if a class loses accuracy when the units that it needs most are removed, and other classes lose
less. Scores are computed on training images. The losses are measured on test images. Nothing is fine-tuned.

The result is docs/results/faithfulness.json, with one row for each seed, criterion and order of the units. The deletion
gap is the accuracy that the class loses minus the accuracy that the other classes lose, when its units are removed.
The insertion gap is the accuracy that the others lose minus the accuracy that the class loses, when only its units
are kept. Both are means over the classes and over the shares of units. `macs` is the budget at which masks were
learned. The benchmark adds its rows to the file, and replaces rows of the same workload, seed, criterion and order.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import xprune
from benchmarks.record import RESULTS, record
from benchmarks.workloads import WORKLOADS, dense, first, splits
from xprune.criteria.xpruner.criterion import XPruner
from xprune.explain import agreement, faithfulness
from xprune.explain.deletion import ORDERS

LIMITS = {"cifar10": (10_000, 2_000)}
"""Numbers of images by data set: training images for the scores, and test images for the measurement."""
REFERENCE = "taylor"
"""The criterion that the order of every other criterion is correlated with."""
CRITERIA: dict[str, Any] = {
    "taylor": "taylor",
    "integrated gradients": "captum:IntegratedGradients,batches=10",
    "xpruner, one-vs-rest": XPruner(),
    "xpruner, one-vs-rest-kept": XPruner(objective="one-vs-rest-kept"),
    "xpruner, label": XPruner(objective="label"),
    "xpruner, random-row": XPruner(objective="random-row"),
}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(WORKLOADS))] = "digits-vit",
    data: Annotated[Path | None, typer.Option(help="folder with the packed images; digits need none")] = None,
    cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense"),
    seed: Annotated[list[int] | None, typer.Option(help="can be repeated; default: 0, 1 and 2")] = None,
    macs: Annotated[float, typer.Option(help="budget at which masks are learned, as a share of the dense MACs")] = 0.5,
    criterion: Annotated[
        list[str] | None, typer.Option(help="a name from CRITERIA, can be repeated; default: all")
    ] = None,
) -> None:
    """Measures every seed and criterion, and adds the rows to the recorded ones."""
    torch.set_num_threads(1)
    start = time.time()
    rows = [row for number in seed or (0, 1, 2) for row in _rows(name, data, cache, number, macs, criterion)]
    file = RESULTS / "faithfulness.json"
    done = {_key(row) for row in rows}
    if file.is_file():
        others = [row for row in json.loads(file.read_text())["rows"] if _key(row) not in done]
        rows = sorted([*others, *rows], key=_key)
    about = (
        "what a class loses beyond the other classes, by deletion and insertion, on test images, without fine-tuning"
    )
    note = f"The rows were measured at several times. The last ones took {time.time() - start:.0f} s"
    record("faithfulness", rows, about, limits=LIMITS, note=note)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what tells one row of the file from another."""
    return row["workload"], row["seed"], row["criterion"], row["order"]


def _rows(
    name: str, data: Path | None, cache: Path, seed: int, macs: float, some: list[str] | None
) -> list[dict[str, Any]]:
    """Measures the wanted criteria, or all if `some` is None, on one dense model. Returns the rows."""
    workload = WORKLOADS[name]
    limits, loaders, model = LIMITS.get(workload.data), splits(workload, data, seed), dense(name, data, seed, cache)
    train, test = loaders.train, loaders.test
    if limits:
        train, test = (first(loader, n) for loader, n in zip((train, test), limits, strict=True))
    # The hidden layers of the convolutional stem are left out, as in benchmarks.proof.
    stem = ["patch_embed.*"] if workload.data != "digits" else []
    sites = xprune.find_sites(model, next(iter(test))[0][:2], exclude=stem)
    scores, seconds = {}, {}
    wanted = some or list(CRITERIA)
    for label in dict.fromkeys([REFERENCE, *wanted]):
        start = time.time()
        scores[label] = xprune.score(model, sites, train, CRITERIA[label], budget=xprune.Budget(macs=macs), seed=seed)
        seconds[label] = time.time() - start
        print(name, seed, label, f"{seconds[label]:.0f} s", flush=True)
    reference, rows = scores[REFERENCE], []
    for label in wanted:
        for order in ORDERS:
            # Random orders are the same for every criterion, so they are measured once.
            control = label == REFERENCE and order == "scores"
            result = faithfulness(
                model, scores[label], test, order=order, chance=3 * control, agnostic=control, others=2, seed=seed
            )
            ranks = torch.tensor(list(agreement(scores[label], reference, order).values())).nanmean()
            common = {"workload": name, "seed": seed, "macs": macs}
            row = {"criterion": label, "order": order, "deletion gap": result.gap}
            row |= {"insertion gap": result.insertion_gap, "rank correlation with taylor": float(ranks)}
            rows.append({**common, **row, "score seconds": round(seconds[label], 1)})
            if control:
                gap = sum(curves.gap for curves in result.chance) / 3
                for title, value in (("chance", gap), ("taylor, one order for all classes", result.agnostic.gap)):
                    none = {"insertion gap": None, "rank correlation with taylor": None, "score seconds": None}
                    rows.append({**common, "criterion": title, "order": "scores", "deletion gap": value, **none})
            print(*row.values(), flush=True)
    return rows


if __name__ == "__main__":
    typer.run(main)
