"""Class x unit maps: how much each class uses each unit, as percentiles that can be compared between criteria."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xprune.core.record import Record
from xprune.core.scores import LowRank, Scores
from xprune.core.unit_kind import UnitKind, kinds_of

CLASSES = 1000
"""Rows at most: of more classes, as many spread evenly over the indices."""
TOP, BINS = 6, 6
"""Of a site's units that are too many, kept and removed: the best ones a column each, the rest in so many bins."""


@dataclass(frozen=True)
class ClassMap:
    """Percentiles 0 to 100 of units for each class, float32 (classes, columns), NaN for a class that was not seen.

    kind      name of the unit kind
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


def maps(result: Record) -> tuple[ClassMap, ...]:
    """A map for each unit kind of the plan, those whose units are drawn one by one first."""
    kinds = sorted(kinds_of(result.plan.sites), key=lambda kind: not kind.singly)
    found = (single_map(result, kind) if kind.singly else binned_map(result, kind) for kind in kinds)
    return tuple(filter(None, found))


def single_map(result: Record, kind: UnitKind) -> ClassMap | None:
    """All units of a kind, a column each: percentiles among all of them. None without class-wise scores or units."""
    chosen = _sites(result, kind)
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
        labels += [f"{site.name}, {kind.name} {unit}" for unit in range(site.size)]
        kept += [unit in keep for unit in range(site.size)]
        spans.append((site.name, start, start + site.size))
        start += site.size
    return _build(kind, labels, kept, spans, percentiles(torch.cat(tables, 1)))


def binned_map(result: Record, kind: UnitKind) -> ClassMap | None:
    """The best kept and removed units of each site, the rest in bins: percentiles among the site's units."""
    chosen = _sites(result, kind)
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
                what = f"{kind.name} {int(group[0])}" if len(group) == 1 else f"mean of {kind.many(len(group))}"
                labels.append(f"{site.name}, {what}")
                kept.append(stays)
                columns.append(uses[:, group].mean(1))
        spans.append((site.name, first, len(labels)))
    return _build(kind, labels, kept, spans, torch.stack(columns, 1))


def percentiles(table: Tensor) -> Tensor:
    """Ranks within each row of (rows, columns) as 0 to 100, equal values alike, NaN where a row is."""
    ordered, order = table.sort(1)
    ranks = torch.empty_like(table).scatter_(1, order, torch.arange(table.shape[1]).to(table).expand_as(table))
    same = ordered[:, 1:] == ordered[:, :-1]
    if bool(same.any()):
        # Equal values stand together in a run. Each has the mean of the ranks at which the run begins and ends.
        place, edge = torch.arange(table.shape[1]).expand_as(table), same.new_zeros(len(table), 1)
        begins = place.masked_fill(torch.cat([edge, same], 1), 0).cummax(1).values
        ends = place.masked_fill(torch.cat([same, edge], 1), table.shape[1]).flip(1).cummin(1).values.flip(1)
        ranks = torch.empty_like(table).scatter_(1, order, (begins + ends).to(table) / 2)
    found = 100.0 * ranks / max(table.shape[1] - 1, 1)
    return found.masked_fill(table.isnan(), torch.nan)


def _sites(result: Record, kind: UnitKind) -> list[int]:
    if result.scores.classwise is None:
        return []
    return [i for i, site in enumerate(result.plan.sites) if site.kind == kind.name]


def _table(scores: Scores, index: int) -> Tensor:
    """Class-wise scores of a site, float32 (classes, units)."""
    assert scores.classwise is not None
    table = scores.classwise[index]
    return (table[torch.arange(table.shape[0])] if isinstance(table, LowRank) else table).float().cpu()


def _build(
    kind: UnitKind, labels: Sequence[str], kept: Sequence[bool], spans: Sequence[tuple[str, int, int]], values: Tensor
) -> ClassMap:
    rows = len(values)
    shown = torch.linspace(0, rows - 1, min(rows, CLASSES)).round().long()
    return ClassMap(kind.name, tuple(shown.tolist()), tuple(labels), tuple(kept), tuple(spans), values[shown])
