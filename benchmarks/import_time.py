"""Import: how long `import xprune` takes beyond `import torch`, and `xprune --help` from start to end.

    python -m benchmarks.import_time

Each figure is a median of fresh processes, after one that fills the disk's cache. CPU time says what the import costs.
Wall time also counts what other processes do meanwhile.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import typer

from benchmarks.record import record

RUNS = 7
GOAL = 1.5
IMPORT = """
import time
before = time.process_time(), time.perf_counter()
import torch
torch_ = time.process_time(), time.perf_counter()
import xprune
after = time.process_time(), time.perf_counter()
print(torch_[0] - before[0], torch_[1] - before[1], after[0] - torch_[0], after[1] - torch_[1])
"""


def imports() -> list[float]:
    """Seconds of CPU and of wall of `import torch`, then of `import xprune` after it."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    if done.stderr:
        raise SystemExit(f"the import printed: {done.stderr}")
    return [float(text) for text in done.stdout.split()]


def shown() -> list[float]:
    """Seconds of CPU and of wall of `xprune --help`, the start of Python included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "xprune", "--help"], capture_output=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return [after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall]


def medians(measure: Callable[[], Sequence[float]]) -> list[float]:
    """The median of each figure over RUNS runs, after one that is not counted."""
    measure()
    return [statistics.median(values) for values in zip(*(measure() for _ in range(RUNS)), strict=True)]


def main() -> None:
    """Three rows: torch, xprune, and the help of the command line."""
    torch_cpu, torch_wall, cpu, wall = medians(imports)
    help_cpu, help_wall = medians(shown)
    rows = [
        {"what": "import torch", "CPU s": torch_cpu, "wall s": torch_wall},
        {"what": "import xprune, beyond torch", "CPU s": cpu, "wall s": wall},
        {"what": "xprune --help, the whole process", "CPU s": help_cpu, "wall s": help_wall},
    ]
    about = f"`import xprune` takes {cpu:.2f} s of CPU time beyond `import torch`, which takes {torch_cpu:.2f} s"
    goal = f"import xprune takes under {GOAL} s beyond torch, and prints nothing"
    record("import-time", rows, about, goal=goal, runs=RUNS, load_average=round(os.getloadavg()[0], 1))


if __name__ == "__main__":
    typer.run(main)
