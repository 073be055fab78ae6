"""What each process of test_distributed.py runs: prune, fine-tune, and write down what came out."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file

import xprune
from tests.support.models import build, images, loader
from xprune.criteria.xpruner.criterion import XPruner


def main(out: Path) -> None:
    """The whole path on 24 samples to learn from and 27, an uneven number, to measure on."""
    settings = xprune.Finetune(epochs=2, lr=1e-3, ema=0.5)
    pruner = xprune.Pruner(build("vit"), "taylor", xprune.Budget(macs=0.6), finetune=settings, seed=1)
    result = pruner.run(loader(24, 8, shuffle=True), loader(27, 8))
    odd = xprune.score(result.model, xprune.find_sites(result.model, images()), loader(27, 8), "taylor")
    keeps = list(xprune.Plan.full(result.plan.sites).keeps)
    keeps[0] = ()  # the norm in front of an attention that is gone gets no gradient, which DDP has to be told
    empty = xprune.apply(build("vit"), xprune.Plan(result.plan.sites, tuple(keeps)), images())
    empty = xprune.finetune(empty, loader(24, 8), xprune.Finetune(epochs=2), seed=1)
    learned = xprune.LearnedThresholds(weights="joint", steps=4)
    tune = xprune.Finetune(epochs=2)
    joint = xprune.Pruner(build("swin"), XPruner(steps=6, rank=3), selection=learned, finetune=tune, seed=1)
    found = joint.run(loader(24, 8, shuffle=True))
    sums = [float(t.double().sum()) for t in (*found.scores.values, *found.model.parameters())]
    told = gather_object([{"keeps": found.plan.keeps, "sums": sums}])
    if PartialState().is_main_process:
        metrics = {name: row.to_json() for name, row in result.metrics.items()}
        metrics |= {"learned": told, "keeps": result.plan.keeps, "processes": PartialState().num_processes}
        (out / "metrics.json").write_text(json.dumps(metrics))
        tensors = {f"weight {name}": t.detach() for name, t in result.model.state_dict().items()}
        tensors |= {f"empty {name}": t.detach() for name, t in empty.state_dict().items()}
        for title, scores in (("scores", result.scores), ("odd", odd)):
            for site, value, table in zip(scores.sites, scores.values, scores.classwise or (), strict=True):
                tensors |= {f"{title} {site.name}": value, f"{title} of classes {site.name}": table}
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, out / "tensors.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
