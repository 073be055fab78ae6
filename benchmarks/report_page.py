"""Measures the size of a report, and how fast it opens in a browser.

    python -m benchmarks.report_page [--rounds 5]

The report is that of a large model: 12 layers with 12 heads and 3,072 neurons each, and scores for 1,000 classes. The
scores are random. The goal: the page has less than 15 MB and opens in less than 3 seconds. The result is
docs/results/report-page.json.

The page is opened in headless Chromium. The columns of the table:

- "opens s": seconds from the request of the file until the text can be read and a head can be chosen.
- "drawn s": seconds until every chart is drawn.
- "busy s": CPU seconds of the main thread of the page until then. They do not depend on other programs.

The load average of the machine is recorded too.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import xprune
from benchmarks.record import record
from xprune.core.scores import LowRank

# Screen -> its width in pixels.
WIDTHS = {"desktop": 1280, "phone": 390}


def synthetic(
    depth: int = 12, heads: int = 12, neurons: int = 3072, classes: int = 1000, rank: int | None = None
) -> xprune.PruneResult:
    """Returns a result with random scores. Its sites belong to no model.

    Args:
        depth: Number of layers.
        heads: Heads of each layer.
        neurons: Neurons of each layer.
        classes: Number of classes.
        rank: None: class-wise scores are a table (classes, units). Else: they are factors of this rank.
    """
    chance = torch.Generator().manual_seed(0)
    sites, keeps, values = [], [], []
    tables: list[torch.Tensor | LowRank] = []
    for block in range(depth):
        for part, kind, size in (("attn", "head", heads), ("mlp", "neuron", neurons)):
            name = f"blocks.{block}.{part}"
            sites.append(xprune.Site(name, kind, size, 1, (f"{name}.out",), cuts=(), module=name))
            values.append(torch.randn(size, generator=chance))
            if rank is None:
                tables.append(values[-1] + torch.randn(classes, size, generator=chance))
            else:
                left, right = (torch.randn(*shape, generator=chance) for shape in ((classes, rank), (rank, size)))
                tables.append(LowRank(left, right, values[-1]))
            keeps.append(tuple(sorted(values[-1].topk(size // 2).indices.tolist())))
    before, after = (tuple((row, 50) for row in half) for half in torch.rand(2, classes, generator=chance).tolist())
    metrics = {
        "dense": xprune.Metrics(0.8, 0.9, 50 * classes, macs=10**9, params=10**8, by_class=before),
        "pruned": xprune.Metrics(0.7, 1.2, 50 * classes, macs=5 * 10**8, params=6 * 10**7, by_class=after),
    }
    scores = xprune.Scores(tuple(sites), tuple(values), "random", tuple(tables), {}, "plan")
    return xprune.PruneResult(nn.Identity(), xprune.Plan(tuple(sites), tuple(keeps)), scores, metrics)


def main(rounds: Annotated[int, typer.Option(help="how often the page is opened on each screen")] = 5) -> None:
    """Writes the page, opens it several times, and records the medians."""
    # Not at the top: tests import this file where playwright is not installed.
    from playwright.sync_api import sync_playwright

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        start = time.perf_counter()
        file = synthetic().report(Path(folder) / "report.html")
        written = time.perf_counter() - start
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width in WIDTHS.items():
            times = []
            for _ in range(rounds):
                page = browser.new_page(viewport={"width": width, "height": 900})
                session = page.context.new_cdp_session(page)
                # Counts the CPU time of threads, not the time on the clock.
                session.send("Performance.enable", {"timeDomain": "threadTicks"})
                page.goto(file.as_uri())
                page.wait_for_selector("body[data-ready]", timeout=120_000)
                marks = "['opened', 'drawn'].map(name => performance.getEntriesByName(name)[0].startTime / 1000)"
                metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
                times.append([*page.evaluate(marks), metrics["TaskDuration"]])
                page.close()
            opens, drawn, busy = (statistics.median(each) for each in zip(*times, strict=True))
            row: dict[str, Any] = {
                "screen": name,
                "MB": file.stat().st_size / 1e6,
                "opens s": opens,
                "drawn s": drawn,
                "busy s": busy,
            }
            rows.append(row | {"written s": written})
        browser.close()
    about = (
        "a report of 12 layers and 1,000 classes in headless Chromium, medians. Goal: under 15 MB, open in under 3 s"
    )
    load = os.getloadavg()[0]
    record("report-page", rows, about, rounds=rounds, load_average=round(load, 1))


if __name__ == "__main__":
    typer.run(main)
