"""Cutting: units removed from a model's tensors and counts, not yet proved. Needs neither data nor a trace."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn

from xprune.core.interfaces import Adapter
from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.core.unit_kind import unit_kind
from xprune.errors import PlanError
from xprune.modules.copies import tensors_of
from xprune.modules.norms import BATCH_NORMS
from xprune.modules.paths import attribute_at, is_linear, set_attribute, tensor_at
from xprune.modules.removed import Removed


def _taken(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """The indices along an axis that stay, in a tensor of its own."""
    return tensor.detach().index_select(axis, index)


Take = Callable[[Tensor, int, Tensor], Tensor]
"""(tensor, axis, indices that stay) to the tensor that is left."""


def remove_units(model: nn.Module, plan: Plan, adapters: Mapping[str, Adapter], take: Take = _taken) -> nn.Module:
    """Carries the plan out on `model` in place: cuts tensors, sets counts, replaces what is wholly gone.

    Args:
        model: The model, which is changed. Where the plan does not fit, it is left partly cut: give a copy.
        plan: The units that stay.
        adapters: Adapters by name, for what is left to do on the modules that they know.
        take: What makes a smaller tensor: a real one, or `xprune.modules.sliced.slice_of` for one without memory.

    Returns:
        The same model.

    Raises:
        PlanError: The plan does not fit the model.
    """
    owners = _owners(model)
    pairs = zip(plan.sites, plan.keeps, strict=True)
    for site, keep in sorted(pairs, key=lambda pair: unit_kind(pair[0].kind).order):
        check_fit(model, site, adapters)
        unit_kind(site.kind).cut(model, site, keep, partial(_by_cuts, model, site, keep, owners, adapters, take))
    return model


def _by_cuts(
    model: nn.Module,
    site: Site,
    keep: tuple[int, ...],
    owners: dict[int, list[tuple[nn.Module, str]]],
    adapters: Mapping[str, Adapter],
    take: Take,
) -> None:
    """Removes the units of one site as its cuts say, or its whole module where no unit is kept."""
    empties = bool(site.adapter) and adapters[site.adapter].empties
    if not keep and not empties:
        left = adapters[site.adapter].removed if site.adapter else None
        parts = model.get_submodule(site.layer), model.get_submodule(site.module)
        parent, _, child = site.module.rpartition(".")
        setattr(model.get_submodule(parent), child, (left or Removed)(*parts))
    elif len(keep) < site.size:
        counts = {path: attribute_at(model, path) for path in site.counts}
        _cut(model, site, keep, owners, take)
        _recount(model, {path: count * len(keep) // site.size for path, count in counts.items()})
        for adapter, path in _resized(model, site, adapters):
            adapter.resize(model.get_submodule(path), site, keep)


def _resized(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> list[tuple[Adapter, str]]:
    """The adapters of the modules that have lost units or channels, with the modules' paths."""
    if site.adapter:
        return [(adapters[site.adapter], site.owner)]
    touched = dict.fromkeys(prefix for cut in site.cuts for prefix in _prefixes(cut.tensor))
    found = []
    for path in touched if unit_kind(site.kind).crosses else ():
        module = model.get_submodule(path)
        ours = (a for a in adapters.values() if a.serves(module) and a.along_stream(path, module) is not None)
        found += [(adapter, path) for adapter in islice(ours, 1)]
    return found


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def check_fit(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> None:
    """PlanError where the site's modules or tensors are not in the model, or have other shapes."""
    if site.adapter and site.adapter not in adapters:
        raise PlanError(f"{site.name}: no adapter {site.adapter!r} here; known: {', '.join(adapters)}.")
    try:
        for path in (*site.feeds, site.module, *site.norms):
            model.get_submodule(path)
        tensors = [tensor_at(model, cut.tensor) for cut in site.cuts]
        uneven = [path for path in site.counts if attribute_at(model, path) % site.size]
        if uneven:
            raise AttributeError(f"{uneven[0]} is {attribute_at(model, uneven[0])}, no multiple of {site.size}")
        if site.adapter and not adapters[site.adapter].serves(model.get_submodule(site.owner)):
            raise AttributeError(f"{site.owner} is a {type(model.get_submodule(site.owner)).__name__}")
    except AttributeError as error:
        raise PlanError(f"{site.name}: the plan does not fit this model: {error}.") from error
    for cut, tensor in zip(site.cuts, tensors, strict=True):
        wanted = cut.groups * site.size * cut.width
        if cut.axis >= tensor.dim() or tensor.shape[cut.axis] != wanted:
            raise PlanError(
                f"{site.name}: the plan does not fit this model: {cut.tensor} is {tuple(tensor.shape)}, "
                f"the plan wants {wanted} along axis {cut.axis}."
            )


def _cut(
    model: nn.Module,
    site: Site,
    keep: tuple[int, ...],
    owners: dict[int, list[tuple[nn.Module, str]]],
    take: Take,
) -> None:
    for cut in site.cuts:
        old = tensor_at(model, cut.tensor)
        new = take(old, cut.axis, cut.index(keep, site.size).to(old.device))
        value = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        places = owners.pop(id(old))
        for module, name in places:  # a tied tensor has several owners and stays tied
            setattr(module, name, value)
            _sync(module)
        owners[id(value)] = places
    for path in site.norms:
        norm: Any = model.get_submodule(path)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (norm.normalized_shape[0] * len(keep) // site.size,)
        elif isinstance(norm, nn.GroupNorm):
            norm.num_channels = norm.num_channels * len(keep) // site.size


def _recount(model: nn.Module, counts: Mapping[str, int]) -> None:
    for path, count in counts.items():
        _sync(set_attribute(model, path, count))


def _sync(module: Any) -> None:
    """Sets the counts that a layer keeps beside its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        if module.groups > 1:  # whole groups go, with their inputs: all of depthwise convolutions, heads of others
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = (
            module.weight.shape[0],
            module.weight.shape[1] * module.groups,
        )
    elif isinstance(module, nn.ConvTranspose2d):
        if module.groups > 1:
            module.groups = module.groups * module.weight.shape[0] // module.in_channels
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif is_linear(module):
        module.out_channels, module.in_channels = tensor_at(module, "weight").shape
    elif isinstance(module, BATCH_NORMS):
        module.num_features = len(tensor_at(module, "weight" if module.affine else "running_mean"))


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in tensors_of(module):
            owners.setdefault(id(tensor), []).append((module, name))
    return owners
