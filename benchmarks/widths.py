"""Measures whether the MLP of a transformer gets faster if its number of neurons is a multiple.

    python -m benchmarks.widths
    python -m benchmarks.widths --device cuda --dtype bfloat16 --images 256

The MLP is that of DeiT-S (384 to 1536 to 384) on the tokens of one image and of 16 images. Random numbers of neurons
are rounded up to multiples, and all these MLPs are timed in turn. A row says how much longer a neuron takes on average
than in the MLPs that are not rounded: a multiple helps if the value is below 1. `Budget(round_to="auto")` rests on it.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.record import record
from xprune.core.target import Target
from xprune.costs.stopwatch import Stopwatch

WIDTH, HIDDEN, TOKENS = 384, 1536, 197
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


def mlp(neurons: int) -> nn.Module:
    """Returns the MLP with this many neurons."""
    return nn.Sequential(nn.Linear(WIDTH, neurons), nn.GELU(), nn.Linear(neurons, WIDTH))


def measured(target: Target, images: int, counts: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Returns a row for each multiple: the time of a neuron against MLPs that are not rounded."""
    inputs = torch.randn(images, TOKENS, WIDTH)
    watch = Stopwatch(target, mlp(HIDDEN), inputs)
    found: dict[int, list[float]] = {multiple: [] for multiple in MULTIPLES}
    for count in counts:
        rounded = [-(-count // multiple) * multiple for multiple in MULTIPLES]
        times = watch.compare_all([mlp(neurons) for neurons in rounded], seconds)
        for index, (multiple, neurons) in enumerate(zip(MULTIPLES, rounded, strict=True), 1):
            found[multiple].append(times.relative(index, 1) * rounded[0] / neurons)
    rows = []
    for multiple, values in found.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                "images": images,
                "multiple": multiple,
                "time of a neuron": round(middle, 3),
                "lower quartile": round(low, 3),
                "upper quartile": round(high, 3),
            }
        )
    return rows


def main(
    device: Annotated[str, typer.Option(help="device, such as cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the MLP")] = "float32",
    images: Annotated[list[int] | None, typer.Option(help="images in a batch, can be repeated")] = None,
    threads: Annotated[int | None, typer.Option(help="threads on the CPU")] = None,
    widths: Annotated[int, typer.Option(help="random numbers of neurons")] = 24,
    seconds: Annotated[float, typer.Option(help="seconds for each number of neurons")] = 2.0,
) -> None:
    """Measures all multiples and records them."""
    chance = random.Random(0)
    # Odd numbers, so that no number is a multiple already.
    counts = [chance.randrange(HIDDEN // 5, HIDDEN) | 1 for _ in range(widths)]
    target = Target(device, dtype, threads=threads)
    rows = [row for each in images or (1, 16) for row in measured(target, each, counts, seconds)]
    record(f"widths-{device}", rows, f"time of a neuron by multiples, {dtype}", widths=counts)


if __name__ == "__main__":
    typer.run(main)
