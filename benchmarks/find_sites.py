"""Compares the time of `find_sites` with the time that an older version of xprune takes.

    python -m benchmarks.find_sites --before DIR [--rounds 5] [--threads 1]

DIR is a git checkout of the older version. The recorded result compares with the last version that did not prove every
site inside the whole model. The goal is at most twice its CPU time. The result is docs/results/find-sites.json.

Each version runs in a separate process. The two take turns on the same models and inputs, so both see the same load of
the machine. The table has medians of seconds on the clock and of seconds of CPU time. CPU time is compared, because
other programs on the machine lengthen the time on the clock.
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
"""Allowed CPU seconds of this version, as a multiple of the older version's."""


def deit() -> tuple[nn.Module, Any]:
    """Returns DeiT-B and two images."""
    return timm.create_model("deit_base_patch16_224"), torch.randn(2, 3, 224, 224)


def swin() -> tuple[nn.Module, Any]:
    """Returns Swin-T and two images."""
    return timm.create_model("swin_tiny_patch4_window7_224"), torch.randn(2, 3, 224, 224)


def llama() -> tuple[nn.Module, Any]:
    """Returns a Llama of 24 layers, and two samples of 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 24}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128)
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 1000, (2, 64)), "use_cache": False}


MODELS = {"DeiT-B": deit, "Swin-T": swin, "Llama, 24 layers": llama}


def serve(threads: int) -> None:
    """Measures one `find_sites` for each line on stdin. It is called in a separate process.

    Each line is a name of a model. The answer on stdout is a line with seconds, CPU seconds and the number of sites.
    """
    import xprune

    torch.set_num_threads(threads)
    built: dict[str, tuple[nn.Module, Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        # One model at a time is in memory. It is built outside of the measured time.
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
    """Starts a process that imports `xprune` from the given checkout and this benchmark from the present one."""
    lines = (
        "import sys",
        f"sys.path.insert(0, {str(checkout)!r})",
        # Imported before this checkout is on the path: later imports of xprune find the module that is loaded.
        "import xprune",
        f"sys.path.insert(0, {str(HERE)!r})",
        f"from benchmarks.find_sites import serve; serve({threads})",
    )
    # PYTHONPATH could hold another xprune.
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
    """Lets a process run `find_sites` once. Returns seconds, CPU seconds and the number of sites."""
    if server.stdin is None or server.stdout is None:
        raise RuntimeError("The process has no pipes. Start it with stdin=PIPE and stdout=PIPE.")
    server.stdin.write(f"{name}\n")
    server.stdin.flush()
    seconds, cpu, sites = server.stdout.readline().split()
    return float(seconds), float(cpu), int(sites)


def main(
    before: Annotated[Path, typer.Option(help="git checkout of the older version")],
    rounds: Annotated[int, typer.Option(help="measurements of each model and version")] = 5,
    threads: Annotated[int, typer.Option(help="threads of each process")] = 1,
) -> None:
    """Measures both versions in turn and records the medians."""
    # Not at the top: this import loads xprune, and the child processes have to choose theirs before that.
    from benchmarks.record import record

    sides = {"before": _server(before.resolve(), threads), "now": _server(HERE, threads)}
    rows = []
    for name in MODELS:
        clock: dict[str, list[float]] = {side: [] for side in sides}
        cpu: dict[str, list[float]] = {side: [] for side in sides}
        row: dict[str, Any] = {"model": name}
        for turn in range(rounds + 1):
            for side, server in sides.items():
                seconds, busy, row[f"sites {side}"] = _ask(server, name)
                # The first turn is not counted: libraries load and allocate then.
                if turn:
                    clock[side].append(seconds)
                    cpu[side].append(busy)
        row |= {f"{side} s": statistics.median(values) for side, values in clock.items()}
        row |= {f"{side} CPU s": statistics.median(values) for side, values in cpu.items()}
        rows.append(row | {"times": row["now CPU s"] / row["before CPU s"]})
    for server in sides.values():
        server.kill()
    about = f"time of find_sites compared with an older version of xprune, {threads} thread(s)"
    record("find-sites", rows, about, rounds=rounds, threads=threads, goal_times=GOAL)


if __name__ == "__main__":
    typer.run(main)
