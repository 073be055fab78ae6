"""Measures which models can be pruned exactly, with one or more models of each family.

    python -m benchmarks.prunability [--only swin] [--side channels] [--seconds 120] [--gigabytes 8]
    python -m benchmarks.prunability --table        prints the recorded result as a Markdown table
    python -m benchmarks.prunability --library transformers [--only bert] [--jobs 2]    every model of a library

Each model of `benchmarks/zoo.py` is pruned three times, and each time is one side of the table:

- xprune: heads and neurons, with random scores. Exact: the pruned model equals the gated dense model.
- channels: residual channels, with random plans. Exact: the pruned model equals the dense model in which the removed
  channels are zero and norms use the kept channels only.
- torch-pruning: the pruner of torch-pruning, see `benchmarks/prunability_peer.py`.

Equal means an error of at most 1e-4: of the size of each output for xprune, and of the largest absolute value, or of 1
if that is larger, for torch-pruning.

The budget is 0.5 of the dense MACs. If a model cannot be that small, the budget is midway between the least that it can
cost and 1. xprune and torch-pruning get the same budget. Weights are random, with noise on every parameter. The input
is one image of the model's own size.

Each side runs in a separate process. A side that fails, or needs too much time or memory, is recorded as refused, with
its reason. The result is docs/results/prunability.json and prunability.md. The goal: all models are exact or refused,
and 95 % are exact.

With `--library`, every model of one library is measured in another way, and without torch-pruning. For each model, the
attentions and MLPs are counted without xprune (`benchmarks/expected_units.py`) and compared with the sites. Three plans
are applied. A pruned model is saved and loaded, and it generates tokens (`benchmarks/model_rows.py`). The result is
docs/results/prunability-LIBRARY.json and .md. Types of transformers are built small
(`benchmarks/transformers_models.py`).
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import xprune
from benchmarks.prunability_peer import by_torch_pruning
from benchmarks.prunability_sweep import LIBRARIES, sweep
from benchmarks.record import RESULTS, record
from benchmarks.zoo import BUILDERS
from xprune.costs.measure import measure_costs
from xprune.modules.copies import shared_copy
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import TOLERANCE, compare
from xprune.testing import perturb, random_plan

FILE = RESULTS / "prunability.json"
# Random plans of residual channels for each model.
PLANS = 3


def by_xprune(model: nn.Module, inputs: Any, _asked: float) -> dict[str, Any]:
    """Prunes heads and neurons with xprune. Returns the sites, the budget, the MACs reached and the error."""
    sites = xprune.find_sites(model, inputs)
    least = measure_costs(model, sites, inputs).least(xprune.Budget(macs=0.5))
    asked = 0.5 if least < 0.5 else (1 + least) / 2
    scores = xprune.score(model, sites, criterion="random")
    plan = xprune.select(model, scores, xprune.Budget(macs=asked), "uniform", example_inputs=inputs)
    pruned = xprune.apply(model, plan, inputs)
    error, scale = compare(model, pruned, plan, inputs)
    kinds = [site.kind for site in sites]
    return {
        "sites": f"{kinds.count('head')} heads, {kinds.count('neuron')} neurons",
        "asked": asked,
        "hit": xprune.count_macs(pruned, inputs) / xprune.count_macs(model, inputs),
        "error": error / scale if scale else error,
    }


def by_channels(model: nn.Module, inputs: Any, _asked: float) -> dict[str, Any]:
    """Prunes residual channels with xprune. Returns the largest error over random plans, and the last one's MACs."""
    sites = [site for site in xprune.find_sites(model, inputs, units=("channel",)) if site.kind == "channel"]
    worst = 0.0
    for seed in range(PLANS):
        plan = random_plan(sites, seed)
        pruned = remove_units(shared_copy(model), plan, xprune.ADAPTERS)
        error, scale = compare(model, pruned, plan, inputs)
        worst = max(worst, error / scale if scale else error)
    hit = xprune.count_macs(pruned, inputs) / xprune.count_macs(model, inputs)
    return {"sites": f"{sum(site.size for site in sites)} channels", "asked": None, "hit": hit, "error": worst}


SIDES: Mapping[str, Callable[[nn.Module, Any, float], dict[str, Any]]] = {
    "xprune": by_xprune,
    "channels": by_channels,
    "torch-pruning": by_torch_pruning,
}
"""Side -> a function of (model, example inputs, budget).

It returns a part of a row: the sites, the budget ("asked"), the share of the MACs that is left ("hit") and the error.
"""


def run(name: str, side: str, seconds: int, gigabytes: int, asked: float) -> dict[str, Any]:
    """Runs one side of one model in a child process. Returns its result, or the reason why it was refused."""
    command = [sys.executable, "-m", "benchmarks.prunability", "--child", name, "--side", side, "--asked", str(asked)]
    began, allowed = time.time(), gigabytes * 2**30
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A side that needs too much memory fails alone, and the machine does not swap.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed)),
        )
        # The result is the last line, after what libraries may have printed.
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if lines else {"refused": f"no result, exit {done.returncode}"}
    except subprocess.TimeoutExpired:
        found = {"refused": f"over {seconds} s"}
    return {**found, "seconds": time.time() - began}


