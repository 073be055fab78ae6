"""The demo: a small ViT on scikit-learn's scanned digits, pruned to half its MACs with every criterion."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xprune
from xprune import report
from xprune.artefact.files import check_file, check_folder, is_stamped
from xprune.data import digits
from xprune.pipeline import Run

ARCH = "vit_tiny_patch16_224"
KWARGS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 6,
    "num_classes": 10,
}
DENSE = xprune.Finetune(epochs=40, lr=2e-3)
TUNE = xprune.Finetune(epochs=5, lr=5e-4)
BUDGET = xprune.Budget(macs=0.5)


def build() -> nn.Module:
    """The dense ViT, 6 blocks of width 96 with 6 heads, untrained."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(ARCH, pretrained=False, **KWARGS)
    return model


def data() -> tuple[DataLoader[tuple[torch.Tensor, ...]], DataLoader[tuple[torch.Tensor, ...]]]:
    """1,437 digits to learn from and 360 to measure on."""
    images, labels = digits(KWARGS["img_size"])
    held = torch.arange(len(labels)) % 5 == 0
    train = DataLoader(TensorDataset(images[~held], labels[~held]), batch_size=64, shuffle=True)
    return train, DataLoader(TensorDataset(images[held], labels[held]), batch_size=128)


def dense_model(cache: Path, console: Console) -> nn.Module:
    """The trained dense model, from the cache where it is there."""
    model, path = build(), cache / f"digits-vit-{DENSE.epochs}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        console.print(f"dense model: from {path}")
        return model.eval()
    start = time.perf_counter()
    model = xprune.finetune(model, data()[0], DENSE, what="training of the dense model")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(model.state_dict(), temporary)
    temporary.replace(path)
    console.print(f"dense model: trained in {time.perf_counter() - start:.0f} s, kept in {path}")
    return model


def run(out: Path, cache: Path | None, console: Console) -> None:
    """Prunes with each criterion of the table, prints one table, saves one model and reads it in a new process."""
    page = out.with_suffix(".html")
    check_folder(out)
    check_file(page, is_stamped)
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    train, val = data()
    title = f"digits, {BUDGET.macs:.0%} of the MACs, {TUNE.epochs} epochs of fine-tuning, 1 seed, 360 held out"
    table = Table(title=title)
    for heading in ("criterion", "accuracy", "fine-tuned", "MACs", "parameters", "latency"):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    result = None
    with _one_thread():
        model = dense_model(cache or home / "xprune", console)
        shared = Run(model, train, val)
        for name in xprune.CRITERIA:
            result = xprune.Pruner(model, name, BUDGET, finetune=TUNE).carry_out(shared)
            dense, cut, tuned = (result.metrics[stage] for stage in ("dense", "pruned", "finetuned"))
            if not table.row_count:
                table.add_row("dense", f"{dense.accuracy:.3f}", "", *_costs(dense))
            table.add_row(name, f"{cut.accuracy:.3f}", f"{tuned.accuracy:.3f}", *_costs(tuned))
    console.print(table)
    assert result is not None
    result.save(out, arch=(ARCH, KWARGS))
    if not any(find_spec(name) is None for name in report.NEEDED):
        result.report(page, classes=[str(digit) for digit in range(10)])
        console.print(f"what was cut and why: open {page} in a browser")
    images = shared.first_held_out[0]
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.safetensors"
        save_file({"inputs": images, "outputs": result.model(images).detach()}, expected)
        subprocess.run([sys.executable, "-m", "xprune.cli.demo", str(out), str(expected)], check=True)
    console.print(f"saved in {out}: try `xprune show {out}` and `xprune export {out} --out digits.onnx`")


def check(out: Path, outputs: Path) -> None:
    """Reads the artefact in this process, and compares its outputs bit by bit with those of the one that wrote it."""
    expected = load_file(outputs)
    with torch.no_grad():
        got = xprune.load(out)(expected["inputs"])
    if not torch.equal(got, expected["outputs"]):
        raise SystemExit(f"reloaded outputs differ by {(got - expected['outputs']).abs().max():.2e}")
    print(f"reloaded in a new process: {len(got)} outputs, bit for bit equal")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for operations as small as these: several wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _costs(metrics: xprune.Metrics) -> tuple[str, str, str]:
    figures = asdict(metrics)
    return f"{figures['macs'] / 1e6:.1f} M", f"{figures['params'] / 1e3:.0f} k", f"{figures['latency_ms']:.1f} ms"


if __name__ == "__main__":
    check(Path(sys.argv[1]), Path(sys.argv[2]))
