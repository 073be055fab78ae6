"""Budget: what was asked, and what a recount of the pruned model finds.

    python -m benchmarks.budget

Never over, and short by at most 1 % of the dense model or the cost of the cheapest unit that is missing.
"""

from typing import Any

import timm
import torch
import typer

import xprune
from benchmarks.record import record
from xprune.costs.count import count_macs, count_params
from xprune.costs.measure import measure_costs

NAMES = ("deit_tiny_patch16_224", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")
ASKED = (0.2, 0.35, 0.5, 0.7, 0.9)


def main() -> None:
    """Every model x cost x budget x selection x criterion without data."""
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        torch.manual_seed(0)
        model, x = timm.create_model(name).eval(), torch.randn(2, 3, 224, 224)
        sites = xprune.find_sites(model, x)
        costs = measure_costs(model, sites, x)
        for criterion in ("random", "magnitude"):
            scores = xprune.score(model, sites, criterion=criterion)
            for kind, count, cost in (
                ("macs", lambda m, x=x: count_macs(m, x), costs.macs),
                ("params", count_params, costs.params),
            ):
                for asked in ASKED:
                    for selection in xprune.SELECTIONS:
                        budget = xprune.Budget(**{kind: asked})
                        plan = xprune.select(model, scores, budget, selection, example_inputs=x)
                        dense, got = count(model), count(xprune.apply(model, plan, x))
                        missing = [u for u, s, n in zip(cost.unit, sites, plan.counts, strict=True) if n < s.size]
                        short = asked - got / dense
                        row = {"model": name, "criterion": criterion, "selection": selection, "cost": kind}
                        row |= {"asked": asked, "achieved": got / dense, "short by": short}
                        row["met"] = 0 <= short <= max(0.01, min(missing, default=0) / dense)
                        rows.append(row)
    worst = max(row["short by"] for row in rows)
    about = f"{sum(row['met'] for row in rows)} of {len(rows)} budgets met from below; furthest below: {worst:.4%}"
    record("budget", rows, about, goal="achieved <= asked, short by at most 1 % or one unit")


if __name__ == "__main__":
    typer.run(main)
