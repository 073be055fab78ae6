"""Prunes a language model of 7 billion parameters block by block, and measures memory and time.

    python -m benchmarks.blockwise --folder DIR [--layers 32]

The model has the architecture of Llama and random weights in bfloat16. It is written to DIR/dense, one block at a time.
`xprune.prune_folder` prunes it to 80 % of its MACs by magnitude, and writes the artefact to DIR/pruned in shards. Then
the artefact is opened with `xprune.load(..., offload=True)`, and its first and its last block are compared with the
blocks of the dense model with gates of 0 on the removed units. As a control, the same comparison is made with a gate of
0 on one other neuron. It has to fail.

Each step runs in a separate process. Its memory is the peak during the step minus the memory that the process holds
after it has pruned a tiny model. There are two peaks. "anonymous" is what the process has allocated (RssAnon, read
every 5 ms). "resident" also counts pages of files that are mapped into memory (VmHWM), which the system can take back
at any time. The goal: at most 3 blocks and the embeddings, in both. "seconds" is the time without that in which the
process was stopped. The result is docs/results/blockwise-llama-7b.json.

It needs Linux, because it reads memory from /proc, and 30 GB of disk space. What was written is removed at the end.
With --keep it stays, and the next call runs only the steps whose result is not in DIR.
"""

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

import xprune
from benchmarks.record import record

BUDGET, TOKENS, SEED = 0.8, 64, 0
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
STEPS = ("prune_folder", "reload and compare")
EVERY = 0.005
"""The seconds between two readings of the anonymous memory."""
STOPPED = 5.0
"""If two readings are more seconds apart, the process was stopped in between, so that another program could measure."""


def write_dense(folder: Path, **shape: int) -> None:
    """Writes a model of random weights in bfloat16 in the layout of transformers, a file for each block."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = np.random.Generator(np.random.SFC64(SEED))
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    parts: dict[str, list[str]] = {}
    for name in dict(model.named_parameters()):
        # "model.layers.3.mlp.up_proj.weight" belongs to the part "model.layers.3".
        parts.setdefault(".".join(name.split(".")[:3]), []).append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: _random(model.get_parameter(name), generator) for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _random(like: Tensor, generator: np.random.Generator) -> Tensor:
    """Returns random weights: around 1 for a norm layer, and around 0 for anything else.

    Their sign and fraction are random bits, and their exponent is -6. So their absolute value is from 1/64 to 1/32.
    Bits take a tenth of the time of normal numbers.
    """
    bits = np.frombuffer(generator.bytes(2 * like.numel()), dtype=np.uint16) & np.uint16(0x807F) | np.uint16(0x3C80)
    made = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(like.shape)
    return made + 1 if like.dim() == 1 else made


def _status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes, such as "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


class Peaks:
    """Measures the peaks of this process's memory in a `with` block, beyond the memory at its start, in bytes."""

    def __enter__(self) -> "Peaks":
        gc.collect()
        # Resets the peak that the kernel keeps.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = {name: _status(name) for name in ("VmRSS", "RssAnon")}
        self.anonymous, self.resident, self.stopped, self._ends = 0, 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._clocks = time.perf_counter(), time.process_time()
        return self

    def _watch(self) -> None:
        """Reads the anonymous memory until the block ends. Adds up the times in which the process was stopped."""
        last = time.perf_counter()
        while not self._ends.wait(EVERY):
            self.anonymous = max(self.anonymous, _status("RssAnon") - self._before["RssAnon"])
            now = time.perf_counter()
            self.stopped += now - last if now - last > STOPPED else 0.0
            last = now

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = (
            now - then for now, then in zip((time.perf_counter(), time.process_time()), self._clocks, strict=True)
        )
        self.resident = _status("VmHWM") - self._before["VmRSS"]
        self._ends.set()
        self._thread.join()

    def row(self) -> dict[str, float]:
        """Returns the measured values."""
        return {
            "peak anonymous GB": self.anonymous / 1e9,
            "peak resident GB": self.resident / 1e9,
            "seconds": self.seconds - self.stopped,
            "seconds stopped": self.stopped,
            "CPU seconds": self.cpu_seconds,
        }


def prune(folder: Path) -> dict[str, Any]:
    """Prunes the model in DIR/dense. Returns the peaks and what is in the artefact."""
    with Peaks() as peaks:
        found = xprune.prune_folder(
            folder / "dense", folder / "pruned", xprune.Budget(macs=BUDGET), "magnitude", tokens=TOKENS, seed=SEED
        )
    kept = {kind: [0, 0] for kind in ("head", "neuron")}
    for site, keep in zip(found.plan.sites, found.plan.keeps, strict=True):
        kept[site.kind][0] += len(keep)
        kept[site.kind][1] += site.size
    shards = [path.stat().st_size for path in (folder / "pruned").glob("*.safetensors")]
    return {
        **peaks.row(),
        "what": {
            "MACs kept": found.pruned["macs"] / found.dense["macs"],
            "parameters": int(found.dense["params"]),
            "parameters kept": int(found.pruned["params"]),
            "units kept": {kind: f"{n} of {size}" for kind, (n, size) in kept.items()},
            "shards": len(shards),
            "largest shard GB": max(shards) / 1e9,
            "artefact GB": sum(shards) / 1e9,
            "largest error of a block": max(found.errors),
        },
    }


