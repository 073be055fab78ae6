"""Measures how much of its budget a pruned model uses.

    python -m benchmarks.budget

For each model, criterion, resource, budget and selection, the MACs or parameters of the pruned model are counted. The
goal: the pruned model never costs more than its budget. It may cost less, by at most 1 % of the dense model, or by the
cost of the cheapest removed unit if that is more. The result is docs/results/budget.json.

Weights are random, and the criteria are the two that need no data.
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
    """Prunes every model to every budget with every selection, and records the cost of the results."""
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
                        # A site that keeps all its units cannot give one back, so its units are not counted.
                        missing = [u for u, s, n in zip(cost.unit, sites, plan.counts, strict=True) if n < s.size]
                        short = asked - got / dense
                        row = {"model": name, "criterion": criterion, "selection": selection, "cost": kind}
                        row |= {"asked": asked, "achieved": got / dense, "short by": short}
                        row["met"] = 0 <= short <= max(0.01, min(missing, default=0) / dense)
                        rows.append(row)
    worst = max(row["short by"] for row in rows)
    met = sum(row["met"] for row in rows)
    about = f"{met} of {len(rows)} budgets met. Furthest below its budget: {worst:.4%} of the dense model"
    record("budget", rows, about, goal="at most the budget, and at most 1 % or one unit below it")


if __name__ == "__main__":
    typer.run(main)
