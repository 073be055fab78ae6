"""Compares the steps of mask learning with training steps of the dense model, and integrated gradients with Taylor.

    python -m benchmarks.scoring_cost --device cuda --dtype bf16 --batch 64
    python -m benchmarks.scoring_cost --device cpu --batch 4

The goal: a step of X-Pruner costs at most 0.8 of a plain training step with the same batch, and integrated gradients
cost at most about 5 times as much as Taylor. Weights and data are random, because only the time is measured. Blocks of
dense steps and blocks of mask steps alternate, so that a slow moment of the machine meets both. The result is
docs/results/NAME.json, see `--name`.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import xprune
from benchmarks.record import record, show
from xprune.criteria.xpruner.criterion import XPruner

RANKS = {1_000: None, 21_841: 64}
"""Number of classes -> rank of the table of masks: the default, and the one that the documentation advises."""
SHARED = 2 / 3
"""The default fraction of mask steps that train the shared row."""
PRECISIONS = {"float32": "no", "tf32": "no", "bf16": "bf16"}


class Stamped:
    """A loader that yields the same batch again and again, and notes the time before each step and after the last one.

    Args:
        batch: The batch.
        steps: The number of steps.
        device: The device. The loader waits until it is idle before it reads the clock.
        hooks: Step -> a function to call before this step.
    """

    def __init__(
        self, batch: Any, steps: int, device: torch.device, hooks: dict[int, Callable[[], object]] | None = None
    ) -> None:
        self.batch, self.steps, self.device, self.hooks = batch, steps, device, hooks or {}
        self.stamps: list[float] = []

    def __len__(self) -> int:
        # One epoch is longer than the run, so the run ends within it.
        return self.steps + 1

    def __iter__(self) -> Iterator[Any]:
        # The criterion also reads a first batch. Only the last pass over the loader counts.
        self.stamps = []
        for step in range(len(self)):
            self.hooks.get(step, lambda: None)()
            synchronize(self.device)
            self.stamps.append(clock())
            yield self.batch

    def seconds(self, end: float) -> list[float]:
        """Returns the time of each step but the first one, which warms up. `end` is the time after the last step."""
        stamps = [*self.stamps[: self.steps], end]
        return [after - before for before, after in pairwise(stamps[1:])]


def clock() -> float:
    """Returns the time in seconds. With one thread, this is CPU time, which other programs disturb less.

    A GPU works at the same time as the CPU, so this is the time of day if there is a GPU.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_start(device: torch.device) -> None:
    """Starts the measurement of the peak memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """Returns the peak memory since `peak_start` in GB: of the GPU, or of the process on Linux. Elsewhere NaN."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), float("nan"))


