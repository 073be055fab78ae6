"""Measures whether a mask that is chosen by the label tells the model the label.

    python -m benchmarks.label_leak [--cache DIR] [--name digits-vit] [--data DIR]

X-Pruner learns one mask for each class. During learning, the objective of the paper chooses the mask of a sample by its
label, so the mask can hold the answer. This benchmark measures it for each objective and three seeds.

The mask of each class is cut at the budget. Its units are kept alone or removed, as they were in learning. Test images
are classified with the mask of their own label, and with the mask of the next class. They are also classified by one
plan for all classes, made from the mean of the masks. Nothing is fine-tuned.

- A mask holds the answer if it raises its own class far above dense accuracy, and other classes follow it to its class.
- A mask whose units are removed should harm its own class only.

The result is docs/results/label-leak.json.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import xprune
from benchmarks.record import record
from benchmarks.workloads import WORKLOADS, dense, splits
from xprune.criteria.xpruner.criterion import OBJECTIVES, XPruner

BUDGET = xprune.Budget(macs=0.3)


@torch.no_grad()
def accuracies(model: nn.Module, sites: tuple[xprune.Site, ...], rows: Tensor, loader: object) -> dict[str, float]:
    """Measures accuracy with the mask of the own class and with the mask of the next class.

    Args:
        model: The dense model.
        sites: Its sites.
        rows: Gates of 0 or 1, (classes, units). The units of all sites are side by side.
        loader: Test batches.

    Returns:
        "own row" and "next class's row": accuracy with each mask. "follows the row": the share of samples that are
        classified as the next class, with the mask of the next class.
    """
    right, wrong, followed, count = 0, 0, 0, 0
    for images, labels in loader:
        for shift in (0, 1):
            row = (labels + shift) % len(rows)
            gates = rows[row].split([site.size for site in sites], dim=1)
            with xprune.Gates(sites, gates).attached(model):
                found = model(images).argmax(1)
            if shift:
                wrong += int((found == labels).sum())
                followed += int((found == row).sum())
            else:
                right += int((found == labels).sum())
        count += len(labels)
    return {"own row": right / count, "next class's row": wrong / count, "follows the row": followed / count}


def main(
    name: Annotated[str, typer.Option(help=", ".join(WORKLOADS))] = "digits-vit",
    data: Annotated[Path | None, typer.Option(help="folder with the packed images; digits need none")] = None,
    cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense"),
    steps: Annotated[int, typer.Option(help="steps in which masks are learned")] = 400,
) -> None:
    """Measures three seeds of each objective and records them."""
    torch.set_num_threads(1)
    rows = []
    for seed in (0, 1, 2):
        model, found = dense(name, data, seed, cache), splits(WORKLOADS[name], data, seed)
        inputs = next(iter(found.test))[0][:2]
        sites = xprune.find_sites(model, inputs)
        plain = xprune.evaluate(model, found.test).metric
        for objective in OBJECTIVES:
            # All steps train the masks of the classes, none the mask that classes share.
            learned = XPruner(objective=objective, steps=steps, shared=0.0, aggregate="mean")
            scores = xprune.score(model, sites, found.train, learned, budget=BUDGET, seed=seed)
            gates = []
            for label in range(len(scores.classwise[0])):
                # The scores of one class alone make the plan of its mask.
                values = tuple(table[label] for table in scores.classwise)
                plan = xprune.select(
                    model, xprune.Scores(sites, values, "row", scale="plan"), BUDGET, example_inputs=inputs
                )
                kept = [torch.zeros(site.size) for site in sites]
                for gate, keep in zip(kept, plan.keeps, strict=True):
                    gate[list(keep)] = 1
                row = torch.cat(kept)
                gates.append(1 - row if OBJECTIVES[objective].gone else row)
            plan = xprune.select(model, scores, BUDGET, example_inputs=inputs)
            shared = xprune.evaluate(xprune.apply(model, plan, inputs), found.test).metric
            common = {"objective": objective, "seed": seed, "dense": plain}
            found_by_row = accuracies(model, sites, torch.stack(gates), found.test)
            rows.append({**common, **found_by_row, "one plan for all": shared})
    about = (
        f"{name}, accuracy on test images with masks of single classes at {BUDGET.macs:.0%} of the MACs, no fine-tuning"
    )
    record(
        "label-leak",
        rows,
        about,
        steps=steps,
        note="only the masks of the classes are learned: shared=0, aggregate=mean",
    )


if __name__ == "__main__":
    typer.run(main)
