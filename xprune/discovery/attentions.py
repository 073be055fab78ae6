"""Finds the heads of attentions that no adapter knows.

The record of one forward pass shows the modules in which attention is computed, and the layers that are called after
it. The first of these layers that reads the heads is their consumer. `search` finds and proves the site.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.site import Site
from xprune.discovery.places import Taken, caller_of, common, features_of, joined, relative
from xprune.discovery.search import Candidate, Finder, trial_plans
from xprune.discovery.watch import Attended, Record, watch
from xprune.modules.copies import shared_copy, with_noise
from xprune.modules.removed import Removed
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

HEADS = ("num_heads", "n_head", "n_heads", "heads", "nhead", "num_attention_heads", "head_count")
"""Attributes that may hold the number of heads of an attention."""

KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
"""Attributes that may hold the number of key and value heads. Several query heads share one of these heads."""

CONSUMERS = 6
"""How many layers after an attention are tried as the layer that reads its heads."""

MANY = 4
"""A module with this many attentions is no attention of its own, but a part of the model with several blocks."""

LEVELS = 2
"""How many levels above an attention are tried as the module that holds its layers."""

SHARED = (
    "all features of its values use the same scores: it has a single head, which is the whole attention, or it mixes "
    "the scores of its heads. So no head can be removed."
)
"""The reason for an attention without heads that can be told apart."""


@dataclass
class Result:
    """What was found in one search.

    Attributes:
        sites: The sites, by their names.
        left: The reason for each module without a site, by the path of the module.
        closed: The modules of sites that hold no layers besides those of the site, by their paths. The search for other
            units need not look inside.

    Example:
        >>> Result().sites
        {}
    """

    sites: dict[str, Site] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    closed: dict[str, Site] = field(default_factory=dict)


def attention_sites(model: nn.Module, example_inputs: Any, known: Mapping[str, Site], record: Record | None) -> Result:
    """Finds the heads of attentions that no known site belongs to.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        known: The sites that are known, by their names. Their modules are skipped.
        record: The record of a forward pass. None means that the model runs once more.

    Raises:
        ModelError: The forward of the model fails.
    """
    taken = Taken(known)
    if not any(True for path, _ in model.named_modules() if not taken.holds(path)):
        return Result()
    record = record or watch(model, example_inputs)
    finder, result = Finder(model, example_inputs), Result()
    open_ = _opened(model, record, taken)
    reasons, shared = dict[str, str](), set[str]()
    levels = dict[str, int]()
    for turn in range(CONSUMERS):
        candidates = dict[Candidate, str]()
        for path, (consumers, seen) in open_.items():
            if turn < len(consumers):
                candidate = _attention(model, path, consumers[turn], seen, levels.get(path, 0))
                if candidate is not None:
                    candidates[candidate] = path
        for candidate, found in finder.find(candidates):
            path = candidates[candidate]
            if isinstance(found, Site):
                # Two parts of one attention may lead to the same consumer.
                if not taken.holds(joined(candidate.scope, candidate.consumer)):
                    result.sites[found.name] = found
                    taken.add(found)
                    if finder.closed.get(found.name):
                        result.closed[found.name] = found
                open_.pop(path, None)
                reasons.pop(path, None)
            elif found:
                # Other modules multiply tensors too. Only an attention deserves a reason.
                if open_[path][1].sure:
                    reasons.setdefault(path, found)
                open_.pop(path, None)
            elif candidate in finder.last:
                if candidate in finder.shared:
                    open_[path] = [], open_[path][1]
                    if open_[path][1].sure and candidate.scope == path:
                        shared.add(path)
                    continue
                # The layers of queries, keys and values may lie outside of the module, so a larger one is tried.
                levels[path] = levels.get(path, 0) + 1
                around = candidate.scope.rpartition(".")[0]
                others = sum(other.startswith(f"{around}.") for other in record.attended) if around else MANY
                higher = levels[path] <= LEVELS and others < MANY
                consumer = joined(candidate.scope, candidate.consumer)
                open_[path] = ([consumer] * (turn + 2) if higher else []), open_[path][1]
    for candidate in [*_lists(model, record, open_), *_bare(model, open_)]:
        inside = [path for path in open_ if path == candidate.scope or path.startswith(f"{candidate.scope}.")]
        if inside and not taken.holds(joined(candidate.scope, candidate.consumer)):
            for _, found in finder.find([candidate]):
                if isinstance(found, Site):
                    result.sites[found.name] = found
                    taken.add(found)
                    for path in inside:
                        open_.pop(path)
                        reasons.pop(path, None)
    for joint, names in _joint(model, example_inputs, {**finder.handed_on, **result.sites}, finder.handed_on):
        result.sites = {name: site for name, site in result.sites.items() if name not in names}
        result.sites[joint.name] = joint
        taken.add(joint)
        reasons = {path: why for path, why in reasons.items() if path not in names}
    for path, (_, seen) in open_.items():
        module = model.get_submodule(path)
        if not seen.sure or taken.holds(path):
            continue
        reasons.setdefault(path, SHARED if path in shared else _no_consumer(module, seen, heads_of(module)))
    result.left = {path: why for path, why in reasons.items() if why}
    return result


def _opened(model: nn.Module, record: Record, taken: Taken) -> dict[str, tuple[list[str], Attended]]:
    """Returns the modules that compute attention, each with the layers that may read its heads."""
    open_ = dict[str, tuple[list[str], Attended]]()
    for path, seen in record.attended.items():
        if not taken.holds(path):
            open_[path] = [*islice(record.after(seen.last), CONSUMERS)], seen
    # A module may say that it has heads, and compute attention in a way that is not seen, such as without a softmax.
    for path, module in model.named_modules():
        declared = heads_of(module)
        if declared is None or taken.holds(path) or isinstance(module, Removed) or path in open_:
            continue
        if any(other.startswith(f"{path}.") if path else True for other in (*open_, *taken.owners)):
            continue
        layers = [each.path for each in record.layers if each.path.startswith(f"{path}.") or not path]
        if layers:
            backwards = list(dict.fromkeys(reversed(layers)))
            open_[path] = backwards[:CONSUMERS], Attended(path, 0, 0, {declared}, sure=True)
    return open_


def _attention(model: nn.Module, path: str, consumer: str, seen: Attended, level: int = 0) -> Candidate | None:
    """Returns the candidate for a module that computes attention and a layer that may read its heads.

    Args:
        model: The model.
        path: The path of the module.
        consumer: The path of the layer.
        seen: What was seen of the attention.
        level: How many levels above the innermost module around both the scope is.
    """
    layer = model.get_submodule(consumer)
    features = features_of(layer)[0]
    if getattr(layer, "groups", 1) != 1:
        return None
    scope = caller_of(model, common(path, consumer) if consumer != path else consumer.rpartition(".")[0])
    for _ in range(level):
        if not scope:
            return None
        scope = caller_of(model, scope.rpartition(".")[0])
    module = model.get_submodule(path)
    hints = {n for n in seen.heads if n > 1}
    widths = [
        v
        for part in module.modules()
        for name, v in vars(part).items()
        if type(v) is int
        and v > 0
        and (("head" in name and ("dim" in name or "size" in name)) or name in ("d_kv", "d_head"))
    ]
    hints |= {features // v for v in widths if features % v == 0}
    named = [v for part in module.modules() for v in _declared(part)]
    hints |= set(named)
    sizes = {d for hint in hints for d in range(2, hint + 1) if hint % d == 0 and features % d == 0}
    sizes = {size for size in sizes if size < features or size in named}
    likely = tuple(sorted(sizes, reverse=True))
    return Candidate(scope, relative(consumer, scope), likely, "head", "heads") if sizes else None


def _lists(model: nn.Module, record: Record, open_: Mapping[str, tuple[list[str], Attended]]) -> Iterator[Candidate]:
    """Yields candidates for attentions with one module for each head in a list, and a layer that reads all of them."""
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in open_):
        modules = model.get_submodule(parent)
        if not isinstance(modules, nn.ModuleList) or len(modules) < 2 or not parent:
            continue
        heads = [f"{parent}.{index}" for index in range(len(modules))]
        if not all(any(p == head or p.startswith(f"{head}.") for p in open_) for head in heads):
            continue
        last = max(seen.last for path, (_, seen) in open_.items() if path.startswith(f"{parent}."))
        consumer = next((path for path in record.after(last) if not path.startswith(f"{parent}.")), "")
        scope = caller_of(model, common(parent, consumer))
        if consumer and features_of(model.get_submodule(consumer))[0] % len(modules) == 0:
            size, lists = (len(modules),), (relative(parent, scope),)
            yield Candidate(scope, relative(consumer, scope), size, "head", "heads", lists=lists)


def _bare(model: nn.Module, open_: Mapping[str, tuple[list[str], Attended]]) -> Iterator[Candidate]:
    """Yields candidates for attentions that multiply by a parameter of their own in place of calling a layer."""
    for path, (_, seen) in open_.items():
        if not seen.sure:
            continue
        held = dict(model.get_submodule(path).named_parameters(recurse=False))
        for name, parameter in reversed(held.items()) if path else ():
            for axis in range(parameter.dim() if parameter.dim() > 1 else 0):
                length = parameter.shape[axis]
                sizes = {d for n in seen.heads if n > 1 for d in range(2, n + 1) if n % d == 0 and length % d == 0}
                if sizes:
                    yield Candidate(path, name, tuple(sorted(sizes, reverse=True)), "head", "heads", axis)


def _joint(
    model: nn.Module, example_inputs: Any, sites: Mapping[str, Site], handed_on: Mapping[str, Site]
) -> Iterator[tuple[Site, list[str]]]:
    """Yields sites of heads that have to be the same in several layers, since these layers hand on a tensor of heads.

    An example is the position bias of T5: the first layer computes it for all heads, and all other layers use it.

    Yields:
        (site, names of the sites that it replaces).
    """
    groups: dict[tuple[str, int], dict[str, Site]] = {}
    for name, site in sites.items():
        groups.setdefault((re.sub(r"\b\d+\b", "*", name), site.size), {})[name] = site
    for group in groups.values():
        if len(group) < 2 or not set(group) & set(handed_on):
            continue
        # Without the rewrites: all layers of the group lose the same heads, so nothing has to be picked.
        group = dict(sorted(group.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))
        parts = [handed_on.get(name, site) for name, site in group.items()]
        joint = replace(
            parts[0],
            module="",
            consumers=tuple(path for part in parts for path in part.consumers),
            axes=tuple(axis for part in parts for axis in part.axes),
            cuts=tuple(cut for part in parts for cut in part.cuts),
            norms=tuple(path for part in parts for path in part.norms),
            attributes=tuple(path for part in parts for path in part.attributes),
        )
        noise = with_noise(model)
        try:
            pruned = remove_units(shared_copy(noise), next(trial_plans(joint)), ADAPTERS)
            if exactness.problem(noise, pruned, next(trial_plans(joint)), example_inputs, thorough=False) is None:
                yield joint, list(group)
        # The forward of the model runs here, and it may raise any error.
        except Exception:
            continue


def _declared(module: nn.Module, names: Iterable[str] = (*HEADS, *KV_HEADS)) -> list[int]:
    """Returns the numbers of heads that attributes of a module hold."""
    return [v for name in names if type(v := vars(module).get(name)) is int and v > 0]


def _no_consumer(module: nn.Module, seen: Attended, declared: int | None) -> str:
    """Returns the reason for an attention of which no layer reads the heads."""
    if declared == 1 or max(seen.heads, default=1) == 1:
        return "it has a single head, which is the whole attention, so no head can be removed."
    return (
        "it computes attention, but no layer that is called after it reads heads that can be told apart: the heads "
        "join before a layer reads them, or the forward uses the weight of that layer without a call. A gate is a hook "
        "on such a call, so the heads cannot be gated. Write an adapter with a gated class, see docs/adapters.md."
    )


def heads_of(module: nn.Module) -> int | None:
    """Returns the number of heads that an attribute of the module holds, or None if there is no such attribute.

    HEADS lists the names of such attributes.

    Example:
        >>> heads_of(nn.MultiheadAttention(8, 2)), heads_of(nn.Linear(8, 8))
        (2, None)
    """
    return next(iter(_declared(module, HEADS)), None)
