"""The demo: prunes a small ViT on the scanned digits of scikit-learn to half of its MACs, with each criterion."""

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
from xprune.report.gained import latency_text

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
"""The settings for the training of the dense model."""
TUNE = xprune.Finetune(epochs=5, lr=5e-4)
"""The settings for the fine-tuning of the pruned models."""
BUDGET = xprune.Budget(macs=0.5)


def build() -> nn.Module:
    """Builds the dense ViT with random weights: 6 blocks with 6 heads each, and a hidden size of 96."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(ARCH, pretrained=False, **KWARGS)
    return model


def data() -> tuple[DataLoader[tuple[torch.Tensor, ...]], DataLoader[tuple[torch.Tensor, ...]]]:
    """Returns (loader of the 1,437 digits for training, loader of the 360 other digits for measuring)."""
    images, labels = digits(KWARGS["img_size"])
    held = torch.arange(len(labels)) % 5 == 0
    train = DataLoader(TensorDataset(images[~held], labels[~held]), batch_size=64, shuffle=True)
    return train, DataLoader(TensorDataset(images[held], labels[held]), batch_size=128)


def dense_model(cache: Path, console: Console) -> nn.Module:
    """Returns the trained dense model: reads it from the folder `cache`, or trains it and stores it there."""
    model, path = build(), cache / f"digits-vit-{DENSE.epochs}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        console.print(f"Dense model: read from {path}")
        return model.eval()
    start = time.perf_counter()
    model = xprune.finetune(model, data()[0], DENSE, what="training of the dense model")
    cache.mkdir(parents=True, exist_ok=True)
    # The file gets its final name only when it is complete. So a killed demo leaves no incomplete file of this name.
    temporary = path.with_suffix(".part")
    save_file(model.state_dict(), temporary)
    temporary.replace(path)
    console.print(f"Dense model: trained in {time.perf_counter() - start:.0f} s, stored in {path}")
    return model


def run(out: Path, cache: Path | None, console: Console) -> None:
    """Runs the demo: prunes with each criterion, prints a table, saves the last model and loads it in a new process.

    Args:
        out: Folder for the pruned model. The report gets the same name with the suffix .html.
        cache: Folder for the dense model. None: the folder xprune in the cache folder of the user.
        console: The console that prints the texts and the table.

    Raises:
        ArtefactError: The folder or the report would replace files that xprune did not write.
    """
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
        # All criteria share one `Run`, which computes sites, costs and the metrics of the dense model only once.
        model = dense_model(cache or home / "xprune", console)
        task = xprune.Classification(class_names=[str(digit) for digit in range(10)])
        shared = Run(model, train, val, task=task)
        for name in xprune.CRITERIA:
            result = xprune.Pruner(model, name, BUDGET, finetune=TUNE, task=task).carry_out(shared)
            dense, cut, tuned = (result.metrics[stage] for stage in ("dense", "pruned", "finetuned"))
            if not table.row_count:
                table.add_row("dense", f"{dense.accuracy:.3f}", "", *_costs(dense))
            table.add_row(name, f"{cut.accuracy:.3f}", f"{tuned.accuracy:.3f}", *_costs(tuned))
    console.print(table)
    assert result is not None
    result.save(out, arch=(ARCH, KWARGS))
    if not any(find_spec(name) is None for name in report.NEEDED):
        result.report(page)
        console.print(f"The report {page} shows which units were removed, and why. Open it in a browser")
    images = shared.first_held_out[0]
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.safetensors"
        save_file({"inputs": images, "outputs": result.model(images).detach()}, expected)
        subprocess.run([sys.executable, "-m", "xprune.cli.demo", str(out), str(expected)], check=True)
    console.print(f"Saved in {out}. Try `xprune show {out}` and `xprune export {out} --out digits.onnx`")


def check(out: Path, outputs: Path) -> None:
    """Loads the saved model, and compares its outputs bit by bit with those of the process that saved it.

    The demo runs this function in a second process. It shows that the saved files are enough to rebuild the model.

    Args:
        out: Folder of the saved model.
        outputs: File with inputs and with the outputs that the other process computed for them.
    """
    expected = load_file(outputs)
    with torch.no_grad():
        got = xprune.load(out)(expected["inputs"])
    if not torch.equal(got, expected["outputs"]):
        raise SystemExit(f"The outputs of the reloaded model differ by {(got - expected['outputs']).abs().max():.2e}")
    print(f"Reloaded in a new process: {len(got)} outputs are equal, bit for bit")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch use one thread. The operations of the demo are so small that several threads only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _costs(metrics: xprune.Metrics) -> tuple[str, str, str]:
    """Returns (MACs, parameters, latency) as texts for the table."""
    figures = asdict(metrics)
    return f"{figures['macs'] / 1e6:.1f} M", f"{figures['params'] / 1e3:.0f} k", latency_text(metrics)


if __name__ == "__main__":
    check(Path(sys.argv[1]), Path(sys.argv[2]))
