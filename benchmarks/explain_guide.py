"""Makes the pictures and figures of docs/explain.md.

    python -m benchmarks.explain_guide [--cache DIR]

The digits ViT of `benchmarks.proof`, seed 0, is pruned to 30 % of its MACs with the masks of X-Pruner and fine-tuned.
Then the class-wise scores of three criteria are measured on test images: what a class loses when the units that it
needs most are removed. The result is docs/explain/*.png, with a picture of the report in a browser, and
docs/results/explain-guide.json.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

import xprune
from benchmarks.record import RESULTS, record
from benchmarks.workloads import WORKLOADS, dense, splits
from xprune.explain import Faithfulness, agreement, faithfulness

NAME, SEED, BUDGET = "digits-vit", 0, xprune.Budget(macs=0.3)
OTHERS = ("taylor", "captum:IntegratedGradients")
FOLDER = RESULTS.parent / "explain"
# Kind of plot -> width and height in inches.
PLOTS = {"units": (6.4, 3.4), "classes": (6.8, 3.4), "accuracy": (6.4, 3.0)}


def main(cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense")) -> None:
    """Prunes the model, measures the explanations, draws the pictures and records the figures."""
    torch.set_num_threads(1)
    workload, data, model = WORKLOADS[NAME], splits(WORKLOADS[NAME], None, SEED), dense(NAME, None, SEED, cache)
    result = xprune.Pruner(model, "xpruner", BUDGET, finetune=workload.tune, seed=SEED).run(data.train, data.test)
    print(result.summary())
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind, size in PLOTS.items():
        axes = Figure(figsize=size, layout="constrained").add_subplot()
        result.plot(kind, axes).figure.savefig(FOLDER / f"{kind}.png", dpi=130)
    scores = {"xpruner": result.scores}
    scores |= {name: xprune.score(model, result.plan.sites, data.train, name, seed=SEED) for name in OTHERS}
    curves: dict[str, Faithfulness] = {}
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(scores), sharey=True), scores.items(), strict=True):
        curves[name] = faithfulness(model, found, data.test, order="contrast", others=3, seed=SEED)
        curves[name].plot(axes)
    figure.savefig(FOLDER / "faithfulness.png", dpi=130)
    rows = []
    for name, found in curves.items():
        ranks = torch.tensor(list(agreement(scores[name], result.scores, "contrast").values())).nanmean()
        row = {"criterion": name, "deletion gap": found.gap, "insertion gap": found.insertion_gap}
        rows.append(row | {"chance": found.chance[0].gap, "rank correlation with xpruner": float(ranks)})
    record(
        "explain-guide",
        rows,
        "deletion and insertion on test images, units in order of contrast, for docs/explain.md",
        budget=BUDGET.macs,
        seed=SEED,
    )
    with tempfile.TemporaryDirectory() as folder:
        _photograph(result.report(Path(folder) / "report.html", faithfulness=curves))


def _photograph(page: Path) -> None:
    """Saves a picture of the report in headless Chromium, after all its charts are drawn."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 1500})
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-ready]", timeout=120_000)
        tab.screenshot(path=FOLDER / "report.png")
        browser.close()


if __name__ == "__main__":
    typer.run(main)
