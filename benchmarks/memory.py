"""Memory: what finding sites and cutting half of a language model need beyond the model itself.

    python -m benchmarks.memory [--billions 2]

A model of Llama's shape with random weights in bfloat16 loses half of its heads and neurons. Each step runs in a
process of its own. Its peak of resident memory is counted beyond what the process held when the model was there.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

import xprune
from benchmarks.record import record

STEPS = ("forward", "find_sites", "apply", "apply(in_place=True)")
GOALS = {"apply": 1.4}
"""Most that a step may need, in models."""
VOCABULARY, TOKENS = 32_000, 64


def build(billions: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """(model of about so many billion parameters, a row of tokens)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 16
    width = round((billions * 1e9 / (layers * 11.5)) ** 0.5 / 128) * 128  # a layer has about 11.5 x width^2 parameters
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokens = torch.randint(VOCABULARY, (1, TOKENS))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def half(sites: tuple[xprune.Site, ...]) -> xprune.Plan:
    """Half of the units of every site, drawn at random."""
    torch.manual_seed(0)
    keeps = (sorted(torch.randperm(site.size)[: site.size // 2].tolist()) for site in sites)
    return xprune.Plan(tuple(sites), tuple(tuple(keep) for keep in keeps))


def bytes_of(model: nn.Module) -> int:
    """Bytes of the model's tensors."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def peak_of(run: Callable[[], object]) -> int:
    """The peak of this process's resident memory during a run, in bytes beyond what it held before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def child(step: str, billions: float) -> None:
    """Prints bytes of the model, its parameters, bytes at the peak beyond it, and seconds, of one step."""
    model, inputs = build(billions)
    with torch.no_grad():
        model(**{name: tensor[:, :1] for name, tensor in inputs.items()})  # libraries allocate at the first forward
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


def main(billions: float = 0.3, step: str = "") -> None:
    """Measures and records; --step is how it calls itself."""
    torch.set_num_threads(1)
    if step:
        return child(step, billions)
    rows = []
    for name in STEPS:
        command = [sys.executable, "-m", "benchmarks.memory", "--billions", str(billions), "--step", name]
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
    record("memory", rows, "Llama's shape in bfloat16, half of the units of each site", goals_in_models=GOALS)


if __name__ == "__main__":
    typer.run(main)
