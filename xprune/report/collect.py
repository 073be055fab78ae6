"""What a report tells, gathered as plain data from a result: no chart, no HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from xprune.core.record import Metrics, Record
from xprune.core.unit_kind import UnitKind, kinds_of
from xprune.errors import ModelError
from xprune.explain.curves import Faithfulness, Named
from xprune.report.classmap import ClassMap, comparable, maps
from xprune.report.pictures import Pictures, look

TOP = 10
"""Classes that are named for a unit."""


@dataclass(frozen=True)
class SiteFacts:
    """A site: its block and name there, units kept of units there were, and the rule that a unit went by.

    cut       the lowest score that was kept, None where nothing was
    learned   the learned threshold on ranks in (0, 1), None where there is none
    """

    name: str
    block: str
    part: str
    kind: str
    size: int
    kept: tuple[int, ...]
    cut: float | None
    learned: float | None


@dataclass(frozen=True)
class UnitFacts:
    """A unit of a kind that is drawn one by one: where it is, whether it stayed, its score, its ranks (1 is the best).

    classes   the classes that use it most: (class, percentile of this unit among all of its kind for that class),
              highest first
    """

    site: int
    unit: int
    kept: bool
    score: float
    rank: int
    rank_all: int
    of_all: int
    share: float
    classes: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ClassFacts:
    """Accuracy of a class before and after, on its samples."""

    index: int
    samples: int
    before: float
    after: float


@dataclass(frozen=True)
class Facts:
    """All that the page shows. `classes` are names by index; an absent part is empty or None.

    units   the units of kinds that are drawn one by one, such as heads
    """

    metrics: Mapping[str, Metrics]
    criterion: str
    scale: str
    settings: Mapping[str, Any]
    info: Mapping[str, Any]
    unseen: Sequence[int]
    sites: tuple[SiteFacts, ...]
    units: tuple[UnitFacts, ...]
    classes: tuple[str, ...]
    maps: tuple[ClassMap, ...]
    accuracy: tuple[ClassFacts, ...]
    history: tuple[Mapping[str, Any], ...]
    faithfulness: Mapping[str, Mapping[str, Sequence[float]]]
    pictures: Pictures | str


def collect(
    result: Record,
    classes: Sequence[str] | None = None,
    faithfulness: Named | None = None,
) -> Facts:
    """The facts of a result; see `xprune.report.write`."""
    by_kind = {found.kind: found for found in maps(result)}
    single = [kind for kind in kinds_of(result.plan.sites) if kind.singly]
    names = names_of(result, classes)
    return Facts(
        metrics=result.metrics,
        criterion=result.scores.criterion,
        scale=result.scores.scale,
        settings=result.settings,
        info=result.scores.info,
        unseen=result.scores.unseen,
        sites=sites(result),
        units=tuple(unit for kind in single for unit in _units(result, kind, by_kind.get(kind.name))),
        classes=names,
        maps=tuple(by_kind.values()),
        accuracy=by_class(result.metrics),
        history=history(result),
        faithfulness=_curves(faithfulness or {}),
        pictures=look(result),
    )


def sites(result: Record) -> tuple[SiteFacts, ...]:
    """One for each site of the plan, in its order."""
    thresholds = result.plan.info.get("thresholds")
    found = []
    for index, (site, keep) in enumerate(zip(result.plan.sites, result.plan.keeps, strict=True)):
        block, _, part = site.name.rpartition(".")
        scores = result.scores.values[index]
        cut = float(scores[list(keep)].min()) if keep else None
        learned = float(thresholds[index]) if thresholds else None
        found.append(SiteFacts(site.name, block, part, site.kind, site.size, keep, cut, learned))
    return tuple(found)


def short(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts that all of them start and end with: blocks.3.attn among its like is 3."""
    parts = [name.split(".") for name in dict.fromkeys(names)]
    if len(parts) < 2:
        return list(names)
    first, last = _alike(parts), _alike([part[::-1] for part in parts])
    return [".".join(name.split(".")[first : len(name.split(".")) - last]) or name for name in names]


def _alike(parts: Sequence[Sequence[str]]) -> int:
    """How many elements all sequences start with."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))


def by_class(metrics: Mapping[str, Metrics]) -> tuple[ClassFacts, ...]:
    """Accuracy of each class that has samples, dense and last model, the greatest loss first; empty where not known."""
    first, last = next(iter(metrics.values())), list(metrics.values())[-1]
    pairs = enumerate(zip(first.by_class, last.by_class, strict=False))
    found = [ClassFacts(index, a[1], a[0], b[0]) for index, (a, b) in pairs if a[1]]
    return tuple(sorted(found, key=lambda each: (each.after - each.before, each.index)))


def history(result: Record) -> tuple[Mapping[str, Any], ...]:
    """Records of rates and thresholds while they learned, of a selection that keeps them."""
    records = result.plan.info.get("history") or ()
    return tuple(
        r for r in records if len(r.get("rates", ())) == len(r.get("thresholds", ())) == len(result.plan.sites)
    )


def _units(result: Record, kind: UnitKind, classmap: ClassMap | None) -> list[UnitFacts]:
    chosen = [i for i, site in enumerate(result.plan.sites) if site.kind == kind.name]
    values = comparable(result.scores)
    every = torch.cat([values[i] for i in chosen])
    ranks, column = _ranks(every).tolist(), 0
    found = []
    for i in chosen:
        keep, scores = set(result.plan.keeps[i]), result.scores.values[i]
        within, size = _ranks(scores).tolist(), len(scores)
        for unit in range(size):
            top = _top(classmap, column)
            share = (size - within[unit] + 0.5) / size
            rank, score = ranks[column], float(scores[unit])
            found.append(UnitFacts(i, unit, unit in keep, score, within[unit], rank, len(every), share, top))
            column += 1
    return found


def _ranks(values: Tensor) -> Tensor:
    """1 for the highest, equal scores in order of index, int64 (units,)."""
    return values.argsort(descending=True, stable=True).argsort() + 1


def _top(classmap: ClassMap | None, column: int) -> tuple[tuple[int, float], ...]:
    if classmap is None:
        return ()
    uses = classmap.values[:, column].nan_to_num(-1.0)
    best = uses.argsort(descending=True, stable=True)[:TOP]
    return tuple((classmap.classes[int(i)], float(uses[i])) for i in best if uses[i] >= 0)


def names_of(result: Record, given: Sequence[str] | None) -> tuple[str, ...]:
    first = next(iter(result.metrics.values()))
    count = len(first.by_class)
    for table in result.scores.classwise or ():
        count = max(count, table.shape[0])
    if given is not None and len(given) < count:
        raise ModelError(f"{len(given)} class names were given, the model has {count} classes: give a name for each.")
    return tuple(str(name) for name in given) if given is not None else tuple(f"class {i}" for i in range(count))


def _curves(given: Named) -> dict[str, dict[str, list[float]]]:
    found = {}
    for name, curve in given.items():
        try:
            curve = curve.means() if isinstance(curve, Faithfulness) else curve
            lists = {key: [float(x) for x in curve[key]] for key in ("fractions", "own", "others")}
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"faithfulness[{name!r}] wants the lists fractions, own and others ({type(error).__name__}: {error})."
            ) from error
        if not lists["fractions"] or len({len(values) for values in lists.values()}) > 1:
            lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
            raise ModelError(f"faithfulness[{name!r}]: the lists are to be of one length above 0, got {lengths}.")
        found[str(name)] = lists
    return found
