"""Reads a result and returns the facts: all data that a report shows. Charts and HTML are made from the facts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from xprune.core.coverage import Coverage
from xprune.core.record import Metrics, Record
from xprune.core.unit_kind import UnitKind, kinds_of
from xprune.errors import ModelError
from xprune.explain.curves import Faithfulness, Named
from xprune.modules.forward import error_text
from xprune.report.classmap import ClassMap, comparable, maps
from xprune.report.measure import Measure
from xprune.report.pictures import Pictures, look
from xprune.report.text import part_text

TOP = 10
"""How many classes the report names for a unit. These are the classes that use the unit most."""


@dataclass(frozen=True)
class SiteFacts:
    """The facts of one site.

    Attributes:
        name: Name of the site, such as "blocks.3.attn".
        block: Path of the block that contains the site, such as "blocks.3". "" if there is none.
        part: Last part of the name, such as "attn".
        kind: Name of the unit kind.
        size: Number of units of the dense model.
        kept: Indices of the kept units.
        cut: The lowest score of a kept unit. None if no unit was kept.
        learned: The learned threshold, which is compared with ranks from 0 to 1. None if no threshold was learned.
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
    """The facts of one unit. Only units that the report draws one by one, such as heads, have them.

    Attributes:
        site: Index of the site of the unit.
        unit: Index of the unit in the site.
        kept: True if the unit was kept, False if it was removed.
        score: Score of the unit.
        rank: Rank of the unit among the units of the site. 1 is the highest score.
        rank_all: Rank of the unit among all units of its kind. 1 is the highest score.
        of_all: Number of all units of its kind.
        share: Rank within the site from 0 (lowest score) to 1 (highest score). It is compared with a learned threshold.
        classes: For each class that uses the unit most, a pair (index of the class, percentile of the unit among all
            units of its kind for this class). The highest percentile comes first. Empty if there are no class-wise
            scores.
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
    """The metric of one class. It is usually the accuracy.

    Attributes:
        index: Index of the class.
        samples: Number of samples of the class.
        before: Metric of the dense model on these samples. An accuracy is from 0 to 1.
        after: Metric of the fine-tuned model on these samples, or of the pruned model if there was no fine-tuning.
    """

    index: int
    samples: int
    before: float
    after: float


@dataclass(frozen=True)
class Facts:
    """All data that a report shows. A field is empty if there are no data for it.

    Attributes:
        metrics: Mapping from the stage to the metrics. The stages are "dense", "pruned" and, if there was fine-tuning,
            "finetuned".
        criterion: Name of the criterion.
        scale: How scores of different sites can be compared, see `Scores.scale`.
        settings: Settings of the run.
        info: The seconds, samples and settings of the scoring, see `Scores.info`.
        unseen: Indices of the classes without class-wise scores.
        sites: Facts of each site, in the order of the plan.
        units: Facts of each unit that the report draws one by one, such as heads.
        classes: Names of the classes, in the order of the class indices.
        maps: Class maps, one for each unit kind.
        accuracy: Metric of each class, which is usually the accuracy. The class that got worse by most comes first.
        history: One mapping for each recorded step of learned thresholds. It holds the fraction of units that each site
            keeps ("rates") and the threshold of each site ("thresholds").
        faithfulness: Mapping from a name to the curves with this name.
        pictures: Pictures of inputs, or a sentence that gives the reason why there are none.
        coverage: The share of the model's MACs that the units cover, and the modules that were left alone. None if the
            result does not say it.
        part: A sentence about the cost of the part that was pruned. "" if the whole model was pruned.
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
    coverage: Coverage | None
    part: str

    @property
    def metric(self) -> Measure:
        """How the metric of the run is shown: its name, unit and direction."""
        return Measure.of(next(iter(self.metrics.values())))


def collect(
    result: Record,
    classes: Sequence[str] | None = None,
    faithfulness: Named | None = None,
) -> Facts:
    """Returns the facts of a result. The arguments and errors are those of `xprune.report.write`."""
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
        coverage=result.coverage,
        part=part_text(result),
    )