def child(name: str, side: str, asked: float) -> None:
    """Runs one side of one model and prints the result as a line of JSON. It is called in a separate process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, inputs = BUILDERS[name]()
    model = perturb(model)
    try:
        found = SIDES[side](model, inputs, asked)
    except (Exception, MemoryError) as error:
        found = {"refused": f"{type(error).__name__}: {error}"[:160].replace("\n", " ")}
    print(json.dumps(found))


def row(name: str, side: str, found: dict[str, Any]) -> dict[str, Any]:
    """Returns one row of the table from the result of a child process."""
    exact = "error" in found and found["error"] <= TOLERANCE
    return {
        "model": name,
        "side": side,
        "sites": found.get("sites", ""),
        "pruned": "hit" in found,
        "exact": exact,
        "error": found.get("error"),
        "asked": found.get("asked"),
        "hit": found.get("hit"),
        "seconds": found["seconds"],
        "refused": found.get("refused", ""),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table with one line for each model. The totals of each side come first."""

    def cell(entry: dict[str, Any]) -> str:
        """Returns the text of one cell: exact, wrong or refused."""
        if not entry["pruned"]:
            return f"refused: {entry['refused']}".replace("|", "/")
        return f"{'exact' if entry['exact'] else 'wrong'}, {entry['error']:.0e}, {entry['hit']:.3f} of MACs"

    sides = list(dict.fromkeys(entry["side"] for entry in rows))
    lines = ["| model | budget | " + " | ".join(sides) + " |", "| --- " * (2 + len(sides)) + "|"]
    for name in dict.fromkeys(entry["model"] for entry in rows):
        mine = [entry for entry in rows if entry["model"] == name]
        asked = next((entry["asked"] for entry in mine if entry["asked"]), None)
        lines.append(f"| {name} | {f'{asked:.2f}' if asked else ''} | " + " | ".join(map(cell, mine)) + " |")
    sums = []
    for side in sides:
        mine = [entry for entry in rows if entry["side"] == side]
        exact, pruned = [entry for entry in mine if entry["exact"]], sum(entry["pruned"] for entry in mine)
        line = f"{side}: {len(exact)} of {len(mine)} exact, {pruned - len(exact)} wrong, {len(mine) - pruned} refused"
        if any(entry["asked"] for entry in mine):
            reached = sum(entry["hit"] <= entry["asked"] for entry in exact)
            line += f"; {reached} exact and within the budget"
        sums.append(line)
    return "\n\n".join([*sums, "\n".join(lines)])


def main(
    only: Annotated[
        str, typer.Option(help="Only models whose name contains this text. The others keep their rows.")
    ] = "",
    seconds: Annotated[int, typer.Option(help="Time limit for each side of each model.")] = 120,
    gigabytes: Annotated[int, typer.Option(help="Limit of the address space for each side of each model.")] = 8,
    table: Annotated[bool, typer.Option(help="Print the recorded result as Markdown.")] = False,
    one: Annotated[str, typer.Option("--child", hidden=True)] = "",
    side: Annotated[
        str, typer.Option(help="Only this side: xprune, channels or torch-pruning. The others keep their rows.")
    ] = "",
    asked: Annotated[float, typer.Option(hidden=True)] = 0.5,
    library: Annotated[
        str, typer.Option(help=f"Measure every model of this library instead: {', '.join(LIBRARIES)}.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="With --library: how many models are measured at the same time.")] = 1,
    rows_file: Annotated[
        Path | None,
        typer.Option("--rows", help="With --library: add the rows to this file, one line each, and record nothing."),
    ] = None,
) -> None:
    """Runs every side of every model and records docs/results/prunability.json."""
    if library:
        if library not in LIBRARIES:
            raise SystemExit(f"--library {library!r} is not known. Give one of: {', '.join(LIBRARIES)}.")
        return sweep(library, only, jobs, seconds, gigabytes, rows_file)
    if one:
        return child(one, side, asked)
    if table:
        return print(markdown(json.loads(FILE.read_text())["rows"]))
    names = [name for name in BUILDERS if only in name]
    if not names:
        raise SystemExit(f"The name of no model contains {only!r}. The models are {', '.join(BUILDERS)}.")
    before = json.loads(FILE.read_text())["rows"] if FILE.is_file() else []
    wanted = {entry["model"]: entry["asked"] for entry in before if entry["side"] == "xprune"}
    rows = []
    for name in names:
        for each in [side] if side else SIDES:
            found = run(name, each, seconds, gigabytes, wanted.get(name) or 0.5)
            # xprune runs first and finds the budget that torch-pruning gets too.
            if each == "xprune":
                wanted[name] = found.get("asked")
            rows.append(row(name, each, found))
            print(rows[-1], flush=True)
    done = {(entry["model"], entry["side"]) for entry in rows}
    rows += [entry for entry in before if (entry["model"], entry["side"]) not in done]
    rows.sort(key=lambda entry: (list(BUILDERS).index(entry["model"]), list(SIDES).index(entry["side"])))
    about = "one or more models of each family: pruned exactly, pruned wrongly, or refused"
    record("prunability", rows, about, seconds=seconds, gigabytes=gigabytes)
    FILE.with_suffix(".md").write_text(markdown(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
