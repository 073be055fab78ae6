"""Units of modules that no adapter knows: proposed by structure, each proposal proved by cutting before it is taken.

What comes out is plain data, like an adapter's sites, so that nothing is searched when a plan is carried out again.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.discovery.candidates import Structure, linears_of, proposals
from xprune.errors import XPruneError
from xprune.modules.calls import tensors_in
from xprune.modules.copies import shared_copy, tensors, unshare
from xprune.modules.forward import error_text, try_forward
from xprune.modules.removed import Removed
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

TRIES = 48
"""Proposals tried for a module at most."""


@dataclass
class Call:
    """What a module was given in its first call, and the linear layers it then called, in order."""

    args: Any = None
    kwargs: Any = None
    layers: list[str] = field(default_factory=list)


class Alone(nn.Module):
    """A module by itself, called with what it was given inside the model; its first output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: Any, kwargs: Any) -> Tensor:
        """The first tensor that the module gives, which may write into what it is given."""
        args, kwargs = _fresh((args, kwargs))
        return tensors_in(self.module(*args, **kwargs))[0]


def _fresh(given: Any) -> Any:
    """A copy of what a module is given, which it may write into: a key-value cache grows with every call."""
    if isinstance(given, Tensor):
        return given.detach().clone()
    if isinstance(given, (tuple, list)) and type(given) in (tuple, list):
        return type(given)(_fresh(item) for item in given)
    if type(given) is dict:
        return {name: _fresh(item) for name, item in given.items()}
    if given is None or isinstance(given, (nn.Module, str, int, float, bool)):
        return given
    try:
        return copy.deepcopy(given)
    except Exception:  # what cannot be copied is handed on as it is
        return given


def sites_by_structure(
    model: nn.Module, example_inputs: Any, known: Mapping[str, Site], structure: Structure
) -> tuple[dict[str, Site], dict[str, str]]:
    """(sites proved, why there is none) by module path, for modules that look like attentions or like MLPs.

    known       sites that are there already (name -> site): their modules are left to them
    structure   how modules look that hold such units

    One forward pass of the model, on a copy; everything else runs on the modules alone.
    """
    paths = _candidates(model, known, structure)
    sites: dict[str, Site] = {}
    left: dict[str, str] = {}
    alike: dict[Any, Site | str] = {}  # what was found for a module of the same class and shapes
    for path, seen in _watch(model, example_inputs, paths).items() if paths else ():
        module = model.get_submodule(path)
        key = (type(module), tuple(seen.layers), *((n, t.shape) for n, t in tensors(module).items()))
        found = alike[key] = _find(module, seen, structure, alike.get(key))
        if isinstance(found, Site):
            sites[path] = _placed(found, path)
        elif found:
            left[path] = found
    return sites, left


def _candidates(model: nn.Module, known: Mapping[str, Site], structure: Structure) -> list[str]:
    """Paths of the innermost modules that look like attentions, or like MLPs, and are no known site's."""
    taken = {
        path for site in known.values() for path in (site.modules if site.module else (*site.modules, *site.consumers))
    }
    found = []
    for path, module in model.named_modules():
        inside = any(path == other or path.startswith(f"{other}.") for other in taken)
        if not path or inside or isinstance(module, (Removed, nn.ModuleList, nn.ModuleDict)):
            continue
        own_layers = {f"{path}.{name}" for name in linears_of(module)}
        if structure.fits(module) and not any(
            layer == other or layer.startswith(f"{other}.") for layer in own_layers for other in taken
        ):
            found.append(path)
    around = () if structure.around else taken
    return [path for path in found if not any(other.startswith(f"{path}.") for other in (*found, *around))]


