"""Cuts units out of a model's tensors and updates its attributes. Proves nothing, and needs no data.

A site lists every tensor that loses entries (`Site.cuts`) and every attribute that holds the number of units
(`Site.attributes`). So a cut carries out a list. `apply` and discovery prove the result afterwards.
"""

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


def _selected(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Returns the entries of a tensor at these indices along an axis, as a tensor with memory of its own."""
    return tensor.detach().index_select(axis, index)


Take = Callable[[Tensor, int, Tensor], Tensor]
"""(tensor, axis, indices that stay) -> the smaller tensor."""


def remove_units(model: nn.Module, plan: Plan, adapters: Mapping[str, Adapter], take: Take = _selected) -> nn.Module:
    """Removes the units that a plan does not keep from `model`, in place.

    Args:
        model: The model. It is changed. If the plan does not fit, some sites may be cut already: give a copy.
        plan: The units that stay at each site.
        adapters: Adapter by name. They finish the modules that they serve, for example with another class.
        take: Makes each smaller tensor. `xprune.modules.sliced.slice_of` makes tensors that take no memory.

    Returns:
        The same model.

    Raises:
        PlanError: The plan does not fit the model.

    Example:
        >>> import xprune, torch
        >>> from xprune.modules.copies import shared_copy
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
        >>> plan = Plan(xprune.find_sites(model, torch.randn(3, 4)), keeps=((0, 2, 5),))
        >>> remove_units(shared_copy(model), plan, xprune.ADAPTERS)[0]
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=4, bias=True)
        )
    """
    owners = _owners(model)
    pairs = zip(plan.sites, plan.keeps, strict=True)
    # Channels are cut before heads and neurons: a module that is removed as a whole leaves the bias of its last layer,
    # and this bias must have lost its channels by then.
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
    """Carries out the cuts of one site. Replaces the whole module if no unit is kept.

    Args:
        model: The model, which is changed.
        site: The site.
        keep: The units that stay.
        owners: For the id of each tensor, the places that hold it, see `_owners`. It is updated.
        adapters: Adapter by name.
        take: Makes each smaller tensor.
    """
    empties = bool(site.adapter) and adapters[site.adapter].empties  # the module itself runs without any units
    if not keep and not empties:
        removed = adapters[site.adapter].removed if site.adapter else None
        parts = model.get_submodule(site.consumers[0]), model.get_submodule(site.module)
        parent, _, child = site.module.rpartition(".")
        setattr(model.get_submodule(parent), child, (removed or Removed)(*parts))
    elif len(keep) < site.size:
        # An attribute may belong to a layer that `_cut_tensors` updates too. So all are read before the cut.
        before = {path: attribute_at(model, path) for path in site.attributes}
        _cut_tensors(model, site, keep, owners, take)
        _set_attributes(model, {path: value * len(keep) // site.size for path, value in before.items()})
        for adapter, path in _adapters_to_resize(model, site, adapters):
            adapter.resize(model.get_submodule(path), site, keep)


def _adapters_to_resize(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> list[tuple[Adapter, str]]:
    """Returns each adapter that has to finish a module after a cut, with the path of that module.

    That is the adapter of the site. A stream has none, but it crosses modules of many adapters: each of them resizes
    its module.
    """
    if site.adapter:
        return [(adapters[site.adapter], site.owner)]
    touched = dict.fromkeys(path for cut in site.cuts for path in _ancestors(cut.tensor))
    found = []
    for path in touched if unit_kind(site.kind).crosses else ():
        module = model.get_submodule(path)
        serving = (a for a in adapters.values() if a.serves(module) and a.stream_parts(path, module) is not None)
        found += [(adapter, path) for adapter in islice(serving, 1)]
    return found


def _ancestors(path: str) -> list[str]:
    """Returns the paths of all modules that contain a tensor, the model ("") first."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def check_fit(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> None:
    """Checks that a site belongs to this model.

    Args:
        model: The model. It is not changed.
        site: The site. A saved plan may bring it from another model.
        adapters: Adapter by name.

    Raises:
        PlanError: A module or tensor of the site is not in the model, or a tensor has another shape. Or an attribute is
            no multiple of the number of units. Or the adapter is unknown or does not serve the module.
    """
    if site.adapter and site.adapter not in adapters:
        raise PlanError(
            f"{site.name}: there is no adapter {site.adapter!r} here. Known adapters: {', '.join(adapters)}. Install "
            "the package that adds it, or add it to xprune.ADAPTERS."
        )
    try:
        for path in (*site.consumers, site.module, *site.norms):
            model.get_submodule(path)
        tensors = [tensor_at(model, cut.tensor) for cut in site.cuts]
        uneven = [path for path in site.attributes if attribute_at(model, path) % site.size]
        if uneven:
            raise AttributeError(f"{uneven[0]} is {attribute_at(model, uneven[0])}, not a multiple of {site.size}")
        if site.adapter and not adapters[site.adapter].serves(model.get_submodule(site.owner)):
            kind = type(model.get_submodule(site.owner)).__name__
            raise AttributeError(f"{site.owner} is a {kind}, which the adapter {site.adapter!r} does not serve")
    except AttributeError as error:
        raise PlanError(f"{site.name}: the plan does not fit this model: {error}.") from error
    for cut, tensor in zip(site.cuts, tensors, strict=True):
        wanted = cut.groups * site.size * cut.width
        if cut.axis >= tensor.dim() or tensor.shape[cut.axis] != wanted:
            raise PlanError(
                f"{site.name}: the plan does not fit this model: {cut.tensor} has the shape {tuple(tensor.shape)}, "
                f"but the plan was made for {wanted} entries along axis {cut.axis}."
            )


