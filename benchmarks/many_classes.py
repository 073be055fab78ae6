"""Compares a step of mask learning with a training step of the dense model, for many classes.

    python -m benchmarks.many_classes

X-Pruner learns one mask for each class. This benchmark measures the CPU time and the memory of a step with 1,000 and
with 21,841 classes. It compares them with a step of AdamW on all weights of the dense model, with the same batch. The
goal: at most 0.8 of the time, and at most the same memory. The result is docs/results/many-classes.json.

It needs Linux, because it reads memory from /proc.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

import xprune
from benchmarks.record import record
from xprune.criteria.xpruner.criterion import XPruner

CLASSES = (1_000, 21_841)
RANK = 64


def measure(side: str, classes: int, model: str, batch: int, steps: int) -> None:
    """Prints the CPU seconds of all steps and the peak memory in bytes. It is called in a separate process."""
    torch.manual_seed(0)
    dense = timm.create_model(model, num_classes=classes)
    size = dense.patch_embed.img_size
    data = [(torch.randn(batch, 3, *size), torch.randint(classes, (batch,))) for _ in range(steps)]
    sites = xprune.find_sites(dense, data[0][0][:1])
    # Resets the peak that the kernel keeps, so that it does not count the building of the model.
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    if side == "dense":
        xprune.finetune(dense, data, xprune.Finetune(epochs=1))
    else:
        # With shared=0, every step trains masks of classes, which are the part that grows with the classes.
        masks = XPruner(steps=steps, rank=RANK, shared=0.0, aggregate="mean")
        xprune.score(dense, sites, data, masks, budget=xprune.Budget(macs=0.5))
    print(time.process_time() - start, _status("VmHWM"))


def _status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes, for example "VmHWM", the peak of resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main(
    model: Annotated[str, typer.Option(help="name of a timm model")] = "deit_base_patch16_224",
    batch: Annotated[int, typer.Option(help="images in a batch")] = 8,
    few: Annotated[int, typer.Option(help="steps of the shorter measurement")] = 1,
    many: Annotated[int, typer.Option(help="steps of the longer measurement")] = 3,
    child: Annotated[str, typer.Option(help="internal: the side that a child process measures")] = "",
    classes: Annotated[int, typer.Option(help="internal: the number of classes of a child process")] = 0,
) -> None:
    """Measures both sides in child processes and records the result.

    The time of a step is the difference between the longer and the shorter measurement, divided by their steps. So the
    time to start is not counted.
    """
    torch.set_num_threads(1)
    if child:
        return measure(child, classes, model, batch, many)
    rows: list[dict[str, Any]] = []
    for count in CLASSES:
        for side in ("dense", "masks"):
            runs = []
            for steps in (few, many):
                words = ["--child", side, "--classes", str(count), "--model", model, "--batch", str(batch)]
                command = [sys.executable, "-m", "benchmarks.many_classes", *words, "--many", str(steps)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append([float(word) for word in done.stdout.split()])
            seconds = (runs[1][0] - runs[0][0]) / (many - few)
            rows.append({"classes": count, "side": side, "seconds a step": seconds, "peak GB": runs[1][1] / 1e9})
    # The rows alternate: dense, masks, dense, masks.
    ratios = {
        count: {key: rows[2 * i + 1][key] / rows[2 * i][key] for key in ("seconds a step", "peak GB")}
        for i, count in enumerate(CLASSES)
    }
    about = f"{model}, batch {batch}, 1 thread: a step of masks of rank {RANK}, compared with AdamW on all weights"
    record("many-classes", rows, about, ratios=ratios, goals={"seconds a step": 0.8, "peak GB": 1.0})


if __name__ == "__main__":
    typer.run(main)
