"""Measures what pruning itself costs: the time and memory of each stage, on models of four shapes and by depth.

    python -m benchmarks.costs_of_ours [--only TEXT] [--rounds 2]
    python -m benchmarks.costs_of_ours --depths

Half of the MACs are removed, as heads and neurons, with magnitude scores. The inputs are two small samples, and torch
uses one thread. The stages of xprune are those of a run: finding sites, measuring costs, scoring, selecting, the cut,
and its proof. torch-pruning has two stages: the constructor of BasePruner, which traces the model, and one step, which
scores, selects and cuts. It has no budget, so it removes half of the units of each layer. FastNAS of ModelOpt searches
the widths of the MLPs. Its candidates are compared by their loss on the two samples.

Each cell runs in a process of its own. Before it is timed, the same is done with a model of one block, because
libraries load and allocate at their first use. Times are CPU seconds, since other programs lengthen the time on the
clock. They are medians over the rounds. The memory is the peak of resident
memory during the stage beyond what the process held with the dense model, in the first round.

With --depths, the same is measured on ViTs of 12, 24, 48 and 96 blocks. The exponent is the slope of a line that is
fitted to the logarithms of depth and cost. 1 means that the cost is proportional to the depth. The goal is at most 1.

The results are docs/results/costs-side-by-side.json and costs-by-depth.json. Memory is read from /proc, so it needs
Linux. Rows of earlier runs with --only stay in the file.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

import xprune
from benchmarks.memory import bytes_of, peak_of
from benchmarks.record import RESULTS, record
from xprune.adapters import ADAPTERS
from xprune.core.interfaces import Selected
from xprune.modules.copies import shared_copy, unshare
from xprune.pipeline import Run
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify

SHARE = 0.5
"""The fraction of the MACs that stays. torch-pruning keeps this fraction of the units."""
MODELS = ("DeiT-B", "ViT-L", "Swin-B", "Llama-1B")
DEPTHS = (12, 24, 48, 96)
TIMM = {
    "DeiT-B": ("deit_base_patch16_224", {"img_size": 64}),
    "ViT-L": ("vit_large_patch16_224", {"img_size": 64}),
    "Swin-B": ("swin_base_patch4_window7_224", {}),
}
LIBRARIES = ("xprune", "torch-pruning", "FastNAS")
STAGES = {
    "xprune": ("start", "find", "costs", "score", "select", "cut", "proof"),
    "torch-pruning": ("find", "score, select, cut"),
    "FastNAS": ("search",),
}


def build(name: str, small: bool = False) -> tuple[nn.Module, Any, Any]:
    """Returns a model with random weights, two samples, and their labels.

    Args:
        name: One of `MODELS`, or a number of blocks.
        small: True for the same model with one block in each stage.
    """
    torch.manual_seed(0)
    if name == "Llama-1B":
        return _llama(1 if small else 16)
    if name.isdigit():
        arch, more = "deit_tiny_patch16_224", {"img_size": 64, "depth": 1 if small else int(name)}
    else:
        arch, more = TIMM[name]
        if small:
            more = {**more, **({"depths": (1, 1, 1, 1)} if "swin" in arch else {"depth": 1})}
    size = more.get("img_size", 224)
    return timm.create_model(arch, **more).eval(), torch.randn(2, 3, size, size), torch.tensor([0, 1])


def _llama(layers: int) -> tuple[nn.Module, Any, Any]:
    """Returns a Llama of the shape of the smallest Llama 3 in bfloat16, with two samples of 16 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokens = torch.randint(config.vocab_size, (2, 16))
    return model, {"input_ids": tokens}, tokens


class Stages:
    """Runs stages one after another, and holds the seconds and the peak of memory of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.held = 0

    def run(self, name: str, stage: Callable[[], Any]) -> Any:
        """Runs a stage and returns its result. Memory counts from what the process held before the first stage."""
        found: list[Any] = []

        def work() -> None:
            start = time.process_time()
            found.append(stage())
            self.seconds[name] = time.process_time() - start

        # `peak_of` counts from the start of the stage. What earlier stages still hold is added.
        before = _resident()
        self.held = self.held or before
        self.peaks[name] = max(0, before - self.held) + peak_of(work)
        return found[0]


def _resident() -> int:
    """Returns the resident memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def xprune_stages(model: nn.Module, inputs: Any, labels: Any) -> tuple[Stages, nn.Module]:
    """Prunes with xprune. Returns the stages and the pruned model."""
    budget, stages = xprune.Budget(macs=SHARE), Stages()
    task = None if isinstance(inputs, Tensor) else xprune.LanguageModel()
    batch = (inputs, labels) if isinstance(inputs, Tensor) else {**inputs, "labels": labels}
    run = stages.run("start", lambda: Run(model, [batch], task=task, latency=False))
    stages.run("find", lambda: run.sites)
    stages.run("costs", lambda: run.costs)
    scores = stages.run("score", lambda: run.score("magnitude", budget))
    selected: Selected = stages.run("select", lambda: run.select(scores, budget))
    # These are the two parts of `xprune.apply`.
    pruned = stages.run("cut", lambda: unshare(remove_units(shared_copy(model), selected.plan, ADAPTERS), model))
    stages.run("proof", lambda: verify(model, pruned, selected.plan, run.example))
    return stages, pruned


