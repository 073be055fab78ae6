"""Report: how large the page of a 12-layer, 1,000-class run is, and how fast it opens.

    python -m benchmarks.report_page [--rounds 5]

Scores are random: 12 heads and 3,072 neurons a layer, class-wise. "opens" is the time from the request for the file
until the text can be read and a head be chosen, "drawn" until every chart is there, in a headless Chromium; "busy" is
the processor time of the page's main thread until then, which counts on a machine that is not idle; the load average
is recorded beside.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

import xprune
from benchmarks.record import record
from xprune.core.scores import LowRank

WIDTHS = {"desktop": 1280, "phone": 390}


def synthetic(
    depth: int = 12, heads: int = 12, neurons: int = 3072, classes: int = 1000, rank: int | None = None
) -> xprune.PruneResult:
    """A result of that size from random scores, on sites of no model; rank: class-wise scores as factors."""
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


def main(rounds: int = 5) -> None:
    """Writes the page, opens it, and records the medians."""
    from playwright.sync_api import sync_playwright  # tests import this file where there is none

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        start = time.perf_counter()
        path = synthetic().report(Path(folder) / "report.html")
        written = time.perf_counter() - start
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width in WIDTHS.items():
            times = []
            for _ in range(rounds):
                page = browser.new_page(viewport={"width": width, "height": 900})
                session = page.context.new_cdp_session(page)
                session.send("Performance.enable", {"timeDomain": "threadTicks"})
                page.goto(path.as_uri())
                page.wait_for_selector("body[data-ready]", timeout=120_000)
                marks = "['opened', 'drawn'].map(name => performance.getEntriesByName(name)[0].startTime / 1000)"
                metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
                times.append([*page.evaluate(marks), metrics["TaskDuration"]])
                page.close()
            opens, drawn, busy = (statistics.median(each) for each in zip(*times, strict=True))
            row: dict[str, Any] = {
                "screen": name,
                "MB": path.stat().st_size / 1e6,
                "opens s": opens,
                "drawn s": drawn,
                "busy s": busy,
            }
            rows.append(row | {"written s": written})
        browser.close()
    about = "report of 12 layers and 1,000 classes, headless Chromium, medians; goal: under 15 MB, opens in under 3 s"
    load = os.getloadavg()[0]
    record("report-page", rows, about, rounds=rounds, load_average=round(load, 1))


if __name__ == "__main__":
    typer.run(main)
