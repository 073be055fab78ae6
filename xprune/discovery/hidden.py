"""Finds the hidden neurons of MLPs that neither an adapter nor the dependency graph knows.

Two layers that are called one after the other may be the producer and the consumer of neurons, and so may two
parameters of a mixture of experts. `search` finds and proves the site.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from xprune.core.site import Site
from xprune.discovery.attentions import Result
from xprune.discovery.places import Taken, caller_of, common, features_of, relative
from xprune.discovery.search import Candidate, Finder
from xprune.discovery.watch import Record, is_layer, watch

BEFORE = 4
"""How many layers before a layer are tried as the producer of the neurons that it reads."""


def hidden_sites(
    model: nn.Module,
    example_inputs: Any,
    known: Mapping[str, Site],
    record: Record | None,
    closed: Collection[str] = (),
) -> Result:
    """Finds the hidden neurons of MLPs that no known site belongs to.

    Each pair of layers that are called one after the other may be the producer and the consumer of neurons.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        known: The sites that are known, by their names. Their modules are skipped.
        record: The record of a forward pass. None means that the model runs once more.
        closed: The paths of modules inside which nothing is looked for.

    Raises:
        ModelError: The forward of the model fails.
    """
    taken, result = Taken(known), Result()
    taken.paths |= set(closed)
    layers = {path: module for path, module in model.named_modules() if is_layer(module) and not taken.holds(path)}
    bare = next(_experts(model, taken, set()), None)
    if len(layers) < 2 and bare is None:
        return result
    record, finder = record or watch(model, example_inputs), Finder(model, example_inputs)
    calls = [each.path for each in record.layers]
    for time, path in enumerate(calls):
        if path not in layers or path in calls[:time] or taken.holds(path):
            continue
        reads = features_of(layers[path])[0]
        if reads < 2 or getattr(layers[path], "groups", 1) != 1:
            continue
        # Between the producer and the consumer, the forward may call other layers, such as the gate.
        for before in reversed(calls[max(0, time - BEFORE) : time]):
            scope = caller_of(model, common(before, path))
            inside = [other for other in taken.owners if other.startswith(f"{scope}.")] if scope else ["all"]
            # The features between two blocks are the residual stream. Their common parent is a list of blocks or the
            # model.
            writes = features_of(model.get_submodule(before))[1]
            if before == path or (writes % reads and before in layers):
                continue
            # A layer that belongs to a site may make the neurons beside the units of this site.
            if before not in layers and (writes <= reads or not _siblings(model, before, path)):
                continue
            if inside and not _siblings(model, before, path):
                continue
            candidate = Candidate(scope, relative(path, scope), (reads,), "neuron", "hidden neurons")
            found = next((each for _, each in finder.find([candidate])), "")
            shared = (
                [cut.tensor for cut in found.cuts if cut.tensor in taken.tensors] if isinstance(found, Site) else []
            )
            if shared:
                result.left[path] = (
                    f"its hidden neurons are rows of {shared[0]}, which also makes the units of "
                    f"{taken.tensors[shared[0]]}. Only one of the two can be cut. Split this layer to prune both."
                )
                break
            if isinstance(found, Site):
                # A whole block is no MLP, so the site is named after its consumer.
                found = found if finder.closed.get(found.name) else replace(found, name=path, module="")
                result.sites[found.name] = found
                taken.add(found)
                break
            # Features that other layers of the scope read too may be the residual stream, of which nothing is said.
            if isinstance(found, str) and found and finder.closed.get(scope):
                result.left[path] = found
                break
    called = {each.path for each in record.layers}
    for candidate in _experts(model, taken, called):
        if candidate.scope not in result.sites:
            for _, found in finder.find([candidate]):
                if isinstance(found, Site):
                    result.sites[found.name] = found
    owned = [*result.sites.values()]
    result.left = {p: why for p, why in result.left.items() if not any(p in (*s.modules, *s.consumers) for s in owned)}
    return result


def _experts(model: nn.Module, taken: "Taken", called: set[str]) -> Iterator[Candidate]:
    """Yields candidates for modules that multiply by parameters of their own, such as the experts of a mixture.

    Args:
        model: The model.
        taken: The parts of the model that belong to sites.
        called: The paths of the layers that the forward calls.
    """
    for path, module in model.named_modules():
        held = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.is_floating_point()}
        if len(held) < 2 or not path or taken.holds(path) or path in called:
            continue
        # The last parameter is likely to be the second layer. Its last axis is likely to be that of the neurons.
        for name, parameter in reversed(held.items()):
            for axis in reversed(range(parameter.dim())):
                length = parameter.shape[axis]
                others = (n for key, other in held.items() if key != name for n in other.shape)
                if length > 1 and any(n % length == 0 for n in others):
                    yield Candidate(path, name, (length,), "neuron", "hidden neurons", axis)


def _siblings(model: nn.Module, before: str, path: str) -> bool:
    """Returns True if two layers lie in the same module, or in two children of a module inside the model."""
    parents = [caller_of(model, each.rpartition(".")[0]) for each in (before, path)]
    parent = caller_of(model, common(before, path))
    if not parent:
        return parents == ["", ""]
    return all(each == parent or caller_of(model, each.rpartition(".")[0]) == parent for each in parents)
