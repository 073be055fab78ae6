"""Measures the memory that `find_sites` and `apply` need beyond the model, on a language model.

    python -m benchmarks.memory [--billions 2]

The model has the architecture of Llama, random weights and dtype bfloat16. Half of its heads and neurons are removed at
random. Each step runs in a separate process. Its memory is the peak of resident memory during the step, minus the
memory that the process holds before the step, with the model loaded. The goal: `apply` needs at most 1.4 times the
memory of the model. The result is docs/results/memory.json.

It needs Linux, because it reads memory from /proc.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import xprune
from benchmarks.record import record

STEPS = ("forward", "find_sites", "apply", "apply(in_place=True)")
GOALS = {"apply": 1.4}
"""Step -> the most memory that it may need, as a multiple of the model's."""
VOCABULARY, TOKENS = 32_000, 64


def build(billions: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns a model of about this many billion parameters, and one sample of tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 16
    # A layer has about 11.5 x hidden_size^2 parameters. A multiple of 128 gives two heads of 64 features to each
    # key-value head.
    hidden_size = round((billions * 1e9 / (layers * 11.5)) ** 0.5 / 128) * 128
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    # The weights are made in bfloat16. A model in float32 that is converted would need three times the memory.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokens = torch.randint(VOCABULARY, (1, TOKENS))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def half(sites: tuple[xprune.Site, ...]) -> xprune.Plan:
    """Returns a plan that keeps half of the units of every site, drawn at random."""
    torch.manual_seed(0)
    keeps = (sorted(torch.randperm(site.size)[: site.size // 2].tolist()) for site in sites)
    return xprune.Plan(tuple(sites), tuple(tuple(keep) for keep in keeps))


def bytes_of(model: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def peak_of(run: Callable[[], object]) -> int:
    """Calls `run` and returns the memory that it needed.

    Returns:
        The peak of this process's resident memory during the call, in bytes, minus its resident memory before.
    """
    gc.collect()
    # Resets the peak that the kernel keeps.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes: "VmRSS" is resident memory, "VmHWM" its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def child(step: str, billions: float) -> None:
    """Runs one step and prints four numbers. It is called in a separate process.

    They are the bytes of the model, the number of parameters, the bytes at the peak beyond the model, and the seconds.
    """
    model, inputs = build(billions)
    with torch.no_grad():
        # Libraries load and allocate at the first forward. One token is enough for that.
        model(**{name: tensor[:, :1] for name, tensor in inputs.items()})
    plan = half(xprune.find_sites(model, inputs)) if step.startswith("apply") else None
    held, parameters = bytes_of(model), sum(p.numel() for p in model.parameters())
    began = time.perf_counter()

    def run() -> object:
        if step == "forward":
            with torch.no_grad():
                return model(**inputs)
        if step == "find_sites":
            return xprune.find_sites(model, inputs)
        assert plan is not None
        return xprune.apply(model, plan, inputs, in_place="in_place" in step)

    peak = peak_of(run)
    print(held, parameters, peak, time.perf_counter() - began)


def main(
    billions: Annotated[float, typer.Option(help="parameters of the model, in billions")] = 0.3,
    step: Annotated[str, typer.Option(help="internal: the step that a child process measures")] = "",
) -> None:
    """Measures each step in a child process and records the result."""
    torch.set_num_threads(1)
    if step:
        return child(step, billions)
    rows = []
    for name in STEPS:
        command = [sys.executable, "-m", "benchmarks.memory", "--billions", str(billions), "--step", name]
        # The numbers are last on stdout, after what libraries may have printed.
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        held, parameters, peak, seconds = (float(word) for word in done.stdout.split()[-4:])
        rows.append(
            {
                "step": name,
                "parameters": int(parameters),
                "model GB": held / 1e9,
                "peak beyond it GB": peak / 1e9,
                "peak in models": peak / held,
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
    record(
        "memory",
        rows,
        "memory beyond the model: Llama's architecture in bfloat16, half of the units of each site are removed",
        goals_in_models=GOALS,
    )


if __name__ == "__main__":
    typer.run(main)