def compare(folder: Path) -> dict[str, Any]:
    """Opens the artefact, runs it, and compares its first and last block with the gated dense blocks."""
    from xprune.artefact.save_load import read_header
    from xprune.artefact.shards import Stored
    from xprune.blockwise.blocks import Alone, fill, find_blocks
    from xprune.blockwise.folder import open_folder
    from xprune.blockwise.walk import by_name, without_cache
    from xprune.surgery.exactness import prove

    with Peaks() as peaks:
        model = xprune.load(folder / "pruned", offload=True)
        opened = open_folder(folder / "dense")
        blocks = find_blocks(opened)
        plan = xprune.Plan.from_json(read_header(folder / "pruned")["plan"])
        wanted, inputs = (0, blocks.count - 1), dict[int, Any]()

        def keep(index: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                inputs[index] = by_name(module, args, kwargs)

            return hook

        for index in wanted:
            block = model.get_submodule(blocks.at(index))
            block.register_forward_pre_hook(keep(index), with_kwargs=True)
        tokens = torch.randint(SHAPE["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), without_cache(model):
            logits: Tensor = model(input_ids=tokens).logits
        rows, stored = {}, Stored.in_files(sorted((folder / "pruned").glob("*.safetensors")))
        for index in wanted:
            path = blocks.at(index)
            dense = opened.model.get_submodule(path)
            pieces = [(s, k) for s, k in zip(plan.sites, plan.keeps, strict=True) if blocks.holds(s.name, index)]
            own = xprune.Plan(*(tuple(each) for each in zip(*pieces, strict=True)))
            small = xprune.load(folder / "pruned", offload=True).get_submodule(path)
            from accelerate.hooks import remove_hook_from_submodules

            remove_hook_from_submodules(small)
            fill(dense, opened.stored, path)
            fill(small, stored, path)
            found = prove(Alone(path, dense), Alone(path, small), own, inputs[index])
            other = prove(Alone(path, dense), Alone(path, small), _other(own), inputs[index], thorough=False)
            rows[path] = {
                "exact": not found.problem,
                "error": found.difference.error,
                "size of the output": found.difference.scale,
                "control is refused": bool(other.problem),
                "control error": other.difference.error,
            }
            del dense, small, found, other
            gc.collect()
    return {**peaks.row(), "what": {**rows, "finite outputs": bool(logits.isfinite().all())}}


def _other(plan: xprune.Plan) -> xprune.Plan:
    """Returns a plan in which one kept neuron is exchanged for a removed one."""
    keeps = list(plan.keeps)
    for place, (site, keep) in enumerate(zip(plan.sites, plan.keeps, strict=True)):
        removed = sorted(set(range(site.size)) - set(keep))
        if site.kind == "neuron" and removed:
            keeps[place] = tuple(sorted({*keep[1:], removed[0]}))
    return xprune.Plan(plan.sites, tuple(keeps))


def child(step: str, folder: Path) -> None:
    """Runs one step and writes its result to DIR. It is called in a separate process."""
    with tempfile.TemporaryDirectory() as tiny:
        # Libraries load and allocate at the first use.
        write_dense(Path(tiny) / "dense", **TINY)
        xprune.prune_folder(Path(tiny) / "dense", Path(tiny) / "pruned", xprune.Budget(macs=0.9), tokens=8)
        with torch.no_grad():
            xprune.load(Path(tiny) / "pruned", offload=True)(input_ids=torch.zeros(1, 4, dtype=torch.long))
    found = prune(folder) if step == STEPS[0] else compare(folder)
    (folder / f"{step}.json").write_text(json.dumps(found))


def main(
    folder: Annotated[Path, typer.Option(help="folder for the dense and the pruned model")],
    layers: Annotated[int, typer.Option(help="number of blocks")] = 32,
    step: Annotated[str, typer.Option(help="internal: the step that a child process measures")] = "",
    keep: Annotated[bool, typer.Option(help="keep the folder")] = False,
) -> None:
    """Writes the model, measures each step in a child process, and records the result."""
    torch.set_num_threads(1)
    if step:
        return child(step, folder)
    shape = {**SHAPE, "num_hidden_layers": layers}
    began = time.perf_counter()
    if not (folder / "dense").exists():
        write_dense(folder / "dense", **shape)
    print(f"written in {time.perf_counter() - began:.0f} s", flush=True)
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    width = hidden // heads
    matrices = 2 * hidden * hidden + 2 * hidden * width * shape["num_key_value_heads"] + 3 * hidden * inner
    block, embeddings = 2 * (matrices + 2 * hidden), 2 * 2 * hidden * shape["vocab_size"]
    rows = []
    try:
        for name in STEPS:
            result = folder / f"{name}.json"
            if not result.exists():
                command = [sys.executable, "-m", "benchmarks.blockwise", "--folder", str(folder), "--step", name]
                subprocess.run(command, check=True)
            found = json.loads(result.read_text())
            peaks = {
                f"{kind} in blocks beyond embeddings": (found[f"peak {kind} GB"] * 1e9 - embeddings) / block
                for kind in ("anonymous", "resident")
            }
            rows.append({"step": name, **{key: value for key, value in found.items() if key != "what"}, **peaks})
            rows[-1]["what"] = found["what"]
            print(rows[-1], flush=True)
    finally:
        if not keep:
            # DIR may hold files of others.
            for name in ("dense", "pruned"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in STEPS:
                (folder / f"{name}.json").unlink(missing_ok=True)
    record(
        f"blockwise-llama-{'7b' if layers == 32 else f'{layers}-layers'}",
        rows,
        "a Llama in bfloat16 with random weights, pruned block by block to 80 % of its MACs by magnitude",
        shape=shape,
        tokens=TOKENS,
        samples=2,
        block_GB=block / 1e9,
        embeddings_GB=embeddings / 1e9,
        goal_blocks_beyond_embeddings=3,
    )


if __name__ == "__main__":
    typer.run(main)
