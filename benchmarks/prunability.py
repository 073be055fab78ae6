"""Prunability: one small model of each family, by xprune and by torch-pruning alone, each in a process of its own.

    python -m benchmarks.prunability [--only swin] [--seconds 60] [--gigabytes 8]
    python -m benchmarks.prunability --table        the recorded result as a Markdown table

Random weights, perturbed, at the model's own image size, one image, random scores. The MACs asked are 0.5 of the dense
model's, or midway between the least and 1 where 0.5 cannot be reached; both sides are asked for the same.

xprune is exact where its pruned model equals the gated dense one. torch-pruning (its BasePruner, one ratio for heads
and neurons, found by halving; `num_heads` given and counts set by hand) is exact where its pruned model equals the
dense one in which the columns of each layer that read what was pruned are zero. Both within 1e-4 of the largest value.
A side that fails, runs out of time or of memory is recorded as refused, with its reason.

Other libraries' models are added to `BUILDERS`: a name and a function that gives (model, example inputs).
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn

import xprune
from benchmarks.record import RESULTS, record
from xprune.cost import measure_costs
from xprune.surgery import TOLERANCE, compare
from xprune.testing import perturb

TIMM = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "vit_small_patch14_reg4_dinov2",
    "samvit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "pvt_v2_b0",
    "twins_svt_small",
    "crossvit_tiny_240",
    "convit_tiny",
    "tnt_s_legacy_patch16_224",
    "volo_d1_224",
    "nest_tiny",
    "visformer_tiny",
    "hiera_tiny_224",
    "gcvit_xxtiny",
    "davit_tiny",
    "naflexvit_base_patch16_gap",
    "mvitv2_tiny",
    "coatnet_pico_rw_224",
    "maxvit_pico_rw_256",
    "maxvit_tiny_tf_224",
    "maxvit_tiny_pm_256",
    "maxxvit_rmlp_nano_rw_256",
    "levit_128s",
    "levit_conv_128s",
    "coat_lite_tiny",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "fastvit_sa12",
    "focalnet_tiny_srf",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "nextvit_small",
    "pit_ti_224",
    "poolformer_s12",
    "convformer_s18",
    "caformer_s18",
    "swiftformer_xs",
    "tiny_vit_5m_224",
    "vitamin_small_224",
    "mixer_s32_224",
    "gmixer_24_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
    "convnext_atto",
    "convnextv2_atto",
    "efficientvit_b0",
    "efficientvit_m0",
    "botnet26t_256",
    "mobilenetv4_hybrid_medium",
    "shvit_s1",
    "lowformer_b0",
    "iformer_t",
    "cpubone_nano",
    "csatv2",
    "inception_next_atto",
    "repvit_m0_9",
    "mambaout_femto",
]
HALVINGS = 5
COUNTS = ("num_heads", "attn_dim", "attention_dim", "dim_out", "out_dim", "key_attn_dim", "val_attn_dim")
"""Attributes that hold the heads, or a multiple of them, in timm."""
READERS = ("qkv", "q", "k", "v", "kv")
HIDDEN = ("fc1", "fc1_g", "fc1_x")


def from_timm(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    """Builds the timm model of that name and one image of its own size."""

    def build() -> tuple[nn.Module, Any]:
        model = timm.create_model(name)
        return model, torch.randn(1, *model.pretrained_cfg["input_size"])

    return build


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {name: from_timm(name) for name in TIMM}


def by_xprune(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """What xprune makes of the model."""
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
        "error": error / max(1.0, scale),
    }


def by_torch_pruning(model: nn.Module, inputs: Any, asked: float) -> dict[str, Any]:
    """What torch-pruning makes of it: the smallest ratio that meets the MACs, or the largest tried."""
    dense = xprune.count_macs(model, inputs)
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        made = _at_ratio(model, inputs, ratio)
        got = xprune.count_macs(made[0], inputs) / dense
        if got <= asked:
            high, best = ratio, (*made, got)
        else:
            low, best = ratio, best or (*made, got)
    assert best is not None
    pruned, zeroed, got = best
    with torch.no_grad():
        expected, out = (xprune.nest.tensors_in(m.eval()(inputs))[0] for m in (zeroed, pruned))
    error = float((expected - out).abs().max() / expected.abs().max().clamp_min(1.0))
    return {"sites": "", "asked": asked, "hit": got, "error": error}


def _at_ratio(model: nn.Module, inputs: Any, ratio: float) -> tuple[nn.Module, nn.Module]:
    """(pruned, dense with the columns that read what was pruned at zero)."""
    import copy

    import torch_pruning as tp

    pruned, zeroed = copy.deepcopy(model).eval().requires_grad_(True), copy.deepcopy(model).eval()
    names = {module: name for name, module in pruned.named_modules()}
    attentions = [m for m in pruned.modules() if isinstance(getattr(m, "num_heads", None), int)]
    readers = {r: m for m in attentions for r in (getattr(m, n, None) for n in READERS) if isinstance(r, nn.Module)}
    layers = [m for m in pruned.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    readers = {layer: m for layer, m in readers.items() if layer in set(layers)}
    hidden = {m for name, m in pruned.named_modules() if name.rpartition(".")[2] in HIDDEN}
    widths = {m: sum(r.weight.shape[0] for r, owner in readers.items() if owner is m) for m in attentions}
    pruner = tp.pruner.BasePruner(
        pruned,
        (inputs,),
        importance=tp.importance.RandomImportance(),
        pruning_ratio=ratio,
        num_heads={layer: m.num_heads for layer, m in readers.items()},
        head_pruning_ratio=ratio,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[layer for layer in layers if layer not in readers and layer not in hidden],
    )
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            reads = dep.handler in (tp.prune_linear_in_channels, tp.prune_conv_in_channels)
            if reads and dep.target.module in names:
                layer: Any = zeroed.get_submodule(names[dep.target.module])
                layer.weight.data[:, list(idxs)] = 0
        group.prune()
    for module, width in widths.items():
        left = sum(r.weight.shape[0] for r, owner in readers.items() if owner is module)
        for count in COUNTS if width else ():
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, max(1, getattr(module, count) * left // width))
    return pruned, zeroed


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
        found = by_xprune(model, inputs) if side == "xprune" else by_torch_pruning(model, inputs, asked)
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
    """The rows as a table, both sides of a model on one line."""

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
    return "\n".join(lines)


def main(
    only: Annotated[str, typer.Option(help="Models whose name holds this.")] = "",
    seconds: Annotated[int, typer.Option(help="Time limit of each side of each model.")] = 60,
    gigabytes: Annotated[int, typer.Option(help="Address space of each side of each model.")] = 8,
    table: Annotated[bool, typer.Option(help="Print the recorded result as Markdown.")] = False,
    one: Annotated[str, typer.Option("--child", hidden=True)] = "",
    side: Annotated[str, typer.Option(hidden=True)] = "xprune",
    asked: Annotated[float, typer.Option(hidden=True)] = 0.5,
) -> None:
    """Runs both sides of every model and records docs/results/prunability.json."""
    if one:
        return child(one, side, asked)
    if table:
        return print(markdown(json.loads((RESULTS / "prunability.json").read_text())["rows"]))
    rows = []
    for name in [name for name in BUILDERS if only in name]:
        ours = run(name, "xprune", seconds, gigabytes, 0.5)
        theirs = run(name, "torch-pruning", seconds, gigabytes, ours.get("asked", 0.5))
        rows += [row(name, "xprune", ours), row(name, "torch-pruning", theirs)]
        print(rows[-2], rows[-1], sep="\n", flush=True)
    about = "One small model of each family: pruned exactly or refused"
    if not only:
        record("prunability", rows, about, seconds=seconds, gigabytes=gigabytes)


if __name__ == "__main__":
    typer.run(main)