def _cut_tensors(
    model: nn.Module,
    site: Site,
    keep: tuple[int, ...],
    owners: dict[int, list[tuple[nn.Module, str]]],
    take: Take,
) -> None:
    """Replaces each tensor of a site by a smaller one, and updates the sizes that layers and norms hold."""
    for cut in site.cuts:
        old = tensor_at(model, cut.tensor)
        new = take(old, cut.axis, cut.index(keep, site.size).to(old.device))
        value = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        places = owners.pop(id(old))
        for module, name in places:  # all owners of a tied tensor get the same new one, so it stays tied
            setattr(module, name, value)
            _update_sizes(module)
        owners[id(value)] = places  # a later cut may go along another axis of this tensor
    for path in site.norms:
        norm: Any = model.get_submodule(path)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (norm.normalized_shape[0] * len(keep) // site.size,)
        elif isinstance(norm, nn.GroupNorm):
            norm.num_channels = norm.num_channels * len(keep) // site.size


def _set_attributes(model: nn.Module, values: Mapping[str, int]) -> None:
    """Sets attributes by their paths. An attribute of a layer, such as `groups`, changes what its sizes mean."""
    for path, value in values.items():
        _update_sizes(set_attribute(model, path, value))


def _update_sizes(module: Any) -> None:
    """Sets the sizes that a layer holds beside its weight, such as `in_features`, to those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        # A convolution with groups loses whole groups with their inputs: channels of a depthwise one, heads of others.
        if module.groups > 1:
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        # The weight is (out_channels, in_channels / groups, height, width).
        module.out_channels, module.in_channels = (
            module.weight.shape[0],
            module.weight.shape[1] * module.groups,
        )
    elif isinstance(module, nn.ConvTranspose2d):
        # Here the weight is (in_channels, out_channels / groups, height, width).
        if module.groups > 1:
            module.groups = module.groups * module.weight.shape[0] // module.in_channels
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif is_linear(module):  # a linear layer of another library that calls its features channels
        module.out_channels, module.in_channels = tensor_at(module, "weight").shape
    elif isinstance(module, BATCH_NORMS):
        module.num_features = len(tensor_at(module, "weight" if module.affine else "running_mean"))


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Returns the id of each tensor -> the places that hold it, as (module, name). Tied tensors have several places."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in tensors_of(module):
            owners.setdefault(id(tensor), []).append((module, name))
    return owners
