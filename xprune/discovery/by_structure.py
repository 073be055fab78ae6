"""Finds units in attentions and MLPs of unknown classes. It tries proposed sites and takes the first exact one.

Each module is handled in three steps:

1. The whole model runs once. This records the arguments of the module's first call, and the order in which this call
   uses the linear layers of the module. The last of these layers is taken as the consumer, the others as producers.
2. `candidates.proposals` lists sites that fit the shapes of the module.
3. Each proposed site is tried on the module outside of the model, with the recorded arguments. Units are removed from a
   copy of the module, and its output has to be that of the module with gates of 0 on these units.

A site that passes is plain data, like the sites of adapters. So nothing has to be searched again when a plan is
applied. The search runs once for modules of the same class and shapes. For each further such module, the site that was
found is tried first.
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
"""The largest number of proposals that are tried for one module."""


@dataclass
class FirstCall:
    """The record of a module's first call in a forward pass.

    Attributes:
        args: The positional arguments of the call. None until the module is called.
        kwargs: The keyword arguments of the call.
        layers: The names of the module's linear layers, in the order in which the call uses them. A layer that is used
            several times has several entries.
    """

    args: Any = None
    kwargs: Any = None
    layers: list[str] = field(default_factory=list)


class Alone(nn.Module):
    """A model that contains one module of a larger model, and calls it as the larger model does.

    Surgery and the proof need a whole model. With this class, they can work on one module. The path of the module is
    "module".

    Args:
        module: The module.

    Example:
        >>> import torch
        >>> alone = Alone(nn.Linear(2, 3))
        >>> alone(args=(torch.zeros(4, 2),), kwargs={}).shape
        torch.Size([4, 3])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: Any, kwargs: Any) -> Tensor:
        """Calls the module, and returns the first tensor in its output.

        Args:
            args: The positional arguments of the call. They are copied, since the module may change them.
            kwargs: The keyword arguments of the call. They are copied too.
        """
        args, kwargs = _copied((args, kwargs))
        return tensors_in(self.module(*args, **kwargs))[0]


def _copied(given: Any) -> Any:
    """Returns a copy of a module's arguments, since a module may change them.

    An example is a key-value cache, which grows at every call.
    """
    if isinstance(given, Tensor):
        return given.detach().clone()
    # Named tuples and other subclasses are left to deepcopy, since their constructors may take other arguments.
    if isinstance(given, (tuple, list)) and type(given) in (tuple, list):
        return type(given)(_copied(item) for item in given)
    if type(given) is dict:
        return {name: _copied(item) for name, item in given.items()}
    # A module is not copied: it may be large, and our calls do not change it.
    if given is None or isinstance(given, (nn.Module, str, int, float, bool)):
        return given
    try:
        return copy.deepcopy(given)
    # Some objects cannot be copied, such as locks. The module then gets the object itself.
    except Exception:
        return given


def sites_by_structure(
    model: nn.Module, example_inputs: Any, known: Mapping[str, Site], structure: Structure
) -> tuple[dict[str, Site], dict[str, str]]:
    """Finds the sites of modules that no known site belongs to and that have a given structure.

    The model runs once, on a copy. After that, only single modules run.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        known: The sites that are known, by their names. Their modules are skipped.
        structure: The rules by which a module is recognised, for example as an attention.

    Returns:
        (sites, reasons), two dicts by the path of the module. The sites were proved on the module alone. There is a
        reason for each module without a site, except modules that turn out not to have such units.

    Raises:
        ModelError: The forward of the model fails.
    """
    paths = _candidates(model, known, structure)
    sites: dict[str, Site] = {}
    left: dict[str, str] = {}
    # The result for the last module of each class and shapes. A deep model has many equal modules.
    found_before: dict[Any, Site | str] = {}
    for path, first_call in _record_first_calls(model, example_inputs, paths).items() if paths else ():
        module = model.get_submodule(path)
        key = (type(module), tuple(first_call.layers), *((n, t.shape) for n, t in tensors(module).items()))
        found = found_before[key] = _find(module, first_call, structure, found_before.get(key))
        if isinstance(found, Site):
            sites[path] = _at_path(found, path)
        elif found:
            left[path] = found
    return sites, left


