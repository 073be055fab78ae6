"""The leak of the paper's objective: a mask picked by the label can tell the model the answer.

    python -m benchmarks.label_leak --data DIR --cache DIR [--name digits-vit]

Each class's row of masks is cut at the budget, and its units are kept alone, or taken away, as they were learned.
Accuracy with the row of the sample's own label, with that of the next class, and with one plan made of the mean of all
rows, on test images that trained nothing. A row that helps its own label far above dense accuracy, and sends others to
its class, holds the answer and not what the class needs; one that is taken away should harm its own label alone.
"""

from pathlib import Path

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
    """Accuracy with the own class's row and with the next one's; share of the latter that goes to the row's class."""
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


def main(name: str = "digits-vit", data: Path | None = None, cache: Path = Path("dense"), steps: int = 400) -> None:
    """Measures three seeds of each objective and records them."""
    torch.set_num_threads(1)
    rows = []
    for seed in (0, 1, 2):
        model, found = dense(name, data, seed, cache), splits(WORKLOADS[name], data, seed)
        inputs = next(iter(found.test))[0][:2]
        sites = xprune.find_sites(model, inputs)
        plain = xprune.evaluate(model, found.test).metric
        for objective in OBJECTIVES:
            learned = XPruner(objective=objective, steps=steps, shared=0.0, aggregate="mean")
            scores = xprune.score(model, sites, found.train, learned, budget=BUDGET, seed=seed)
            gates = []
            for label in range(len(scores.classwise[0])):
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
    about = f"{name}, {BUDGET.macs:.0%} of the MACs, no fine-tuning, test images"
    record("label-leak", rows, about, steps=steps, note="rows are of classes alone: shared=0, mean over classes")


if __name__ == "__main__":
    typer.run(main)