@torch.no_grad()
def _watch(model: nn.Module, example_inputs: Any, paths: Sequence[str]) -> dict[str, Call]:
    """What happens in each module's first call in a forward pass; modules that are not called are left out."""
    twin, calls = shared_copy(model), {path: Call() for path in paths}
    open_: list[str] = []

    def enter(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if calls[path].args is None:
                calls[path].args, calls[path].kwargs = _fresh((args, kwargs))
                open_.append(path)

        return hook

    def leave(path: str) -> Any:
        return lambda *_: open_.remove(path) if path in open_ else None

    def step(path: str, name: str) -> Any:
        return lambda *_: calls[path].layers.append(name) if path in open_ else None

    for path in paths:
        module = twin.get_submodule(path)
        module.register_forward_pre_hook(enter(path), with_kwargs=True)
        for name, layer in linears_of(module).items():
            layer.register_forward_hook(step(path, name))
        module.register_forward_hook(leave(path))
    try_forward(twin, example_inputs)
    return {path: seen for path, seen in calls.items() if seen.args is not None}


def _find(module: nn.Module, seen: Call, structure: Structure, twin: Site | str | None) -> Site | str:
    """The site of a module, its paths relative to `Alone`; or why there is none, "" where nothing looks like units.

    twin   what was found for one like it: the first site to try, or the reason, which is not looked into again
    """
    if isinstance(twin, str):
        return twin
    linears = linears_of(module)
    if len(set(seen.layers)) < 2:
        return structure.too_few(module, len(set(seen.layers)))
    consumer = seen.layers[-1]
    features = linears[consumer].in_features
    sizes = structure.sizes(module, features)
    producers = [name for name in dict.fromkeys(seen.layers[:-1]) if name != consumer]
    if not structure.plausible(features, [linears[name].out_features for name in producers]):
        return ""
    if sizes == [1]:
        return structure.only_one()
    if all(features % size for size in sizes):
        return f"{consumer} reads {features} features, no multiple of {sizes[0]} heads"
    alone = unshare(shared_copy(Alone(module)), module)
    _randomise(alone)
    inputs, tried, problems = (seen.args, seen.kwargs), 0, []
    first = (replace(twin, module=""),) if twin else ()
    for site in islice(chain(first, proposals(module, structure, consumer, producers, sizes)), TRIES):
        tried += 1
        problem = _disproved(alone, site, inputs)
        if problem is None:
            return _whole(alone, site, inputs)
        problems.append(problem)
    closest = next((p for p in problems if "forward fails" not in p), problems[0])
    try:
        random = exactness.randomness(alone, inputs)
    except Exception as problem:  # whatever it raises where the model does not call it
        return f"its forward fails when it is called by itself ({_first_line(problem)})"
    if random:
        return random
    return (
        f"its {structure.called} cannot be cut out exactly, in none of {tried} ways tried: {closest}. Where its "
        "forward takes them to fill the model's width, an adapter with a `pruned` forward serves it"
    )


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Weights under which every unit tells on the output: nothing is zero, as some are at the start of training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * scale)


def _plans(site: Site) -> Iterator[Plan]:
    """One unit less, about half of them, one left."""
    chance = torch.Generator().manual_seed(0)
    half = torch.randperm(site.size, generator=chance)[: (site.size + 1) // 2].sort().values.tolist()
    every = tuple(range(site.size))
    for keep in dict.fromkeys((every[1:], tuple(half), (site.size // 2,))):
        if 0 < len(keep) < site.size:
            yield Plan((site,), (keep,))


@torch.no_grad()
def _disproved(alone: nn.Module, site: Site, inputs: Any) -> str | None:
    """Why the site is not what the module has; None where every cut is exact and every gate tells."""
    for plan in _plans(site):
        try:
            pruned = remove_units(shared_copy(alone), plan, {})
            problem = exactness.problem(alone, pruned, plan, inputs, thorough=False)
            if problem:
                return f"with {plan.counts[0]} of {site.size} left {problem.splitlines()[0]}"
            if len(plan.keeps[0]) == site.size - 1 and not exactness.changes(alone, plan, inputs):
                return f"a gate on the input of {site.consumers[0].partition('.')[2]} does not change what it gives"
        except XPruneError as refused:
            return str(refused)
        except Exception as problem:
            return f"its forward fails when it is called by itself ({_first_line(problem)})"
    return None


def _first_line(problem: Exception) -> str:
    """The first line of what an error says."""
    return error_text(problem).splitlines()[0].removesuffix(": ")


@torch.no_grad()
def _whole(alone: Any, site: Site, inputs: Any) -> Site:
    """The site with its module, where nothing but the consumer's bias is left of that when all units go."""
    whole = replace(site, module="module")
    plan = Plan((whole,), ((),))
    try:
        args, kwargs = _fresh(inputs)
        plain = isinstance(alone.module(*args, **kwargs), Tensor)
        exact = exactness.problem(alone, remove_units(shared_copy(alone), plan, {}), plan, inputs) is None
    except Exception:
        return site
    return whole if plain and exact else site


def _placed(site: Site, path: str) -> Site:
    """The same site in the model, where its module stands at `path`."""

    def at(name: str) -> str:
        return path + name.removeprefix("module") if name else ""

    return replace(
        site,
        name=path,
        consumers=tuple(at(name) for name in site.consumers),
        cuts=tuple(replace(cut, tensor=at(cut.tensor)) for cut in site.cuts),
        module=at(site.module),
        norms=tuple(at(norm) for norm in site.norms),
        attributes=tuple(at(name) for name in site.attributes),
    )
