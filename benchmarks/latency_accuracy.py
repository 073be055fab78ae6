"""Compares budgets of the latency with budgets of the MACs that end at the same measured latency.

    python -m benchmarks.latency_accuracy digits-vit-small
    python -m benchmarks.latency_accuracy cifar10-vit-small --data DIR

For each seed, one plan has a budget of the latency. Others have budgets of the MACs with different roundings. Their
fractions are corrected by measured times too, until they take the same time. Then all plans are measured once more, in
one go. The accuracy on test images is given as cut and after fine-tuning. The dense model and random scores are in the
table too.

The result is docs/results/latency-accuracy-NAME.json.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import xprune
from benchmarks.record import record
from benchmarks.workloads import LIMITS, WORKLOADS, dense, first, splits
from xprune.core.interfaces import Selected
from xprune.costs.on_target import OnTarget
from xprune.costs.realised import corrected
from xprune.pipeline import Run

ROUNDINGS = (1, 8, 16)
"""The multiples of features of the plans with a budget of the MACs."""


def plans(run: Run, on_target: OnTarget, scores: xprune.Scores, share: float, images: int) -> dict[str, Selected]:
    """Returns the plans by their names in the table. All take about the same time."""
    budget = xprune.Budget(latency=share, target=xprune.Target(batch=images))
    found = {"latency": run.select(scores, budget)}
    for rounding in ROUNDINGS:

        def choose(fraction: float, rounding: int = rounding) -> Selected:
            """Returns the plan for a fraction of the MACs."""
            return run.select(scores, xprune.Budget(macs=fraction, round_to=rounding))

        def measure(selected: Selected) -> float:
            """Returns the measured fraction of the dense model's time."""
            return on_target.times(selected.plan).relative(1)

        counts: Callable[[Selected], object] = lambda selected: selected.plan.counts  # noqa: E731
        least = run.costs.least(xprune.Budget(macs=1.0, round_to=rounding)) * 1.001
        try:
            found[f"MACs, round_to={rounding}"] = corrected(choose, measure, share, least, counts)[-1].chosen
        except xprune.BudgetError as error:
            print(f"MACs, round_to={rounding}: {error}", flush=True)
    return found


def main(
    name: Annotated[str, typer.Argument(help=", ".join(WORKLOADS))],
    data: Annotated[Path | None, typer.Option(help="folder with the packed images; digits need none")] = None,
    cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense"),
    share: Annotated[float, typer.Option(help="budget: fraction of the dense model's time")] = 0.6,
    images: Annotated[int, typer.Option(help="images in a batch whose time is measured")] = 64,
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 3,
    criterion: Annotated[list[str] | None, typer.Option(help="criterion, can be repeated")] = None,
) -> None:
    """Measures all plans and records them."""
    # The models are tiny. With several threads, the threads spend their time waiting for each other.
    torch.set_num_threads(1)
    workload, cells = WORKLOADS[name], []
    for seed in range(seeds):
        found, model = splits(workload, data, seed), dense(name, data, seed, cache)
        train, test = found.train, found.test
        if workload.data in LIMITS:
            train, test = (first(loader, n) for loader, n in zip((train, test), LIMITS[workload.data], strict=True))
        stem = ["patch_embed.*"] if workload.data != "digits" else []
        run = Run(model, train, test, exclude=stem, latency=False)
        on_target = OnTarget(model, run.first[0], xprune.Target(batch=images))
        cells.append({"criterion": "dense", "plan": "-", "seed": seed, "cut": run.dense.metric})
        for each in criterion or ("taylor", "random"):
            scores = run.score(each, seed=seed)
            chosen = plans(run, on_target, scores, share, images)
            for plan_name, selected in chosen.items():
                pruned = run.cut(selected)
                times = [on_target.times(selected.plan).relative(1) for _ in range(3)]
                row = {"criterion": each, "plan": plan_name, "seed": seed, "realised": statistics.median(times)}
                row["macs"] = run.costs.fraction(xprune.Budget(macs=1.0), selected.plan.counts)
                row["cut"] = run.measure(pruned).metric
                row["tuned"] = run.measure(run.finetune(pruned, workload.tune, seed=seed)).metric
                print(row, flush=True)
                cells.append(row)
    record(f"latency-accuracy-{name}", table(cells), f"accuracy at {share:g} of the dense time", cells=cells)


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each criterion and plan, with means over the seeds and standard deviations."""
    rows = []
    for key in dict.fromkeys((cell["criterion"], cell["plan"]) for cell in cells):
        same = [cell for cell in cells if (cell["criterion"], cell["plan"]) == key]
        row: dict[str, Any] = {"criterion": key[0], "plan": key[1], "seeds": len(same)}
        for field in ("realised", "macs", "cut", "tuned"):
            values = [cell[field] for cell in same if field in cell]
            factor = 100 if field in ("cut", "tuned") else 1
            mean = statistics.mean(values) * factor if values else None
            spread = statistics.stdev(values) * factor if len(values) > 1 else 0.0
            row[field] = (
                None if mean is None else f"{mean:.{1 if factor > 1 else 3}f} ± {spread:.{1 if factor > 1 else 3}f}"
            )
        rows.append(row)
    return rows


if __name__ == "__main__":
    typer.run(main)