def torch_pruning_stages(model: nn.Module, inputs: Any, labels: Any) -> tuple[Stages, nn.Module]:
    """Prunes with torch-pruning, in place. Returns the stages and the pruned model."""
    import torch_pruning as tp

    stages = Stages()
    heads: dict[nn.Module, int] = {}
    config = getattr(model, "config", None)
    for module in model.modules():
        if hasattr(module, "qkv"):
            heads[module.qkv] = module.num_heads
        if hasattr(module, "q_proj"):
            heads |= {module.q_proj: config.num_attention_heads}
            heads |= {layer: config.num_key_value_heads for layer in (module.k_proj, module.v_proj)}
    hidden = [m for name, m in model.named_modules() if name.endswith((".fc1", "gate_proj", "up_proj"))]
    wanted = {*heads, *hidden}
    tables = [m.relative_position_bias_table for m in model.modules() if hasattr(m, "relative_position_bias_table")]
    others = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in wanted]
    pruner = stages.run(
        "find",
        lambda: tp.pruner.BasePruner(
            model,
            (inputs,) if isinstance(inputs, Tensor) else inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - SHARE,
            num_heads=heads,
            head_pruning_ratio=1 - SHARE,
            prune_num_heads=True,
            prune_head_dims=False,
            ignored_layers=[*others, *tables],
        ),
    )
    stages.run("score, select, cut", pruner.step)
    return stages, model


def correct(pruned: nn.Module, name: str) -> None:
    """Corrects the numbers of heads that torch-pruning leaves wrong. Without it, many pruned models do not run."""
    from benchmarks.peers import correct_heads

    dense = build(name)[0]
    for path, module in dense.named_modules():
        if hasattr(module, "qkv"):
            correct_heads(pruned.get_submodule(path), module.qkv.weight.detach())


def fastnas_stages(model: nn.Module, inputs: Any, labels: Any) -> tuple[Stages, nn.Module]:
    """Prunes with FastNAS of ModelOpt. Returns the stages and the pruned model."""
    import modelopt.torch.prune as mtp
    from modelopt.torch.nas.utils import inference_flops

    stages, example = Stages(), inputs[:1]
    removed = (1 - SHARE) * xprune.count_macs(model, example)

    def loss(candidate: nn.Module) -> float:
        with torch.no_grad():
            return -float(nn.functional.cross_entropy(candidate(inputs), labels))

    def search() -> nn.Module:
        config = {
            "data_loader": [(inputs, labels)],
            "collect_func": lambda batch: batch[0],
            "score_func": loss,
            "checkpoint": None,
            "verbose": False,
        }
        limit = {"flops": inference_flops(model, example, unit=1) - 2 * removed}
        found: nn.Module = mtp.prune(model, mode="fastnas", constraints=limit, dummy_input=example, config=config)[0]
        return found

    return stages, stages.run("search", search)


RUNS = {"xprune": xprune_stages, "torch-pruning": torch_pruning_stages, "FastNAS": fastnas_stages}


def child(library: str, name: str, rounds: int) -> None:
    """Measures one cell and prints it as JSON in the last line. It is called in a separate process."""
    RUNS[library](*build(name, small=True))
    row: dict[str, Any] = {}
    seconds: list[dict[str, float]] = []
    for number in range(rounds):
        model, inputs, labels = build(name)
        with torch.no_grad():
            model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
        dense = xprune.count_macs(model, inputs)
        if not number:
            row |= {"parameters": sum(p.numel() for p in model.parameters()), "model GB": bytes_of(model) / 1e9}
        stages, pruned = RUNS[library](model, inputs, labels)
        seconds.append(stages.seconds)
        if not number:
            row["peaks GB"] = {stage: peak / 1e9 for stage, peak in stages.peaks.items()}
            row["peak GB"] = max(row["peaks GB"].values())
            row["MACs"] = _share(library, name, pruned, inputs, dense)
        del model, pruned, stages
    row["seconds"] = {stage: statistics.median(each[stage] for each in seconds) for stage in STAGES[library]}
    row["total s"] = statistics.median(sum(each.values()) for each in seconds)
    print(json.dumps(row))


