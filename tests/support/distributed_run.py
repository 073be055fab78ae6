"""Prunes, fine-tunes and evaluates with several processes, for tests/training/test_distributed.py."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import xprune
from tests.support.models import build, images, loader
from tests.support.tasks import Boxes, OldMeanSquare, Rank, box_of, collated, pairs
from xprune.criteria.xpruner.criterion import XPruner
from xprune.training.runtime import accelerator, prepared


def pruned_and_tuned() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures and tensors of a whole run on 24 samples to learn from and 27, an uneven number, to measure on."""
    settings = xprune.Finetune(epochs=2, lr=1e-3, ema=0.5)
    pruner = xprune.Pruner(build("vit"), "taylor", xprune.Budget(macs=0.6), finetune=settings, seed=1)
    result = pruner.run(loader(24, 8, shuffle=True), loader(27, 8))
    odd = xprune.score(result.model, xprune.find_sites(result.model, images()), loader(27, 8), "taylor")
    keeps = list(xprune.Plan.full(result.plan.sites).keeps)
    keeps[0] = ()  # the norm in front of an attention that is gone gets no gradient, which DDP has to be told
    empty = xprune.apply(build("vit"), xprune.Plan(result.plan.sites, tuple(keeps)), images())
    empty = xprune.finetune(empty, loader(24, 8), xprune.Finetune(epochs=2), seed=1)
    figures = {name: row.to_json() for name, row in result.metrics.items()}
    figures |= {"keeps": [list(keep) for keep in result.plan.keeps], "processes": PartialState().num_processes}
    tensors = {f"weight {name}": t.detach() for name, t in result.model.state_dict().items()}
    tensors |= {f"empty {name}": t.detach() for name, t in empty.state_dict().items()}
    for title, scores in (("scores", result.scores), ("odd", odd)):
        for site, value, table in zip(scores.sites, scores.values, scores.classwise or (), strict=True):
            tensors |= {f"{title} {site.name}": value, f"{title} of classes {site.name}": table}
    return figures, {name: t.contiguous().clone() for name, t in tensors.items()}


def learned() -> dict[str, Any]:
    """What masks, thresholds and weights that learn along end as in this process."""
    selection = xprune.LearnedThresholds(weights="joint", steps=4)
    criterion, tune = XPruner(steps=6, rank=3), xprune.Finetune(epochs=2)
    pruner = xprune.Pruner(build("swin"), criterion, selection=selection, finetune=tune, seed=1)
    found = pruner.run(loader(24, 8, shuffle=True))
    sums = [float(t.double().sum()) for t in (*found.scores.values, *found.model.parameters())]
    return {"keeps": found.plan.keeps, "sums": sums}


def metrics() -> dict[str, Any]:
    """Metrics that are no mean of samples, over uneven splits: 27 samples, 2, and 1, so that a process may see none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    pixels = nn.Conv2d(3, 5, 1)
    labels = torch.randint(0, 5, (27, 4, 4), generator=torch.Generator().manual_seed(1))
    pictures = TensorDataset(torch.randn(27, 3, 4, 4, generator=torch.Generator().manual_seed(2)), labels)
    found = {}
    for samples in (27, 2, 1):
        rows = DataLoader(pairs(samples), batch_size=4)
        found[f"rank {samples}"] = xprune.evaluate(model, rows, task=Rank())
        found[f"old {samples}"] = xprune.evaluate(model, rows, task=OldMeanSquare())
    found["pixels"] = xprune.evaluate(pixels, DataLoader(pictures, batch_size=4), task=xprune.Segmentation())
    if find_spec("pycocotools"):
        for samples in (27, 1):
            rows = DataLoader([box_of(i) for i in range(samples)], batch_size=4, collate_fn=collated)
            found[f"boxes {samples}"] = xprune.evaluate(Boxes(), rows, task=xprune.Detection(classes=2))
    return {name: each.to_json() for name, each in found.items()}


def main(out: Path) -> None:
    """Writes figures.json and tensors.safetensors, which the first process does for all."""
    figures, tensors = pruned_and_tuned()
    mine = len(list(prepared(accelerator(), DataLoader(pairs(1), batch_size=4))))
    figures |= {"metrics": metrics(), "learned": gather_object([learned()]), "batches of one": gather_object([mine])}
    if PartialState().is_main_process:
        (out / "figures.json").write_text(json.dumps(figures))
        save_file(tensors, out / "tensors.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
