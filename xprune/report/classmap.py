"""Class x unit maps: how much each class uses each unit, as percentiles that can be compared between criteria."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xprune.core.record import Record
from xprune.core.scores import LowRank, Scores

CLASSES = 1000
"""Rows at most: of more classes, as many spread evenly over the indices."""
TOP, BINS = 6, 6
"""Of a site's neurons, kept and removed: the best ones a column each, the rest in so many bins."""


@dataclass(frozen=True)
class ClassMap:
    """Percentiles 0 to 100 of units for each class, float32 (classes, columns), NaN for a class that was not seen.

    kind      "head" or "neuron"
    classes   index of each row's class
    labels    of each column
    kept      whether the units of the column stayed
    sites     (name, first column, one after the last) of each site
    """

    kind: str
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    kept: tuple[bool, ...]
    sites: tuple[tuple[str, int, int], ...]
    values: Tensor


def comparable(scores: Scores) -> list[Tensor]:
    """Scores float32 (units,) that can be compared across sites, as far as the criterion's scale allows it."""
    if scores.scale != "site":
        return list(scores.values)
    return [value / value.abs().mean().clamp_min(1e-30) for value in scores.values]


def head_map(result: Record) -> ClassMap | None:
    """All heads, a column each: percentiles among all heads. None without class-wise scores or heads."""
    chosen = _sites(result, "head")
    if not chosen:
        return None
    tables = []
    for i in chosen:
        table = _table(result.scores, i)
        per_site = result.scores.scale == "site"
        tables.append(table / table.abs().mean(1, keepdim=True).clamp_min(1e-30) if per_site else table)
    labels, kept, spans, start = [], [], [], 0
    for i in chosen:
        site, keep = result.plan.sites[i], set(result.plan.keeps[i])
        labels += [f"{site.name}, head {unit}" for unit in range(site.size)]
        kept += [unit in keep for unit in range(site.size)]
        spans.append((site.name, start, start + site.size))
        start += site.size
    return _build("head", labels, kept, spans, percentiles(torch.cat(tables, 1)))


def neuron_map(result: Record) -> ClassMap | None:
    """The best kept and removed neurons of each site, the rest in bins: percentiles among the site's neurons."""
    chosen = _sites(result, "neuron")
    if not chosen:
        return None
    labels: list[str] = []
    kept, spans, columns = [], [], []
    for i in chosen:
        site, keep = result.plan.sites[i], torch.zeros(result.plan.sites[i].size, dtype=torch.bool)
        keep[list(result.plan.keeps[i])] = True
        uses = percentiles(_table(result.scores, i))  # (classes, units)
        order = result.scores.values[i].argsort(descending=True, stable=True)
        first = len(labels)
        for stays in (True, False):
            units = order[keep[order] == stays]
            groups = [units[j : j + 1] for j in range(min(TOP, len(units)))]
            groups += [part for part in units[TOP:].tensor_split(BINS) if len(part)]
            for group in groups:
                what = f"neuron {int(group[0])}" if len(group) == 1 else f"mean of {len(group)} neurons"
                labels.append(f"{site.name}, {what}")
                kept.append(stays)
                columns.append(uses[:, group].mean(1))
        spans.append((site.name, first, len(labels)))
    return _build("neuron", labels, kept, spans, torch.stack(columns, 1))


def percentiles(table: Tensor) -> Tensor:
    """Ranks within each row of (rows, columns) as 0 to 100, equal values alike, NaN where a row is."""
    ordered, order = table.sort(1)
    ranks = torch.empty_like(table).scatter_(1, order, torch.arange(table.shape[1]).to(table).expand_as(table))
    if bool((ordered.diff(dim=1) == 0).any()):
        below = torch.searchsorted(ordered, table.contiguous())
        upto = torch.searchsorted(ordered, table.contiguous(), right=True)
        ranks = (below + upto - 1).to(table) / 2
    found = 100.0 * ranks / max(table.shape[1] - 1, 1)
    return found.masked_fill(table.isnan(), torch.nan)


def _sites(result: Record, kind: str) -> list[int]:
    if result.scores.classwise is None:
        return []
    return [i for i, site in enumerate(result.plan.sites) if site.kind == kind]


def _table(scores: Scores, index: int) -> Tensor:
    """Class-wise scores of a site, float32 (classes, units)."""
    assert scores.classwise is not None
    table = scores.classwise[index]
    return (table[torch.arange(table.shape[0])] if isinstance(table, LowRank) else table).float().cpu()


def _build(
    kind: str, labels: Sequence[str], kept: Sequence[bool], spans: Sequence[tuple[str, int, int]], values: Tensor
) -> ClassMap:
    rows = len(values)
    shown = torch.linspace(0, rows - 1, min(rows, CLASSES)).round().long()
    return ClassMap(kind, tuple(shown.tolist()), tuple(labels), tuple(kept), tuple(spans), values[shown])
