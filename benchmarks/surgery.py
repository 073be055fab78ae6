"""Surgery: how long the graph, the removal and the verification take, and the memory they need, beside torch-pruning's.

    python -m benchmarks.surgery [--rounds 7]

Both sides remove the same share of heads and MLP neurons from the same model by random scores, on one thread. Ours:
graph = find_sites, removal = apply without its verification, which is timed apart. torch-pruning's: BasePruner's
constructor and one step, with the residual stream left alone. The two take turns, medians are reported. Peak memory is
that of a process of its own, beyond what it held when the dense model was there.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

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
    """Seconds by stage."""
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
    """Seconds by stage. torch-pruning cuts the model it is given, so that it gets a copy, which is not timed."""
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
    """The dense model, and two rows of input."""
    torch.manual_seed(0)
    return timm.create_model(NAME).eval(), torch.randn(2, 3, 224, 224)


def peak(side: str) -> None:
    """Run in a process of its own: prints the peak of resident memory beyond the dense model's, in bytes."""
    model, x = build()
    with torch.no_grad():
        model(x[:1])  # libraries allocate at the first forward
    run: dict[str, Callable[[], object]] = {
        "ours": lambda: xprune.apply(model, half(xprune.find_sites(model, x)), x),
        "theirs": lambda: theirs(model, x),
    }
    print(peak_of(run[side]))


def main(rounds: int = 7, memory: str = "") -> None:
    """Measures and records; --memory is how it calls itself."""
    torch.set_num_threads(1)
    if memory:
        return peak(memory)
    model, x = build()
    copy = bytes_of(model)
    seconds: dict[str, list[dict[str, float]]] = {"xprune": [], "torch-pruning": []}
    for turn in range(rounds + 1):
        once = {"xprune": ours(model, x), "torch-pruning": theirs(build()[0], x)}
        for side, stages in once.items() if turn else ():  # the first turn warms up
            seconds[side].append(stages)
    rows = []
    for side, child in (("xprune", "ours"), ("torch-pruning", "theirs")):
        medians = {stage: statistics.median(run[stage] for run in seconds[side]) for stage in seconds[side][0]}
        done = subprocess.run([sys.executable, "-m", "benchmarks.surgery", "--memory", child], capture_output=True)
        used = int(done.stdout)
        row: dict[str, Any] = {"side": side, "graph s": medians["graph"], "removal s": medians["removal"]}
        row["graph + removal s"] = statistics.median(run["graph"] + run["removal"] for run in seconds[side])
        row |= {"verification s": medians.get("verification", "none"), "peak MB": used / 1e6}
        rows.append(row | {"peak in dense copies": used / copy})
    ratio = rows[0]["graph + removal s"] / rows[1]["graph + removal s"]
    about = (
        f"{NAME}, half of all heads and neurons at random, 1 thread; xprune takes {ratio:.2f} of torch-pruning's time"
    )
    record("surgery", rows, about, rounds=rounds, ratio=ratio, goal_ratio=0.5, goal_peak_in_dense_copies=1.2)


if __name__ == "__main__":
    typer.run(main)