def _share(library: str, name: str, pruned: nn.Module, inputs: Any, dense: float) -> float | str:
    """Returns the fraction of the MACs that the pruned model still has, or why it cannot be counted."""
    if library == "torch-pruning":
        correct(pruned, name)
    try:
        return xprune.count_macs(pruned, inputs) / dense
    except xprune.XPruneError as error:
        return f"the pruned model does not run: {error}"[:200]


COLUMNS = ("parameters", "model GB", "MACs", "total s", "peak GB", "seconds", "peaks GB", "error")
"""The columns of a row after the model and the library. A column without a value holds None."""


def cell(library: str, name: str, rounds: int, python: str) -> dict[str, Any]:
    """Measures one cell in a child process and returns its row. An error of the child is a row too."""
    command = [python, "-m", "benchmarks.costs_of_ours", "--cell", f"{library}|{name}", "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, Any] = {}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not set("│╰╭") & set(line)]
        found["error"] = lines[-1].strip()[:300] if lines else f"exit status {done.returncode}"
    else:
        found = json.loads(done.stdout.splitlines()[-1])
    row = _row(library, name, **found)
    print(row, flush=True)
    return row


def _row(library: str, name: str, **found: Any) -> dict[str, Any]:
    """Returns a row with all columns."""
    return {"model": name, "library": library, **{column: found.get(column) for column in COLUMNS}}


def exponent(depths: list[int], costs: list[float]) -> float:
    """Returns the exponent of growth: the slope of the line of least squares through the logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3.0, 6.0, 12.0]), 6)
        1.0
    """
    x, y = [math.log(depth) for depth in depths], [math.log(max(cost, 1e-9)) for cost in costs]
    middle, level = statistics.mean(x), statistics.mean(y)
    above = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle) ** 2 for a in x)


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns library -> what was measured -> exponent of growth with the depth."""
    found: dict[str, dict[str, float]] = {}
    for library in dict.fromkeys(row["library"] for row in rows):
        own = [row for row in rows if row["library"] == library and not row["error"]]
        if len(own) < 2:
            continue
        depths = [int(row["model"]) for row in own]
        costs = {column: [row[column] for row in own] for column in ("total s", "peak GB")}
        costs |= {f"{stage} s": [row["seconds"][stage] for row in own] for stage in STAGES[library]}
        found[library] = {name: round(exponent(depths, values), 2) for name, values in costs.items()}
    return found


def merged(name: str, rows: list[dict[str, Any]], fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns the rows of the file together with new ones, which replace old rows of the same cell."""
    file = RESULTS / f"{name}.json"
    old = json.loads(file.read_text())["rows"] if file.is_file() else []
    cells = {tuple(row[field] for field in fields): row for row in [*old, *rows]}
    return list(cells.values())


def main(
    rounds: Annotated[int, typer.Option(help="measurements of each cell")] = 2,
    only: Annotated[str, typer.Option(help="only cells whose LIBRARY|MODEL contains this text")] = "",
    depths: Annotated[bool, typer.Option(help="measure how the costs grow with the depth")] = False,
    fastnas: Annotated[str, typer.Option(help="the Python of an environment with nvidia-modelopt, for FastNAS")] = "",
    keep: Annotated[bool, typer.Option(help="write the result to docs/results")] = True,
    cell_: Annotated[str, typer.Option("--cell", help="internal: the cell that a child process measures")] = "",
) -> None:
    """Measures each cell in a child process and records the result."""
    torch.set_num_threads(1)
    if cell_:
        library, _, name = cell_.partition("|")
        return child(library, name, rounds)
    names = tuple(map(str, DEPTHS)) if depths else MODELS
    cells = [(library, name) for name in names for library in LIBRARIES if only in f"{library}|{name}"]
    rows = []
    for library, name in cells:
        if library == "FastNAS" and not (fastnas or find_spec("modelopt")):
            rows.append(_row(library, name, error="nvidia-modelopt is not installed"))
            continue
        rows.append(cell(library, name, rounds, fastnas if library == "FastNAS" and fastnas else sys.executable))
    file = "costs-by-depth" if depths else "costs-side-by-side"
    rows = merged(file, rows, ("model", "library")) if keep else rows
    about = "time and memory of pruning to half of the MACs with magnitude scores, two small samples, 1 thread"
    if not keep:
        print(exponents(rows) if depths else "")
    elif depths:
        record(file, rows, f"{about}: ViTs of 192 features by depth", exponents=exponents(rows), goal=1.0)
    else:
        record(file, rows, about, share=SHARE)


if __name__ == "__main__":
    typer.run(main)