def dense_block(model: nn.Module, optimizer: torch.optim.Optimizer, data: Stamped, dtype: str) -> list[float]:
    """Makes plain training steps: forward, cross-entropy, backward, AdamW. Returns the seconds of each step."""
    device = data.device
    for step, (images, labels) in enumerate(data):
        if step == data.steps:
            break
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            outputs = model(images)
        loss = F.cross_entropy(outputs.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    synchronize(device)
    return data.seconds(clock())


def mask_block(model: nn.Module, data: Stamped, sites: Any, rank: int | None) -> tuple[list[float], list[float]]:
    """Makes steps of mask learning. Returns the seconds of the shared row's steps, and of the steps of classes' rows.

    The learner makes two more steps after those that are measured. So the end of a run is not counted.
    """
    xprune.score(model, sites, data, XPruner(steps=data.steps, rank=rank), budget=xprune.Budget(macs=0.5))
    # The last stamp is the one before the last step.
    shared, classes = [], []
    for step, (before, after) in enumerate(pairwise(data.stamps)):
        trains_shared = int((step + 1) * SHARED) > int(step * SHARED)
        # The first three steps warm up both kinds of rows.
        if step >= 3:
            (shared if trains_shared else classes).append(after - before)
    return shared, classes


def spread(values: list[float]) -> str:
    """Returns the smallest and the largest value as a text, in milliseconds."""
    return f"{1e3 * min(values):.1f} to {1e3 * max(values):.1f}"


def top(profiler: profile, device: torch.device, steps: int, count: int = 12) -> list[dict[str, Any]]:
    """Returns the operations that took the most time, with the milliseconds and the calls of one step."""
    on_gpu = device.type == "cuda"

    def cost(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=cost, reverse=True)[:count]
    return [
        {"operation": event.key[:60], "ms a step": cost(event) / 1e3 / steps, "calls a step": event.count / steps}
        for event in events
    ]


def profiled(run: Callable[[Stamped], object], batch: Any, device: torch.device) -> tuple[list[dict[str, Any]], float]:
    """Profiles three consecutive steps. In mask learning, two train the shared row, and one trains rows of classes.

    Args:
        run: A function that makes steps with a loader.
        batch: The batch.
        device: The device.

    Returns:
        (the table of `top`, the number of calls of operations in a step). A GPU that waits for Python is as slow as
        there are calls, so their number also says something where there is no GPU.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    profiler = profile(activities=activities)
    run(Stamped(batch, 7, device, {3: profiler.start, 6: profiler.stop}))
    calls = sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))
    return top(profiler, device, 3), calls / 3


def measured(
    model: str, classes: int, batch: Any, device: torch.device, dtype: str, rounds: int, steps: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the table for one number of classes, and the profile of the mask steps."""
    torch.manual_seed(0)
    dense = timm.create_model(model, num_classes=classes).to(device)
    images, _ = batch
    batch = (images, torch.randint(classes, (len(images),), device=device))
    sites = xprune.find_sites(dense, images[:1])
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-6)
    times: dict[str, list[float]] = {"dense": [], "shared row": [], "classes' rows": []}
    ratios: list[float] = []
    memory = {"dense": 0.0, "masks": 0.0}
    for _ in range(rounds):
        peak_start(device)
        plain = dense_block(dense.train(), optimizer, Stamped(batch, max(steps // 2, 3), device), dtype)
        memory["dense"] = max(memory["dense"], peak(device))
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        peak_start(device)
        # Steps 3 to steps - 2 are measured. If steps is a multiple of 3 plus 1, two of three train the shared row.
        shared, rows = mask_block(dense.eval(), Stamped(batch, steps, device), sites, RANKS[classes])
        memory["masks"] = max(memory["masks"], peak(device))
        mean = SHARED * statistics.median(shared) + (1 - SHARED) * statistics.median(rows)
        ratios.append(mean / statistics.median(plain))
        for name, found in zip(times, (plain, shared, rows), strict=True):
            times[name] += found
    # The number of calls does not depend on the size of the batch.
    one = (batch[0][:1], batch[1][:1])
    _, dense_calls = profiled(lambda data: dense_block(dense.train(), optimizer, data, dtype), one, device)
    rank = RANKS[classes]
    table_of_masks, mask_calls = profiled(lambda data: mask_block(dense.eval(), data, sites, rank), batch, device)
    base = statistics.median(times["dense"])
    mean = SHARED * statistics.median(times["shared row"]) + (1 - SHARED) * statistics.median(times["classes' rows"])
    table = [
        {
            "classes": classes,
            "step": name,
            "ms": 1e3 * statistics.median(found),
            "range in ms": spread(found),
            "of dense": statistics.median(found) / base,
            "range of rounds": "",
            "peak GB": memory["dense" if name == "dense" else "masks"],
            "calls": round(dense_calls) if name == "dense" else "",
        }
        for name, found in times.items()
    ]
    across = f"{min(ratios):.2f} to {max(ratios):.2f}"
    both = {"ms": 1e3 * mean, "range in ms": "", "of dense": mean / base, "range of rounds": across}
    both |= {"peak GB": memory["masks"], "calls": round(mask_calls)}
    table.append({"classes": classes, "step": "masks, mean", **both})
    return table, table_of_masks


def attributions(model: str, batch: Any, device: torch.device, batches: int) -> dict[str, float]:
    """Returns the seconds of Taylor and of integrated gradients at their default settings, over the same batches."""
    dense = timm.create_model(model, num_classes=10).to(device)
    images, _ = batch
    data = [(images, torch.randint(10, (len(images),), device=device)) for _ in range(batches)]
    sites = xprune.find_sites(dense, images[:1])
    found = {}
    for criterion in ("taylor", "captum:IntegratedGradients"):
        # The first batch warms up.
        xprune.score(dense, sites, data[:1], "taylor")
        synchronize(device)
        start = clock()
        xprune.score(dense, sites, data, criterion)
        synchronize(device)
        found[criterion] = clock() - start
    return found


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, tf32 or bf16 (autocast)")] = "float32",
    model: Annotated[str, typer.Option(help="name of a timm model")] = "deit_small_patch16_224",
    classes: Annotated[list[int] | None, typer.Option(help="numbers of classes: 1000, 21841")] = None,
    batch: Annotated[int, typer.Option(help="images in a batch")] = 8,
    rounds: Annotated[int, typer.Option(help="alternations of dense steps and mask steps")] = 2,
    steps: Annotated[int, typer.Option(help="mask steps in a round")] = 10,
    batches: Annotated[int, typer.Option(help="batches for Taylor and integrated gradients, 0 for none")] = 8,
    name: Annotated[str, typer.Option(help="name of the file of results")] = "scoring-cost",
) -> None:
    """Measures and records the result."""
    if dtype not in PRECISIONS:
        raise typer.BadParameter(f"{dtype}: allowed are {', '.join(PRECISIONS)}", param_hint="--dtype")
    where = torch.device(device)
    # The criteria take their precision and their device from Accelerate, which reads these variables.
    os.environ["ACCELERATE_MIXED_PRECISION"] = PRECISIONS[dtype]
    if where.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    size = timm.create_model(model, num_classes=1).pretrained_cfg["input_size"]
    given = (torch.randn(batch, *size, device=where), None)
    rows: list[dict[str, Any]] = []
    profiles: dict[str, list[dict[str, Any]]] = {}
    for count in classes or RANKS:
        table, profiles[str(count)] = measured(model, count, given, where, dtype, rounds, steps)
        rows += table
        show(table, f"{count} classes")
        show(profiles[str(count)], f"{count} classes: the operations of a mask step that take the most time")
    seconds = attributions(model, given, where, batches) if batches else {}
    ratios = (
        {"integrated gradients / taylor": seconds["captum:IntegratedGradients"] / seconds["taylor"]} if batches else {}
    )
    about = f"{model}, batch {batch}, {dtype} on {where.type}: mask steps and plain training steps"
    goals = {"masks, mean, of dense": 0.8, "integrated gradients / taylor": 5}
    settings = {"threads": torch.get_num_threads(), "rounds": rounds, "steps": steps, "batches": batches}
    record(name, rows, about, **settings, profiles=profiles, seconds=seconds, ratios=ratios, goals=goals)


if __name__ == "__main__":
    typer.run(main)
