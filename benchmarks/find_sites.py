"""find_sites: how long it takes with the proof of every site inside the model, beside the code before there was one.

    python -m benchmarks.find_sites --before DIR [--rounds 5] [--threads 1]

DIR is a checkout of the code before (any that has `xprune`). Each side runs in a process of its own that stays up; the
two take turns on the same model and inputs, so that both see the same machine. Medians are reported, of seconds on the
clock, which others on the machine lengthen, and of seconds of CPU time, by which the two are compared.
"""

import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn

HERE = Path(__file__).resolve().parents[1]
GOAL = 2.0
"""Times the CPU seconds of before."""


def deit() -> tuple[nn.Module, Any]:
    """DeiT-B and two images."""
    return timm.create_model("deit_base_patch16_224"), torch.randn(2, 3, 224, 224)


def swin() -> tuple[nn.Module, Any]:
    """Swin-T and two images."""
    return timm.create_model("swin_tiny_patch4_window7_224"), torch.randn(2, 3, 224, 224)


def llama() -> tuple[nn.Module, Any]:
    """24 layers of a Llama and two rows of 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 24}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128)
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 1000, (2, 64)), "use_cache": False}


MODELS = {"DeiT-B": deit, "Swin-T": swin, "Llama, 24 layers": llama}


def serve(threads: int) -> None:
    """In a process of its own: for each name of a model on stdin, a line of seconds, CPU seconds, number of sites."""
    import xprune

    torch.set_num_threads(threads)
    built: dict[str, tuple[nn.Module, Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in built:
            built.clear()
            torch.manual_seed(0)
            model, inputs = MODELS[name]()
            built[name] = model.eval(), inputs
        gc.collect()
        clock, cpu = time.perf_counter(), time.process_time()
        sites = xprune.find_sites(*built[name])
        print(f"{time.perf_counter() - clock} {time.process_time() - cpu} {len(sites)}", flush=True)


def _server(checkout: Path, threads: int) -> subprocess.Popen[str]:
    """A process with the `xprune` of that checkout and the benchmark of this one."""
    lines = (
        "import sys",
        f"sys.path.insert(0, {str(checkout)!r})",
        "import xprune",
        f"sys.path.insert(0, {str(HERE)!r})",
        f"from benchmarks.find_sites import serve; serve({threads})",
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**environment, "OMP_NUM_THREADS": str(threads)},
    )


def _ask(server: "subprocess.Popen[str]", name: str) -> tuple[float, float, int]:
    """(seconds, CPU seconds, sites) of one search."""
    if server.stdin is None or server.stdout is None:
        raise RuntimeError("the process has no pipes")
    server.stdin.write(f"{name}\n")
    server.stdin.flush()
    seconds, cpu, sites = server.stdout.readline().split()
    return float(seconds), float(cpu), int(sites)


def main(before: Annotated[Path, typer.Option()], rounds: int = 5, threads: int = 1) -> None:
    """Measures and records."""
    from benchmarks.record import record  # it imports xprune, which each process is to choose for itself

    sides = {"before": _server(before.resolve(), threads), "now": _server(HERE, threads)}
    rows = []
    for name in MODELS:
        clock: dict[str, list[float]] = {side: [] for side in sides}
        cpu: dict[str, list[float]] = {side: [] for side in sides}
        row: dict[str, Any] = {"model": name}
        for turn in range(rounds + 1):
            for side, server in sides.items():
                seconds, busy, row[f"sites {side}"] = _ask(server, name)
                if turn:  # the first turn warms up
                    clock[side].append(seconds)
                    cpu[side].append(busy)
        row |= {f"{side} s": statistics.median(values) for side, values in clock.items()}
        row |= {f"{side} CPU s": statistics.median(values) for side, values in cpu.items()}
        rows.append(row | {"times": row["now CPU s"] / row["before CPU s"]})
    for server in sides.values():
        server.kill()
    about = f"find_sites with every site proved inside the model, beside the code before, {threads} thread(s)"
    record("find-sites", rows, about, rounds=rounds, threads=threads, goal_times=GOAL)


if __name__ == "__main__":
    typer.run(main)