def _candidates(model: nn.Module, known: Mapping[str, Site], structure: Structure) -> list[str]:
    """Returns the paths of modules that fit the structure and share no layer with a known site.

    If a module that fits contains another one, only the inner one is returned.
    """
    # If all units of a site can be removed, the whole module belongs to the site. Otherwise only the layers that the
    # site cuts or gates belong to it.
    taken = {
        path for site in known.values() for path in (site.modules if site.module else (*site.modules, *site.consumers))
    }
    found = []
    for path, module in model.named_modules():
        inside = any(path == other or path.startswith(f"{other}.") for other in taken)
        # A model never calls an nn.ModuleList or nn.ModuleDict, so these have no forward to try.
        if not path or inside or isinstance(module, (Removed, nn.ModuleList, nn.ModuleDict)):
            continue
        own_layers = {f"{path}.{name}" for name in linears_of(module)}
        if structure.fits(module) and not any(
            layer == other or layer.startswith(f"{other}.") for layer in own_layers for other in taken
        ):
            found.append(path)
    # A block that contains an attention may look like an attention too, but its heads are those of the attention.
    inner = found if structure.around else (*found, *taken)
    return [path for path in found if not any(other.startswith(f"{path}.") for other in inner)]


@torch.no_grad()
def _record_first_calls(model: nn.Module, example_inputs: Any, paths: Sequence[str]) -> dict[str, FirstCall]:
    """Runs a copy of the model, and records the first call of each module.

    Returns:
        Path of a module -> its first call. Modules that the forward does not call are left out.
    """
    twin, calls = shared_copy(model), {path: FirstCall() for path in paths}
    # The paths of the modules whose first call has begun and not ended. A layer is recorded only inside such a call.
    running: list[str] = []

    def enter(path: str) -> Any:
        """Returns a hook that records the arguments of the module's first call."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            # If a module is called without arguments, `args` is (). So None means that it was not called yet.
            if calls[path].args is None:
                calls[path].args, calls[path].kwargs = _copied((args, kwargs))
                running.append(path)

        return hook

    # The hooks below return None. torch would use any other value as the new output.
    def leave(path: str) -> Any:
        """Returns a hook that notes the end of the module's call."""
        return lambda *_: running.remove(path) if path in running else None

    def step(path: str, name: str) -> Any:
        """Returns a hook that records the call of a linear layer."""
        return lambda *_: calls[path].layers.append(name) if path in running else None

    for path in paths:
        module = twin.get_submodule(path)
        module.register_forward_pre_hook(enter(path), with_kwargs=True)
        for name, layer in linears_of(module).items():
            layer.register_forward_hook(step(path, name))
        module.register_forward_hook(leave(path))
    try_forward(twin, example_inputs)
    return {path: first_call for path, first_call in calls.items() if first_call.args is not None}


def _find(module: nn.Module, first_call: FirstCall, structure: Structure, before: Site | str | None) -> Site | str:
    """Finds the site of one module.

    Args:
        module: The module. It is not changed.
        first_call: The record of the module's call in the model.
        structure: The rules by which the module was recognised.
        before: The result for an earlier module of the same class and shapes. If it is a site, that site is tried
            first. If it is a reason, it is returned, since the same search would fail again. None if there is no
            earlier module.

    Returns:
        The site, with paths that start with "module". Or the reason why there is no site. Or "" if the module turns out
        not to have such units.
    """
    if isinstance(before, str):
        return before
    linears = linears_of(module)
    if len(set(first_call.layers)) < 2:
        return structure.too_few(module, len(set(first_call.layers)))
    consumer = first_call.layers[-1]
    features = linears[consumer].in_features
    sizes = structure.sizes(module, features)
    producers = [name for name in dict.fromkeys(first_call.layers[:-1]) if name != consumer]
    if not structure.plausible(features, [linears[name].out_features for name in producers]):
        return ""
    if sizes == [1]:
        return structure.only_one()
    if all(features % size for size in sizes):
        return (
            f"its layer {consumer} reads {features} features, which is no multiple of {sizes[0]} {structure.called}. "
            f"If its {structure.called} differ in size, they cannot be pruned as one site."
        )
    # The weights get noise, so the copy must not share them with the caller's model.
    alone = unshare(shared_copy(Alone(module)), module)
    _randomise(alone)
    inputs, tried, problems = (first_call.args, first_call.kwargs), 0, []
    # Whether the whole module can be removed depends on the arguments of its call, so it is tested again for this
    # module.
    first = (replace(before, module=""),) if before else ()
    for site in islice(chain(first, proposals(module, structure, consumer, producers, sizes)), TRIES):
        tried += 1
        problem = _disproof(alone, site, structure.called, inputs)
        if problem is None:
            return _with_module(alone, site, inputs)
        problems.append(problem)
    # The reason shows one failure. A difference of outputs explains more than a forward that fails on wrong shapes.
    closest = next((p for p in problems if "forward fails" not in p), problems[0])
    try:
        random = exactness.randomness(alone, inputs)
    # The forward of an unknown module runs here, and it may raise any error.
    except Exception as problem:
        return (
            f"{_fails_alone(problem)}, but xprune has to call a module of an unknown class there. Write an adapter for "
            "the class, see docs/adapters.md."
        )
    if random:
        return f"{random}."
    return (
        f"xprune tried {tried} ways to cut out its {structure.called}, and none is exact. The result of one of them: "
        f"{closest}. If the forward assumes that all {structure.called} are there, write an adapter with a `pruned` "
        "class, see docs/adapters.md."
    )


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Adds noise to all weights of a module in place, so that each unit changes the output.

    Some weights are zero at the start of training, for example those of a last projection. They would hide a wrong cut.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            # With noise of this size on a weight matrix, the outputs of the layer are about as large as its inputs.
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * scale)


