"""Prunability: one small model of each family, by xprune and by torch-pruning alone, each in a process of its own.

    python -m benchmarks.prunability [--only swin] [--seconds 120] [--gigabytes 8]
    python -m benchmarks.prunability --table        the recorded result as a Markdown table

Random weights, perturbed, at the model's own image size, one image, random scores. The MACs asked are 0.5 of the dense
model's, or midway between the least and 1 where 0.5 cannot be reached; both sides are asked for the same.

xprune is exact where its pruned model equals the gated dense one; "channels" are residual channels alone, pruned by
random plans, exact where the pruned model equals the dense one with those channels at zero and norms over the kept
ones. torch-pruning: see `benchmarks/prunability_peer.py`. All within 1e-4 of the largest value. A side that fails,
runs out of time or of memory is recorded as refused, with its reason.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from torch import nn

import xprune
from benchmarks.prunability_peer import by_torch_pruning
from benchmarks.record import RESULTS, record
from benchmarks.zoo import BUILDERS
from xprune.costs.measure import measure_costs
from xprune.modules.copies import shared_copy
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import TOLERANCE, compare
from xprune.testing import perturb, random_plan

PATH = RESULTS / "prunability.json"
PLANS = 3


def by_xprune(model: nn.Module, inputs: Any, _asked: float) -> dict[str, Any]:
    """What xprune makes of the heads and neurons of the model."""
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
    """What xprune makes of its residual channels: the largest error over random plans, and the MACs of the last."""
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
"""What each side makes of (model, example inputs, MACs asked): a row's sites, MACs asked and hit, and error."""


def run(name: str, side: str, seconds: int, gigabytes: int, asked: float) -> dict[str, Any]:
    """One side of one model in a child process; its reason where it is refused."""
    command = [sys.executable, "-m", "benchmarks.prunability", "--child", name, "--side", side, "--asked", str(asked)]
    began, allowed = time.time(), gigabytes * 2**30
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed)),
        )
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if lines else {"refused": f"no result, exit {done.returncode}"}
    except subprocess.TimeoutExpired:
        found = {"refused": f"over {seconds} s"}
    return {**found, "seconds": time.time() - began}


def child(name: str, side: str, asked: float) -> None:
    """Prints the result of one side as a line of JSON."""
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
    """One row of the table."""
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
    """The rows as a table, all sides of a model on one line, after how many of each side are exact."""

    def cell(entry: dict[str, Any]) -> str:
        if not entry["pruned"]:
            return f"refused: {entry['refused']}".replace("|", "/")
        return f"{'exact' if entry['exact'] else 'wrong'}, {entry['error']:.0e}, {entry['hit']:.3f} of MACs"

    sides = list(dict.fromkeys(entry["side"] for entry in rows))
    lines = ["| model | asked | " + " | ".join(sides) + " |", "| --- " * (2 + len(sides)) + "|"]
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
            line += f"; exact and at the MACs asked, {reached}"
        sums.append(line)
    return "\n\n".join([*sums, "\n".join(lines)])


def main(
    only: Annotated[str, typer.Option(help="Models whose name holds this, the others keep their rows.")] = "",
    seconds: Annotated[int, typer.Option(help="Time limit of each side of each model.")] = 120,
    gigabytes: Annotated[int, typer.Option(help="Address space of each side of each model.")] = 8,
    table: Annotated[bool, typer.Option(help="Print the recorded result as Markdown.")] = False,
    one: Annotated[str, typer.Option("--child", hidden=True)] = "",
    side: Annotated[str, typer.Option(help="This side alone, the others keep their rows.")] = "",
    asked: Annotated[float, typer.Option(hidden=True)] = 0.5,
) -> None:
    """Runs every side of every model and records docs/results/prunability.json."""
    if one:
        return child(one, side, asked)
    if table:
        return print(markdown(json.loads(PATH.read_text())["rows"]))
    names = [name for name in BUILDERS if only in name]
    if not names:
        raise SystemExit(f"no model's name holds {only!r}; there are {', '.join(BUILDERS)}.")
    before = json.loads(PATH.read_text())["rows"] if PATH.is_file() else []
    wanted = {entry["model"]: entry["asked"] for entry in before if entry["side"] == "xprune"}
    rows = []
    for name in names:
        for each in [side] if side else SIDES:
            found = run(name, each, seconds, gigabytes, wanted.get(name) or 0.5)
            if each == "xprune":  # which is first, and says what the others are asked for
                wanted[name] = found.get("asked")
            rows.append(row(name, each, found))
            print(rows[-1], flush=True)
    done = {(entry["model"], entry["side"]) for entry in rows}
    rows += [entry for entry in before if (entry["model"], entry["side"]) not in done]
    rows.sort(key=lambda entry: (list(BUILDERS).index(entry["model"]), list(SIDES).index(entry["side"])))
    about = "One small model of each family: pruned exactly or refused"
    record("prunability", rows, about, seconds=seconds, gigabytes=gigabytes)
    PATH.with_suffix(".md").write_text(markdown(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
