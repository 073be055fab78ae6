"""Measures how much time a pruned model saves, compared with the MACs that it saves.

    python -m benchmarks.latency [--rounds 30]

gain = (dense time / pruned time) / (dense MACs / pruned MACs). A gain of 1 means that time falls as much as MACs do.
The goal is a gain of 0.9 at half of the MACs. The dense model and the pruned models take turns, so they see the same
load of the machine. Times are medians. Units are removed at random, since speed depends on their number only.

The result is docs/results/latency-cpu.json, or latency-cuda.json if there is a GPU.
"""

import statistics
import time
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

import xprune
from benchmarks.record import record

NAMES = ("deit_small_patch16_224", "swin_tiny_patch4_window7_224")
BUDGETS = {
    "uniform": ("uniform", xprune.Budget(macs=0.5)),
    "uniform, round_to 8": ("uniform", xprune.Budget(macs=0.5, round_to=8)),
    "global": ("global", xprune.Budget(macs=0.5)),
    "global, round_to 8": ("global", xprune.Budget(macs=0.5, round_to=8)),
}


@torch.inference_mode()
def alternate(models: list[nn.Module], x: Tensor, rounds: int) -> list[list[float]]:
    """Returns the milliseconds of each forward pass of each model. The models take turns."""
    times: list[list[float]] = [[] for _ in models]
    # The first three turns are not counted: libraries load and allocate then.
    for turn in range(rounds + 3):
        for index, model in enumerate(models):
            _wait()
            start = time.perf_counter()
            model(x)
            _wait()
            if turn >= 3:
                times[index].append((time.perf_counter() - start) * 1e3)
    return times


def _wait() -> None:
    """Waits until the GPU has done its work. Without a GPU, does nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(
    rounds: Annotated[int, typer.Option(help="measurements of each model")] = 30,
    batch: Annotated[int, typer.Option(help="images in a batch")] = 16,
) -> None:
    """Measures on the GPU, or on the CPU if there is none, and records the result."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        torch.manual_seed(0)
        dense = timm.create_model(name).eval().to(device)
        x = torch.randn(batch, 3, 224, 224, device=device)
        sites = xprune.find_sites(dense, x[:2])
        scores = xprune.score(dense, sites, criterion="random")
        pruned = {}
        for title, (selection, budget) in BUDGETS.items():
            plan = xprune.select(dense, scores, budget, selection, example_inputs=x[:2])
            pruned[title] = xprune.apply(dense, plan, x[:2])
        times = alternate([dense, *pruned.values()], x, rounds)
        macs, reference = xprune.count_macs(dense, x[:2]), statistics.median(times[0])
        for (title, model), taken in zip(pruned.items(), times[1:], strict=True):
            share, median = xprune.count_macs(model, x[:2]) / macs, statistics.median(taken)
            speedup = [a / b for a, b in zip(times[0], taken, strict=True)]
            quartiles = statistics.quantiles(speedup, n=4)
            row = {"model": name, "selection": title, "MACs": share, "dense ms": reference, "pruned ms": median}
            row |= {"speed-up": reference / median, "quartiles": f"{quartiles[0]:.2f} to {quartiles[2]:.2f}"}
            rows.append(row | {"gain": reference / median * share})
    about = f"time saved for the MACs saved, batch {batch}, {device}, medians of {rounds} rounds. Goal: a gain of 0.9"
    record(f"latency-{device}", rows, about, rounds=rounds, batch=batch, goal=0.9)


if __name__ == "__main__":
    typer.run(main)
