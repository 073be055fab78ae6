"""Masks for many classes: memory and time of a step, beside a dense AdamW step of the same batch."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import typer

import xprune
from benchmarks.record import record
from xprune.criteria.xpruner.criterion import XPruner

CLASSES = (1_000, 21_841)
RANK = 64


def measure(side: str, classes: int, model: str, batch: int, steps: int) -> None:
    """Run in a process of its own: prints CPU seconds of all steps, on 1 thread, and the peak of memory in bytes."""
    torch.manual_seed(0)
    dense = timm.create_model(model, num_classes=classes)
    size = dense.patch_embed.img_size
    data = [(torch.randn(batch, 3, *size), torch.randint(classes, (batch,))) for _ in range(steps)]
    sites = xprune.find_sites(dense, data[0][0][:1])
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = time.process_time()
    if side == "dense":
        xprune.finetune(dense, data, xprune.Finetune(epochs=1))
    else:
        masks = XPruner(steps=steps, rank=RANK, shared=0.0, aggregate="mean")  # every step draws classes
        xprune.score(dense, sites, data, masks, budget=xprune.Budget(macs=0.5))
    print(time.process_time() - start, _status("VmHWM"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main(
    model: str = "deit_base_patch16_224",
    batch: int = 8,
    few: int = 1,
    many: int = 3,
    child: str = "",
    classes: int = 0,
) -> None:
    """Measures and records; --child is how it calls itself. Seconds a step: between `few` steps and `many`."""
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
    ratios = {
        count: {key: rows[2 * i + 1][key] / rows[2 * i][key] for key in ("seconds a step", "peak GB")}
        for i, count in enumerate(CLASSES)
    }
    about = f"{model}, batch {batch}, masks of rank {RANK} beside AdamW on all weights, 1 thread"
    record("many-classes", rows, about, ratios=ratios, goals={"seconds a step": 0.8, "peak GB": 1.0})


if __name__ == "__main__":
    typer.run(main)