def sites(result: Record) -> tuple[SiteFacts, ...]:
    """Returns the facts of each site, in the order of the plan."""
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
    """Shortens names for labels: removes the dotted parts with which all names start and end.

    Example:
        >>> short(["blocks.0.attn", "blocks.1.attn"])
        ['0', '1']
    """
    parts = [name.split(".") for name in dict.fromkeys(names)]
    if len(parts) < 2:
        return list(names)
    first, last = _common_start(parts), _common_start([part[::-1] for part in parts])
    return [".".join(name.split(".")[first : len(name.split(".")) - last]) or name for name in names]


def _common_start(parts: Sequence[Sequence[str]]) -> int:
    """Returns how many elements at the start are the same in all sequences."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))


def by_class(metrics: Mapping[str, Metrics]) -> tuple[ClassFacts, ...]:
    """Returns the metric of each class that has samples, before and after pruning. The metric is usually the accuracy.

    The class that got worse by most comes first. The result is empty if the metric of each class was not measured.
    """
    first, last = next(iter(metrics.values())), list(metrics.values())[-1]
    pairs = enumerate(zip(first.by_class, last.by_class, strict=False))
    found = [ClassFacts(index, a[1], a[0], b[0]) for index, (a, b) in pairs if a[1]]
    sign = 1 if first.higher_is_better else -1
    return tuple(sorted(found, key=lambda each: (sign * (each.after - each.before), each.index)))


def history(result: Record) -> tuple[Mapping[str, Any], ...]:
    """Returns the recorded steps of learned thresholds, see `Facts.history`. Empty if nothing was recorded."""
    records = result.plan.info.get("history") or ()
    # A record without thresholds, or with another number of sites than this plan, cannot be drawn.
    return tuple(
        r for r in records if len(r.get("rates", ())) == len(r.get("thresholds", ())) == len(result.plan.sites)
    )


def _units(result: Record, kind: UnitKind, classmap: ClassMap | None) -> list[UnitFacts]:
    """Returns the facts of all units of a unit kind, in the order of the sites."""
    chosen = [i for i, site in enumerate(result.plan.sites) if site.kind == kind.name]
    values = comparable(result.scores)
    every = torch.cat([values[i] for i in chosen])
    # The class map has a column for each unit, in the order of this loop.
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
    """Returns the rank of each unit, int64 (units,): 1 for the highest score. Equal scores are ranked by index."""
    return values.argsort(descending=True, stable=True).argsort() + 1


def _top(classmap: ClassMap | None, column: int) -> tuple[tuple[int, float], ...]:
    """Returns the classes that use the unit of a column most, as pairs (class, percentile), highest first."""
    if classmap is None:
        return ()
    # Classes without scores get -1. So they come last, and the last line leaves them out.
    uses = classmap.values[:, column].nan_to_num(-1.0)
    best = uses.argsort(descending=True, stable=True)[:TOP]
    return tuple((classmap.classes[int(i)], float(uses[i])) for i in best if uses[i] >= 0)


def names_of(result: Record, given: Sequence[str] | None) -> tuple[str, ...]:
    """Returns a name for each class: the given names, or those of the task, or "class 0", "class 1" and so on.

    Raises:
        ModelError: Fewer names are given than there are classes.
    """
    named = result.class_names
    first = next(iter(result.metrics.values()))
    count = len(first.by_class)
    for table in result.scores.classwise or ():
        count = max(count, table.shape[0])
    if given is not None and len(given) < count:
        raise ModelError(f"classes= has {len(given)} names, but there are {count} classes. Give a name for each class.")
    if given is not None:
        return tuple(str(name) for name in given)
    # The names in a file may be too few for its scores. Then they cannot be those of its classes.
    return named if named is not None and len(named) >= count else tuple(f"class {i}" for i in range(count))


def _curves(given: Named) -> dict[str, dict[str, list[float]]]:
    """Returns the curves as lists of numbers, by name. Raises ModelError if a list is missing or lengths differ."""
    found = {}
    for name, curve in given.items():
        try:
            curve = curve.means() if isinstance(curve, Faithfulness) else curve
            lists = {key: [float(x) for x in curve[key]] for key in ("fractions", "own", "others")}
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"faithfulness[{name!r}] needs three lists of numbers: fractions, own and others ({error_text(error)})."
            ) from error
        if not lists["fractions"] or len({len(values) for values in lists.values()}) > 1:
            lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
            raise ModelError(
                f"faithfulness[{name!r}]: the three lists must have one length, and not 0. Their lengths: {lengths}."
            )
        found[str(name)] = lists
    return found
