"""profile: measures a latency table of a model, which says how long each site takes with fewer units."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.latency_table import LatencyTable
from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.core.table_cost import Curve, TableCost
from xprune.core.unit_kind import unit_kind
from xprune.costs.profile_cache import ProfileCache
from xprune.costs.stopwatch import Stopwatch
from xprune.environment import hardware, versions
from xprune.modules.calls import tensors_in
from xprune.modules.copies import shared_copy, unwrap
from xprune.modules.paths import layer_path
from xprune.surgery.cut import remove_units

POINTS = 12
"""The number of counts at which a site is measured, at most. Between them, times are straight lines."""

FEWER_POINTS = 5
"""The same for a compiled model, because each count is compiled anew, and for channels, which need the whole model."""

SECONDS = 3.0
"""The time for the measurement of one group of modules, in seconds. At least `ROUNDS` rounds are measured."""

ROUNDS = 5
"""The smallest number of rounds of a group of modules."""

WHOLE_ROUNDS = 3
"""The smallest number of rounds of whole models. A large model takes several seconds."""

MOST = 5.0
"""The largest factor between the time of a module that runs alone and its time in the model. More must be noise."""

OUT_OF_CACHE = 128e6
"""The weights of the modules that are run in turn have this size together, in bytes, if there are so many modules.

