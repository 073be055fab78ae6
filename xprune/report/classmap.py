"""Class maps: tables that show how much each class uses each unit, as percentiles.

The scores of two criteria cannot be compared, because they measure different things. Percentiles can be compared, so
the class maps of two criteria can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xprune.core.record import Record
from xprune.core.scores import LowRank, Scores
from xprune.core.unit_kind import UnitKind, kinds_of

CLASSES = 1000
"""The largest number of classes in a class map. If there are more, the map shows this many, at even distances."""
TOP, BINS = 6, 6
"""Columns of a site with too many units for a column each: TOP columns of one unit, then BINS columns of a mean.

The TOP units are those with the highest scores. The other units are divided into BINS groups, and each group has one
column. This is done separately for the kept and for the removed units of a site.
"""


@dataclass(frozen=True)
class ClassMap:
    """A table that shows how much each class uses the units of one kind.

    Attributes:
        kind: Name of the unit kind.
        classes: For each row, the index of the class.
        labels: For each column, a text: the site and the unit, or the site and the number of units in the column.
        kept: For each column True if its units were kept, False if they were removed.
        sites: For each site, (name, index of its first column, index of its last column + 1).
        values: Percentiles from 0 to 100, float32 (classes, columns). A class without scores has a row of NaN.
    """

    kind: str
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    kept: tuple[bool, ...]
    sites: tuple[tuple[str, int, int], ...]
    values: Tensor


def comparable(scores: Scores) -> list[Tensor]:
    """Returns the scores of each site, float32 (units,), so that scores of different sites can be compared.

    Scores with the scale "site" are divided by the mean absolute score of their site. Other scores stay as they are.
    """
    if scores.scale != "site":
        return list(scores.values)
    return [value / value.abs().mean().clamp_min(1e-30) for value in scores.values]


def maps(result: Record) -> tuple[ClassMap, ...]:
    """Returns a class map for each unit kind of the plan. Empty if there are no class-wise scores.

    The kinds whose units have a column each, such as heads, come first.
    """
    kinds = sorted(kinds_of(result.plan.sites), key=lambda kind: not kind.singly)
    found = (single_map(result, kind) if kind.singly else binned_map(result, kind) for kind in kinds)
    return tuple(filter(None, found))


def single_map(result: Record, kind: UnitKind) -> ClassMap | None:
    """Returns the class map of a unit kind with a column for each unit.

    A percentile is the rank of the unit among all units of this kind, for one class. The result is None if the plan has
    no units of this kind or if there are no class-wise scores.
    """
    chosen = _sites(result, kind)
    if not chosen:
        return None
    tables = []
    for i in chosen:
        table = _table(result.scores, i)
        per_site = result.scores.scale == "site"
        # Scores with the scale "site" cannot be compared between sites. So each score is divided by the mean of its
        # site.
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
    """Returns the class map of a unit kind with too many units for a column each, such as neurons.

    The columns of a site have this order: first the kept units with the highest scores, with one column each, then bins
    of the other kept units. The removed units follow in the same way. A percentile is the rank of the unit among the
    units of its site, for one class. A bin shows the mean percentile of its units. The result is None if the plan has
    no units of this kind or if there are no class-wise scores.
    """
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
            units = order[keep[order] == stays]  # the kept units or the removed units, highest score first
            groups = [units[j : j + 1] for j in range(min(TOP, len(units)))]
            groups += [part for part in units[TOP:].tensor_split(BINS) if len(part)]
            for group in groups:
                unit_label = f"{kind.name} {int(group[0])}" if len(group) == 1 else f"mean of {kind.many(len(group))}"
                labels.append(f"{site.name}, {unit_label}")
                kept.append(stays)
                columns.append(uses[:, group].mean(1))
        spans.append((site.name, first, len(labels)))
    return _build(kind, labels, kept, spans, torch.stack(columns, 1))


def percentiles(table: Tensor) -> Tensor:
    """Returns the rank of each number within its row, as a percentile.

    Args:
        table: Tensor of numbers, float (rows, columns).

    Returns:
        A tensor of the same shape: 0 for the smallest number of a row, 100 for the largest. Equal numbers get the mean
        of their ranks. NaN stays NaN.

    Example:
        >>> percentiles(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0]]))
        tensor([[100.,   0.,  50.],
                [ 75.,  75.,   0.]])
    """
    ordered, order = table.sort(1)
    ranks = torch.empty_like(table).scatter_(1, order, torch.arange(table.shape[1]).to(table).expand_as(table))
    same = ordered[:, 1:] == ordered[:, :-1]
    if bool(same.any()):
        # In the sorted row, equal values are next to each other. Each gets the mean of the first and the last of their
        # ranks.
        place = torch.arange(table.shape[1], device=table.device).expand_as(table)
        edge = same.new_zeros(len(table), 1)
        begins = place.masked_fill(torch.cat([edge, same], 1), 0).cummax(1).values
        ends = place.masked_fill(torch.cat([same, edge], 1), table.shape[1]).flip(1).cummin(1).values.flip(1)
        ranks = torch.empty_like(table).scatter_(1, order, (begins + ends).to(table) / 2)
    found = 100.0 * ranks / max(table.shape[1] - 1, 1)
    return found.masked_fill(table.isnan(), torch.nan)


def _sites(result: Record, kind: UnitKind) -> list[int]:
    """Returns the indices of the sites of a unit kind. Empty if there are no class-wise scores."""
    if result.scores.classwise is None:
        return []
    return [i for i, site in enumerate(result.plan.sites) if site.kind == kind.name]


def _table(scores: Scores, index: int) -> Tensor:
    """Returns the class-wise scores of a site, float32 (classes, units)."""
    assert scores.classwise is not None
    table = scores.classwise[index]
    # A LowRank stores the table as two factors. If it is indexed, it multiplies them. So all rows are indexed.
    return (table[torch.arange(table.shape[0])] if isinstance(table, LowRank) else table).float().cpu()


def _build(
    kind: UnitKind, labels: Sequence[str], kept: Sequence[bool], spans: Sequence[tuple[str, int, int]], values: Tensor
) -> ClassMap:
    """Returns the class map. If there are more classes than CLASSES, it leaves out rows at even distances."""
    rows = len(values)
    shown = torch.linspace(0, rows - 1, min(rows, CLASSES)).round().long()
    return ClassMap(kind.name, tuple(shown.tolist()), tuple(labels), tuple(kept), tuple(spans), values[shown])
