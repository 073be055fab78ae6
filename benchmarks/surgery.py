"""Compares the time and memory of surgery with torch-pruning.

    python -m benchmarks.surgery [--rounds 7]

Both libraries remove half of the heads and MLP neurons of DeiT-B, with random scores and one thread. They take turns,
and the table has medians. The stages:

- graph: `find_sites` of xprune, and the constructor of torch-pruning's BasePruner.
- removal: `apply` of xprune without its proof, and one step of BasePruner, which leaves the residual stream alone.
- verification: the proof of xprune. torch-pruning has none.

Peak memory is measured in a separate process for each library, beyond the memory that the process holds with the dense
model loaded. The goal: at most half of the time of torch-pruning for graph and removal, and at most 1.2 times the
memory of the dense model. The result is docs/results/surgery.json. Memory is read from /proc, so it needs Linux.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import timm
import torch
import torch_pruning as tp
import typer
from torch import Tensor, nn

import xprune
from benchmarks.memory import bytes_of, half, peak_of
from benchmarks.record import record
from xprune.adapters import ADAPTERS
from xprune.modules.copies import shared_copy, unshare
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify

NAME = "deit_base_patch16_224"
RATIO = 0.5


def ours(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Removes units with xprune. Returns the seconds of each stage."""
    start = time.perf_counter()
    sites = xprune.find_sites(model, x)
    graph = time.perf_counter()
    plan = half(sites)
    drawn = time.perf_counter()
    pruned = unshare(remove_units(shared_copy(model), plan, ADAPTERS), model)
    removal = time.perf_counter()
    verify(model, pruned, plan, x)
    return {"graph": graph - start, "removal": removal - drawn, "verification": time.perf_counter() - removal}


def theirs(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Removes units with torch-pruning, in place. Returns the seconds of each stage."""
    residual: list[Any] = [model.patch_embed.proj, model.head]
    residual += [layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=RATIO,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=residual,
    )
    graph = time.perf_counter()
    pruner.step()
    return {"graph": graph - start, "removal": time.perf_counter() - graph}


def build() -> tuple[nn.Module, Tensor]:
    """Returns the dense model and two images."""
    torch.manual_seed(0)
    return timm.create_model(NAME).eval(), torch.randn(2, 3, 224, 224)


def peak(side: str) -> None:
    """Prints the peak of resident memory beyond the dense model, in bytes. It is called in a separate process."""
    model, x = build()
    with torch.no_grad():
        # Libraries load and allocate at the first forward.
        model(x[:1])
    run: dict[str, Callable[[], object]] = {
        "ours": lambda: xprune.apply(model, half(xprune.find_sites(model, x)), x),
        "theirs": lambda: theirs(model, x),
    }
    print(peak_of(run[side]))


def main(
    rounds: Annotated[int, typer.Option(help="measurements of each library")] = 7,
    memory: Annotated[str, typer.Option(help="internal: the side that a child process measures")] = "",
) -> None:
    """Measures time, then memory in child processes, and records the result."""
    torch.set_num_threads(1)
    if memory:
        return peak(memory)
    model, x = build()
    dense_bytes = bytes_of(model)
    seconds: dict[str, list[dict[str, float]]] = {"xprune": [], "torch-pruning": []}
    for turn in range(rounds + 1):
        # torch-pruning cuts the model that it gets, so it gets a new one. Building it is not timed.
        measured = {"xprune": ours(model, x), "torch-pruning": theirs(build()[0], x)}
        # The first turn is not counted: libraries load and allocate then.
        for side, stages in measured.items() if turn else ():
            seconds[side].append(stages)
    rows = []
    for side, child in (("xprune", "ours"), ("torch-pruning", "theirs")):
        medians = {stage: statistics.median(run[stage] for run in seconds[side]) for stage in seconds[side][0]}
        done = subprocess.run([sys.executable, "-m", "benchmarks.surgery", "--memory", child], capture_output=True)
        used = int(done.stdout)
        row: dict[str, Any] = {"side": side, "graph s": medians["graph"], "removal s": medians["removal"]}
        row["graph + removal s"] = statistics.median(run["graph"] + run["removal"] for run in seconds[side])
        row |= {"verification s": medians.get("verification", "none"), "peak MB": used / 1e6}
        rows.append(row | {"peak in dense copies": used / dense_bytes})
    ratio = rows[0]["graph + removal s"] / rows[1]["graph + removal s"]
    about = (
        f"{NAME}, half of all heads and neurons removed at random, 1 thread. "
        f"xprune takes {ratio:.2f} of the time of torch-pruning"
    )
    record("surgery", rows, about, rounds=rounds, ratio=ratio, goal_ratio=0.5, goal_peak_in_dense_copies=1.2)


if __name__ == "__main__":
    typer.run(main)