In a model, a module finds its weights in memory and not in the cache, since other modules ran in between. A single
module that is run again and again would find them in the cache, and take less time than in the model.
"""


@dataclass(frozen=True)
class _Place:
    """A module that is measured alone with different numbers of units of one site.

    Attributes:
        site: The index of the site.
        path: The path of the module. "" is the whole model.
        key: A text that is equal for modules that take the same time.
    """

    site: int
    path: str
    key: str


def measure_table(
    model: nn.Module,
    sites: Sequence[Site],
    watch: Stopwatch,
    *,
    cache: ProfileCache | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """Measures how long the modules of each site take on a target, with different numbers of units.

    A module is measured alone, with the inputs that it gets in a forward pass of the model. The times of all its counts
    are measured in turn, so that a disturbance meets all of them. Modules of the same class, with tensors and inputs of
    the same shapes, are measured once. The channels of a residual stream are measured with the whole model.

    Args:
        model: The dense model. It is not changed.
        sites: The sites.
        watch: The stopwatch of the target, made with this model.
        cache: Times of earlier measurements on this hardware. None means that everything is measured.
        told: A function that is called with (measured groups, all groups) as the measurement goes on.

    Returns:
        The table.
    """
    start, model, cache = time.perf_counter(), unwrap(model), cache or ProfileCache(None)
    where = f"{watch.target}|{hardware()}|{versions()['torch']}"
    places = _places(model, sites, watch, where)
    groups: dict[str, list[_Place]] = {}
    for place in places:
        groups.setdefault(place.key, []).append(place)
    # A run that was killed and goes on has to find the same times, so the whole table is kept too.
    whole = _digest([(place.site, place.path, place.key) for place in places], [site.to_json() for site in sites])
    known = cache.table(whole)
    if known is not None:
        return known
    curves: dict[str, Curve] = {}
    for done, (key, group) in enumerate(groups.items()):
        told(done, len(groups))
        curves[key] = cache.curve(key) or _measured(model, sites, group, watch)
        cache.keep_curve(key, curves[key])
    told(len(groups), len(groups))
    by_site = {index: [curves[each.key] for each in group] for index, group in groupby(places, lambda each: each.site)}
    dense, found = _fitted(model, sites, [_sum(by_site[index]) for index in range(len(sites))], watch)
    table = LatencyTable(
        watch.target,
        hardware(),
        versions(),
        dense,
        tuple((site.name, site.kind, site.size) for site in sites),
        tuple(found),
        time.perf_counter() - start,
    )
    cache.keep_table(whole, table)
    return table


def counts_of(site: Site, compiled: bool) -> list[int]:
    """Returns the numbers of units at which a site is measured, in ascending order.

    They are spaced evenly. Numbers of features are multiples of 64 where the site is large enough, because kernels of
    GPUs are slow for other widths, and `round_to="auto"` avoids these.
    """
    crosses = unit_kind(site.kind).crosses
    points = FEWER_POINTS if compiled or crosses else POINTS
    step = max(1, 64 // site.width)
    if site.size < 2 * points * step:
        step = 1
    counts = {round(site.size * point / points / step) * step for point in range(1, points)}
    # A kernel needs some time even for one unit. Without units, the whole module goes.
    ends = {1, site.size} | ({0} if site.module and not crosses else set())
    return sorted(count for count in counts | ends if 0 <= count <= site.size and (count or 0 in ends))


def _places(model: nn.Module, sites: Sequence[Site], watch: Stopwatch, where: str) -> list[_Place]:
    """Finds the modules to measure for each site, in the order of the sites.

    Args:
        model: The dense model.
        sites: The sites.
        watch: The stopwatch of the target.
        where: A text that describes the target, the hardware and the versions.
    """
    wanted = [(index, path) for index, site in enumerate(sites) for path in _owners(model, site)]
    # A forward may compute a module without calling it. Then the nearest module around it that is called is measured.
    around = {path: [path, *_parents(path)] for _, path in wanted}
    every = sorted({each for paths in around.values() for each in paths})
    # The inputs of all modules together would need much memory.
    given = watch.capture(model, every, shapes_only=True)
    called = {path: next(each for each in paths if each in given) for path, paths in around.items()}
    seen: set[tuple[int, str]] = set()
    places = []
    for index, path in ((index, called[path]) for index, path in wanted):
        if (index, path) not in seen:
            places.append(_Place(index, path, _key(model, sites[index], path, given[path], where)))
        seen.add((index, path))
    return places


def _owners(model: nn.Module, site: Site) -> tuple[str, ...]:
    """Returns the paths of the modules whose time changes with the units of a site."""
    if unit_kind(site.kind).crosses:
        return ("",)
    if site.module:
        return site.modules
    touched = [
        *(layer_path(model, each) for each in site.consumers),
        *(cut.tensor.rpartition(".")[0] for cut in site.cuts),
    ]
    parts = [path.split(".") for path in touched]
    common = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    # The parts of paths that differ end the common beginning, also if a later part is equal again.
    length = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), len(common))
    return (".".join(common[:length]),)


def _parents(path: str) -> list[str]:
    """Returns the paths of all modules around the module at `path`, the nearest first. The last one is ""."""
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1)]


def _key(model: nn.Module, site: Site, path: str, given: Any, where: str) -> str:
    """Returns a text that is equal for two modules that take the same time with the same numbers of units."""
    module, start = model.get_submodule(path), f"{path}." if path else ""
    tensors = [(name, tuple(each.shape), str(each.dtype)) for name, each in module.named_parameters()]
    kinds = [f"{type(part).__module__}.{type(part).__qualname__}" for part in module.modules()]
    inputs = [(tuple(tensor.shape), str(tensor.dtype), tensor.stride()) for tensor in tensors_in(given)]
    cuts = [(c.tensor.removeprefix(start), c.axis) for c in site.cuts if c.tensor.startswith(start)]
    return _digest(where, site.kind, site.size, site.width, kinds, tensors, inputs, cuts)


def _digest(*parts: Any) -> str:
    """Returns a short text that identifies plain values."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _measured(model: nn.Module, sites: Sequence[Site], group: Sequence[_Place], watch: Stopwatch) -> Curve:
    """Measures the mean time of the modules of a group, with different numbers of units.

    Args:
        model: The dense model.
        sites: All sites.
        group: Modules that take the same time. Some of them run in turn, see `OUT_OF_CACHE`.
        watch: The stopwatch of the target.
    """
    site = sites[group[0].site]
    counts = counts_of(site, watch.target.compiled)
    module = model.get_submodule(group[0].path)
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    group = group[: max(1, round(OUT_OF_CACHE / max(size, 1)))]
    given = watch.capture(model, [place.path for place in group])
    functions = []
    for count in counts:
        of_group = [sites[place.site] for place in group]
        # A module may have several places, if several sites cut it.
        plan = Plan(tuple(dict.fromkeys(of_group)), (tuple(range(count)),) * len(set(of_group)))
        smaller = remove_units(shared_copy(model), plan, ADAPTERS)
        ready = [(watch.placed(smaller.get_submodule(place.path)), *given[place.path]) for place in group]
        functions.append(partial(_run, ready))
    times = watch.times(functions, SECONDS, ROUNDS)
    # The time of the module with all units, times the fraction of it that a smaller module takes. Fractions are
    # measured within a round, so they are more exact than the times.
    last = len(counts) - 1
    amounts = [times.median(last) / len(group) * times.relative(index, last) for index in range(len(counts))]
    return Curve(tuple(counts), tuple(_rising(amounts)), unit_kind(site.kind).crosses)


