"""Maps of classes and units: how much each class uses each unit, as percentiles.

Scores of two criteria have different units of measurement. Percentiles do not, so maps of two criteria can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xprune.core.record import Record
from xprune.core.scores import LowRank, Scores
from xprune.core.unit_kind import UnitKind, kinds_of

CLASSES = 1000
"""The most rows of a map. With more classes, this many are shown, spread evenly over the indices."""
TOP, BINS = 6, 6
"""For units that are too many for a column each: the best TOP units have a column, the rest share BINS columns.

Kept and removed units of a site are counted separately.
"""


@dataclass(frozen=True)
class ClassMap:
    """How much each class uses the units of one kind.

    Attributes:
        kind: Name of the unit kind.
        classes: Index of the class of each row.
        labels: Text for each column: the site and the unit, or the site and the number of units in the column.
        kept: For each column True if its units were kept, False if they were removed.
        sites: (name, first column, one after the last column) of each site.
        values: Percentiles from 0 to 100, float32 (classes, columns). A class without scores has a row of NaN.
    """

    kind: str
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    kept: tuple[bool, ...]
    sites: tuple[tuple[str, int, int], ...]
    values: Tensor


def comparable(scores: Scores) -> list[Tensor]:
    """Returns the scores of each site, float32 (units,), in a form that is comparable across sites.

    Scores with the scale "site" are divided by the mean of their site. Other scores are returned as they are.
    """
    if scores.scale != "site":
        return list(scores.values)
    return [value / value.abs().mean().clamp_min(1e-30) for value in scores.values]


def maps(result: Record) -> tuple[ClassMap, ...]:
    """Returns a map for each unit kind of the plan that has class-wise scores.

    Kinds whose units have a column each, such as heads, come first.
    """
    kinds = sorted(kinds_of(result.plan.sites), key=lambda kind: not kind.singly)
    found = (single_map(result, kind) if kind.singly else binned_map(result, kind) for kind in kinds)
    return tuple(filter(None, found))


def single_map(result: Record, kind: UnitKind) -> ClassMap | None:
    """Returns the map of a kind with a column for each unit, or None if there are no units or class-wise scores.

    A percentile is the rank of the unit among all units of this kind, for one class.
    """
    chosen = _sites(result, kind)
    if not chosen:
        return None
    tables = []
    for i in chosen:
        table = _table(result.scores, i)
        per_site = result.scores.scale == "site"
        # Scores with the scale "site" say nothing across sites. Here each is a multiple of its site's mean.
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
    """Returns the map of a kind with too many units for a column each, or None as `single_map` does.

    Each site has columns for its best kept units, then bins of its other kept units, then the same for removed units.
    The order is that of the scores. A percentile is the rank among the units of the site, and a bin shows the mean.
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
            units = order[keep[order] == stays]  # kept or removed, best first
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
    """Returns the ranks within each row of a table as percentiles.

    Args:
        table: Numbers, float (rows, columns).

    Returns:
        A table of the same shape: 0 for the smallest of a row, 100 for the largest. Equal values get the mean of their
        ranks. NaN stays NaN.

    Example:
        >>> percentiles(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0]]))
        tensor([[100.,   0.,  50.],
                [ 75.,  75.,   0.]])
    """
    ordered, order = table.sort(1)
    ranks = torch.empty_like(table).scatter_(1, order, torch.arange(table.shape[1]).to(table).expand_as(table))
    same = ordered[:, 1:] == ordered[:, :-1]
    if bool(same.any()):
        # Equal values form a run. Each of them gets the mean of the ranks at which the run begins and ends.
        place = torch.arange(table.shape[1], device=table.device).expand_as(table)
        edge = same.new_zeros(len(table), 1)
        begins = place.masked_fill(torch.cat([edge, same], 1), 0).cummax(1).values
        ends = place.masked_fill(torch.cat([same, edge], 1), table.shape[1]).flip(1).cummin(1).values.flip(1)
        ranks = torch.empty_like(table).scatter_(1, order, (begins + ends).to(table) / 2)
    found = 100.0 * ranks / max(table.shape[1] - 1, 1)
    return found.masked_fill(table.isnan(), torch.nan)


def _sites(result: Record, kind: UnitKind) -> list[int]:
    """Returns the indices of the sites of a kind. Empty if there are no class-wise scores."""
    if result.scores.classwise is None:
        return []
    return [i for i, site in enumerate(result.plan.sites) if site.kind == kind.name]


def _table(scores: Scores, index: int) -> Tensor:
    """Returns the class-wise scores of a site, float32 (classes, units)."""
    assert scores.classwise is not None
    table = scores.classwise[index]
    # A LowRank holds factors. Indexing with all rows multiplies them.
    return (table[torch.arange(table.shape[0])] if isinstance(table, LowRank) else table).float().cpu()


def _build(
    kind: UnitKind, labels: Sequence[str], kept: Sequence[bool], spans: Sequence[tuple[str, int, int]], values: Tensor
) -> ClassMap:
    """Returns the map, with at most CLASSES rows."""
    rows = len(values)
    shown = torch.linspace(0, rows - 1, min(rows, CLASSES)).round().long()
    return ClassMap(kind.name, tuple(shown.tolist()), tuple(labels), tuple(kept), tuple(spans), values[shown])
