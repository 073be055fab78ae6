"""Whether class-wise scores are true: what a class loses, beyond the others, when the units it needs most go.

    python -m benchmarks.faithfulness digits-vit --seed 0 --seed 1 --seed 2 --cache DIR [--data DIR]

Scores see training images, curves are of test images, nothing is fine-tuned; `macs` of a row is the budget that masks
were learned at. A row for each seed, criterion and order: the mean over classes and shares of deleted units of (the
class's drop - the others' drop) in accuracy; for insertion, of (the others' drop - the class's). Rows of other
workloads, seeds and criteria that the file has stay in it.
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
"""Training images that scores see, and test images that curves are measured on."""
REFERENCE = "taylor"
"""What criteria are correlated with."""
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
    data: Annotated[Path | None, typer.Option(help="folder with the packed images")] = None,
    cache: Annotated[Path, typer.Option(help="where dense weights are kept")] = Path("dense"),
    seed: Annotated[list[int] | None, typer.Option(help="repeatable, default 0, 1, 2")] = None,
    macs: Annotated[float, typer.Option(help="budget that masks are learned at")] = 0.5,
    criterion: Annotated[list[str] | None, typer.Option(help="of CRITERIA, repeatable, default all")] = None,
) -> None:
    """Measures every seed and criterion, and records them."""
    torch.set_num_threads(1)
    start = time.time()
    rows = [row for number in seed or (0, 1, 2) for row in _rows(name, data, cache, number, macs, criterion)]
    path = RESULTS / "faithfulness.json"
    done = {_key(row) for row in rows}
    if path.is_file():
        others = [row for row in json.loads(path.read_text())["rows"] if _key(row) not in done]
        rows = sorted([*others, *rows], key=_key)
    about = "class-specific deletion and insertion gaps on test images, no fine-tuning"
    note = f"rows of several runs; the last one took {time.time() - start:.0f} s"
    record("faithfulness", rows, about, limits=LIMITS, note=note)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["workload"], row["seed"], row["criterion"], row["order"]


def _rows(
    name: str, data: Path | None, cache: Path, seed: int, macs: float, some: list[str] | None
) -> list[dict[str, Any]]:
    workload = WORKLOADS[name]
    limits, loaders, model = LIMITS.get(workload.data), splits(workload, data, seed), dense(name, data, seed, cache)
    train, test = loaders.train, loaders.test
    if limits:
        train, test = (first(loader, n) for loader, n in zip((train, test), limits, strict=True))
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
            control = label == REFERENCE and order == "scores"  # the same for every criterion
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
                for what, value in (("chance", gap), ("taylor, one order for all classes", result.agnostic.gap)):
                    none = {"insertion gap": None, "rank correlation with taylor": None, "score seconds": None}
                    rows.append({**common, "criterion": what, "order": "scores", "deletion gap": value, **none})
            print(*row.values(), flush=True)
    return rows


if __name__ == "__main__":
    typer.run(main)