def _run(ready: Sequence[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]) -> None:
    """Runs modules one after the other, each with its own arguments."""
    for module, args, kwargs in ready:
        module(*args, **kwargs)


def _rising(amounts: Sequence[float]) -> list[float]:
    """Returns the nearest times that do not fall as the number of units rises.

    A smaller module may take longer, with a width that kernels do not like. More units are then better in two ways, so
    a plan would take them in any case. The nearest rising times say the same, and remove much of the noise.
    """
    from sklearn.isotonic import isotonic_regression

    found: list[float] = isotonic_regression(np.asarray(amounts, dtype=float)).tolist()
    return found


def _sum(curves: Sequence[Curve]) -> Curve:
    """Returns the sum of the curves of all modules of one site, which have the same counts."""
    return replace(
        curves[0], amounts=tuple(float(sum(each)) for each in zip(*(c.amounts for c in curves), strict=True))
    )


def _fitted(
    model: nn.Module, sites: Sequence[Site], curves: Sequence[Curve], watch: Stopwatch
) -> tuple[float, list[Curve]]:
    """Measures whole models, and scales the curves so that they predict the times of these models.

    For each unit kind, a model is measured that keeps half of the units of this kind. The savings of all curves of this
    kind get the same factor, since a module that runs alone is faster or slower than in the model. Streams are measured
    with the whole model anyway.

    Args:
        model: The dense model.
        sites: The sites.
        curves: The curve of each site.
        watch: The stopwatch of the target.

    Returns:
        The time of the dense model in milliseconds, and the curves.
    """
    kinds = list(dict.fromkeys(site.kind for site, curve in zip(sites, curves, strict=True) if not curve.factor))
    counts = {kind: [max(1, s.size // 2) if s.kind == kind else s.size for s in sites] for kind in kinds}
    smaller = [_with_counts(model, sites, counts[kind]) for kind in kinds]
    times = watch.compare_all(smaller, SECONDS, WHOLE_ROUNDS)
    dense, cost, found = times.median(0), TableCost(times.median(0), tuple(curves)), list(curves)
    for number, kind in enumerate(kinds, start=1):
        predicted = dense - cost.total(counts[kind])
        saved = dense * (1 - times.relative(number))
        factor = min(MOST, max(1 / MOST, saved / predicted)) if predicted > 0 else 1.0
        for index, site in enumerate(sites):
            if site.kind == kind and not curves[index].factor:
                found[index] = replace(curves[index], amounts=_times(factor, curves[index].amounts))
    # What cannot be saved takes some time too.
    saved = sum(curve.amounts[-1] - curve.amounts[0] for curve in found if not curve.factor)
    room = min(1.0, 0.98 * dense / saved) if saved > 0 else 1.0
    scaled = [curve if curve.factor else replace(curve, amounts=_times(room, curve.amounts)) for curve in found]
    return dense, scaled


def _times(factor: float, amounts: Sequence[float]) -> tuple[float, ...]:
    """Returns the amounts times a factor."""
    return tuple(factor * amount for amount in amounts)


def _with_counts(model: nn.Module, sites: Sequence[Site], counts: Sequence[int]) -> nn.Module:
    """Returns a copy of the model whose sites keep these numbers of units."""
    return remove_units(
        shared_copy(model), Plan(tuple(sites), tuple(tuple(range(count)) for count in counts)), ADAPTERS
    )
