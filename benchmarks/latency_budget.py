"""Measures whether budgets of the latency are met, and how long the latency table takes.

    python -m benchmarks.latency_budget [--device cuda --dtype bfloat16 --batch 256] [--compiled] [--only deit]

For each model, batch and budget, a plan is made with Budget(latency=...), and the pruned model is then measured five
times more, in turn with the dense model. The goal: the median of the five is at least 0.95 and at most 1.03 times what
was asked for. Units are scored by magnitude, since speed depends on their numbers only. Weights are random.

On a GPU with the options above, the whole run takes less than 8 minutes. The result is
docs/results/latency-budget-DEVICE.json. Each cell is also written to the file given by --log, and found there again.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import xprune
from benchmarks.record import record
from benchmarks.workloads import Stem
from xprune.core.plan import Plan
from xprune.costs.stopwatch import Stopwatch

REPEATS = 5


def with_conv_stem() -> nn.Module:
    """Returns a ViT of the size of DeiT-S whose patches come from strided convolutions."""
    options = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return VisionTransformer(img_size=224, patch_size=16, num_classes=1000, embed_layer=Stem, **options)


MODELS = {
    "DeiT-S": lambda: timm.create_model("deit_small_patch16_224"),
    "Swin-T": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "ViT-S, convolutional stem": with_conv_stem,
}
TABLE_ONLY = {"DeiT-B": lambda: timm.create_model("deit_base_patch16_224")}


def cell(model: nn.Module, share: float, target: xprune.Target, inputs: torch.Tensor) -> dict[str, Any]:
    """Prunes a model to a fraction of its time, and measures the result five times."""
    start = time.perf_counter()
    scores = xprune.score(model, xprune.find_sites(model, inputs), criterion="magnitude")
    budget = xprune.Budget(latency=share, target=target)
    try:
        plan: Plan = xprune.select(model, scores, budget, example_inputs=inputs)
    except xprune.BudgetError as error:
        return {"realised": None, "error": str(error)[:160]}
    seconds = time.perf_counter() - start
    watch, pruned = Stopwatch(target, model, inputs), xprune.apply(model, plan, inputs)
    again = [watch.compare(pruned, seconds=4.0) for _ in range(REPEATS)]
    found = [times.relative(1) for times in again]
    middle = statistics.median(found)
    costs = xprune.measure_costs(model, scores.sites, inputs)
    return {
        "dense_ms": round(again[0].median(0), 1),
        "realised": round(middle, 4),
        "of_asked": round(middle / share, 3),
        "least": round(min(found), 4),
        "most": round(max(found), 4),
        "macs": round(costs.fraction(xprune.Budget(macs=0.5), plan.counts), 3),
        "tries": len(plan.info["latency"]["tried"]),
        "first_try": round(plan.info["latency"]["tried"][0][1], 4),
        "met": bool(0.95 * share <= middle <= 1.03 * share),
        "seconds": round(seconds, 1),
    }


def main(
    device: Annotated[str, typer.Option(help="device of the models")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the models")] = "float32",
    batch: Annotated[
        list[int] | None, typer.Option(help="images in a batch, can be repeated. 1 and 16 if none")
    ] = None,
    share: Annotated[list[float] | None, typer.Option(help="budget, can be repeated. 0.8, 0.6, 0.5 if none")] = None,
    compiled: Annotated[bool, typer.Option(help="measure compiled models too")] = False,
    only: Annotated[str, typer.Option(help="only models whose name contains this")] = "",
    log: Annotated[Path | None, typer.Option(help="file in which finished cells are kept")] = None,
    table: Annotated[bool, typer.Option(help="measure the table of DeiT-B too")] = True,
) -> None:
    """Measures all cells and records them."""
    known = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    rows: list[dict[str, Any]] = []

    def kept(key: dict[str, Any], make: Any) -> None:
        """Adds a row, which is measured unless the file holds it."""
        row = next((each for each in known if all(each.get(name) == value for name, value in key.items())), None)
        if row is None:
            row = {**key, **make()}
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        rows.append(row)

    for name, build in MODELS.items():
        if only.lower() not in name.lower():
            continue
        torch.manual_seed(0)
        model = build().eval().to(device, getattr(torch, dtype))
        inputs = torch.randn(2, 3, 224, 224, device=device, dtype=getattr(torch, dtype))
        for images in batch or (1, 16):
            for is_compiled in (False, True) if compiled else (False,):
                target = xprune.Target(batch=images, compiled=is_compiled)
                for asked in share or (0.8, 0.6, 0.5):
                    key = {"model": name, "batch": images, "compiled": is_compiled, "asked": asked}
                    kept(key, lambda m=model, a=asked, t=target, x=inputs: cell(m, a, t, x))
    tables = []
    if table:
        for name, build in TABLE_ONLY.items():
            model = build().eval().to(device, getattr(torch, dtype))
            inputs = torch.randn(2, 3, 224, 224, device=device, dtype=getattr(torch, dtype))
            found = xprune.profile(model, inputs, xprune.Target(batch=(batch or [16])[-1]))
            tables.append({"model": name, "batch": found.target.batch, "seconds": round(found.seconds, 1)})
            print(tables, flush=True)
    name = f"latency-budget-{torch.device(device).type}"
    record(name, rows, "budgets of the latency, and the measured latency of the pruned model", tables=tables)


if __name__ == "__main__":
    typer.run(main)
