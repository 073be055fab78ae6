"""What each process of tests/training/test_distributed.py evaluates: metrics that are no mean of samples."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xprune
from tests.support.tasks import OldMeanSquare, Rank, pairs
from xprune.training.runtime import accelerator, prepared


def figures() -> dict[str, xprune.Metrics]:
    """The metrics of a small model, over uneven splits: 27 samples, and one, of which a process may see nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    pixels = nn.Conv2d(3, 5, 1)
    labels = torch.randint(0, 5, (27, 4, 4), generator=torch.Generator().manual_seed(1))
    images = TensorDataset(torch.randn(27, 3, 4, 4, generator=torch.Generator().manual_seed(2)), labels)
    found = {}
    for samples in (27, 2, 1):
        loader = DataLoader(pairs(samples), batch_size=4)
        found[f"rank {samples}"] = xprune.evaluate(model, loader, task=Rank())
        found[f"old {samples}"] = xprune.evaluate(model, loader, task=OldMeanSquare())
    found["pixels"] = xprune.evaluate(pixels, DataLoader(images, batch_size=4), task=xprune.Segmentation())
    return found


if __name__ == "__main__":
    told: dict[str, Any] = {name: metrics.to_json() for name, metrics in figures().items()}
    mine = len(list(prepared(accelerator(), DataLoader(pairs(1), batch_size=4))))
    told["batches of one sample"] = gather_object([mine])
    if PartialState().is_main_process:
        Path(sys.argv[1], "metrics.json").write_text(json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
