"""Compares settings of integrated gradients: the time of scoring, and the accuracy of the model as cut.

    python -m benchmarks.integrated_gradients

A step of the path costs as much as a batch with Taylor. So one may use fewer steps, or fewer batches. This benchmark
shows what each of the two costs in accuracy, with the digits and the ViT of the demo. The result is
docs/results/integrated-gradients.json.
"""

import time
from statistics import mean
from typing import Annotated, Any

import torch
import typer

import xprune
from benchmarks.record import record
from xprune.cli.demo import build, data

SETTINGS = {
    "taylor": "taylor",
    "all batches, 16 steps": "captum:IntegratedGradients,every=1",
    "one batch of 4, 16 steps (default)": "captum:IntegratedGradients",
    "all batches, 4 steps": "captum:IntegratedGradients,every=1,n_steps=4",
}
BUDGETS = (0.5, 0.3, 0.2)


def main(
    seeds: Annotated[int, typer.Option(help="the number of seeds, which choose the batches")] = 3,
    epochs: Annotated[int, typer.Option(help="epochs of the training of the dense model")] = 20,
) -> None:
    """Measures and records the result."""
    torch.set_num_threads(1)
    train, test = data()
    torch.manual_seed(0)
    model = xprune.finetune(build(), train, xprune.Finetune(epochs=epochs, lr=2e-3))
    example = next(iter(train))[0][:2]
    sites = xprune.find_sites(model, example)
    rows: list[dict[str, Any]] = []
    for name, criterion in SETTINGS.items():
        seconds, accuracies, samples = [], {share: [] for share in BUDGETS}, 0
        for seed in range(seeds):
            start = time.process_time()
            scores = xprune.score(model, sites, train, criterion, seed=seed)
            seconds.append(time.process_time() - start)
            samples = scores.info["samples"]
            for share in BUDGETS:
                plan = xprune.select(model, scores, xprune.Budget(macs=share), example_inputs=example)
                accuracies[share].append(xprune.evaluate(xprune.apply(model, plan, example), test).metric)
        row = {"setting": name, "samples": samples, "CPU seconds": mean(seconds)}
        for share, found in accuracies.items():
            row[f"accuracy at {share:.0%}"] = mean(found)
            row[f"range at {share:.0%}"] = f"{min(found):.3f} to {max(found):.3f}"
        rows.append(row)
    dense = xprune.evaluate(model, test).metric
    record(
        "integrated-gradients",
        rows,
        "integrated gradients on the digits ViT, as cut",
        dense=dense,
        seeds=seeds,
        epochs=epochs,
    )


if __name__ == "__main__":
    typer.run(main)
