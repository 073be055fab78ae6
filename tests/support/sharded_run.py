"""Scores with FSDP2 and without it, for tests/training/test_sharding.py."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn

import xprune
from tests.support.models import build, images, loader
from xprune.criteria.xpruner import XPruner
from xprune.pipeline import Run
from xprune.training.runtime import accelerator, stage


@cache
def dense() -> tuple[nn.Module, xprune.Scores]:
    """A ViT, and its scores by magnitude, which hold its sites."""
    model = build("vit")
    return model, xprune.score(model, xprune.find_sites(model, images()), criterion="magnitude")


def scored(criterion: Any) -> dict[str, Tensor]:
    """Scores of a ViT, from 25 samples: one of two processes gets no part of the last batch."""
    model, scores = dense()
    found = xprune.score(model, scores.sites, loader(25, 8), criterion)
    tables = {f"classes {site.name}": table for site, table in zip(found.sites, found.classwise or (), strict=False)}
    return {site.name: value for site, value in zip(found.sites, found.values, strict=True)} | tables


def thresholds() -> dict[str, Tensor]:
    """Thresholds that were learned for a ViT whose weights do not change."""
    model, scores = dense()
    chosen = xprune.LearnedThresholds(weights="frozen", steps=4)
    plan = xprune.select(model, scores, xprune.Budget(macs=0.6), chosen, loader=loader(24, 8))
    return {"thresholds": torch.tensor(plan.info["thresholds"])}


PARTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "taylor": lambda: scored("taylor"),
    "magnitude": lambda: scored("magnitude"),
    "masks": lambda: scored(XPruner(steps=6)),
    "thresholds": thresholds,
}
"""What is computed with FSDP2."""
RANDOM = ("masks", "thresholds")
"""The parts with other random numbers in each process. They are also computed by two processes with whole weights."""


def refusals() -> dict[str, str]:
    """The errors of what FSDP2 cannot do."""
    (model, scores), data = dense(), loader(16, 8)
    sites, budget = scores.sites, xprune.Budget(macs=0.6)
    tries: dict[str, Callable[[], Any]] = {
        "captum": lambda: xprune.score(model, sites, data, "captum:IntegratedGradients,n_steps=2"),
        "fine-tuning": lambda: xprune.finetune(model, data),
        "joint": lambda: Run(model, data, sites=sites).select(
            scores, budget, "learned,weights=joint", xprune.Finetune(epochs=2)
        ),
        "too few samples": lambda: xprune.score(model, sites, loader(1, 8), "taylor"),
        "weights": lambda: xprune.score(*read_by_a_weight(), data, "taylor"),
        "version 1": version_1,
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except xprune.XPruneError as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "no error"
    return found


def read_by_a_weight() -> tuple[nn.Module, list[xprune.Site]]:
    """A model, and a site of it whose units are read by a parameter and not by a layer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    return model, [xprune.Site("reader", "neuron", 3072, 1, ("1.weight",), module="1")]


def version_1() -> None:
    """Asks for FSDP of version 1."""
    with variables(FSDP_VERSION="1", FSDP_RESHARD_AFTER_FORWARD="FULL_SHARD"), stage():
        accelerator()


@contextmanager
def variables(**given: str) -> Iterator[None]:
    """Sets variables of the environment inside a `with` block."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def main(out: Path) -> None:
    """Writes the tensors of both processes, with FSDP2 and without it, and the errors."""
    results: dict[str, Tensor] = {}
    with stage():
        runner = accelerator()
        results["sharding"] = torch.tensor([runner.is_fsdp2, runner.num_processes == 2])
    for name, part in PARTS.items():
        results |= {f"sharded/{name}/{key}": value for key, value in part().items()}
        if name in RANDOM:
            with variables(ACCELERATE_USE_FSDP="false"):
                results |= {f"whole/{name}/{key}": value for key, value in part().items()}
    errors = refusals()
    both = gather_object([{name: value.double().sum().item() for name, value in results.items()}])
    if PartialState().is_main_process:
        texts = {f"error {name}": text for name, text in errors.items()}
        differing = [name for name, value in both[0].items() if value != both[1][name] and value == value]
        held = {name: value.detach().contiguous().clone() for name, value in results.items()}
        save_file(held, out / "tensors.safetensors", {**texts, "differing": " ".join(differing)})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