def _plans(site: Site) -> Iterator[Plan]:
    """Yields the plans that a proposed site is tested with.

    The first one removes the first unit. The second one keeps a random half of the units. The third one keeps one unit
    in the middle.
    """
    chance = torch.Generator().manual_seed(0)
    half = torch.randperm(site.size, generator=chance)[: (site.size + 1) // 2].sort().values.tolist()
    every = tuple(range(site.size))
    for keep in dict.fromkeys((every[1:], tuple(half), (site.size // 2,))):
        if 0 < len(keep) < site.size:
            yield Plan((site,), (keep,))


@torch.no_grad()
def _disproof(alone: nn.Module, site: Site, called: str, inputs: Any) -> str | None:
    """Returns the reason why a proposed site is wrong, or None if its cuts are exact and its gates have an effect.

    Args:
        alone: The module as a model, with noise on its weights.
        site: The proposed site.
        called: The name of the units, for the reason.
        inputs: (positional arguments, keyword arguments) of the module.
    """
    for plan in _plans(site):
        try:
            # These sites have no adapter, so surgery needs none.
            pruned = remove_units(shared_copy(alone), plan, {})
            problem = exactness.problem(alone, pruned, plan, inputs, thorough=False)
            if problem:
                return f"with {plan.counts[0]} of {site.size} {called} kept, {problem.splitlines()[0]}"
            # If a gate has no effect, the comparison proves nothing: a cut of any unused features would pass.
            if len(plan.keeps[0]) == site.size - 1 and not exactness.changes(alone, plan, inputs):
                return f"a gate on the input of {site.consumers[0].partition('.')[2]} does not change the output"
        except XPruneError as refused:
            return str(refused).rstrip(".")
        # The forward of an unknown module runs here, and it may raise any error.
        except Exception as problem:
            return _fails_alone(problem)
    return None


def _fails_alone(problem: Exception) -> str:
    """Returns the reason for a module whose forward fails outside of the model. It has the first line of the error."""
    return f"its forward fails outside of the model ({error_text(problem).splitlines()[0].removesuffix(': ')})"


@torch.no_grad()
def _with_module(alone: Any, site: Site, inputs: Any) -> Site:
    """Returns the site with `module` set, if the module can be replaced after it has lost all its units.

    It can be replaced if it returns a single tensor, and if this tensor is the bias of the consumer when all units are
    removed. Otherwise the site is returned unchanged, and a plan has to keep at least one unit.
    """
    whole = replace(site, module="module")
    plan = Plan((whole,), ((),))
    try:
        args, kwargs = _copied(inputs)
        is_tensor = isinstance(alone.module(*args, **kwargs), Tensor)
        exact = exactness.problem(alone, remove_units(shared_copy(alone), plan, {}), plan, inputs) is None
    # `Removed` needs its input as the first positional argument. If there are only keyword arguments, it fails.
    except Exception:
        return site
    return whole if is_tensor and exact else site


def _at_path(site: Site, path: str) -> Site:
    """Returns the site of a single module as a site of the model.

    Args:
        site: A site whose paths start with "module".
        path: The path of the module in the model. It replaces "module".
    """

    def at(name: str) -> str:
        """Returns the path in the model: replaces the prefix "module" by the path of the module. "" stays ""."""
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
