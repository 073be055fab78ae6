"""Cuts units out of a model's tensors and updates its attributes, without data and without a proof.

A site lists every tensor that loses entries (`Site.cuts`) and every attribute that holds the number of units
(`Site.attributes`). The functions here go through these lists. They do not check that the result is exact. `apply` and
discovery prove it afterwards.
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
from xprune.modules.paths import attribute_at, is_linear, is_transposed, layer_path, set_attribute, tensor_at
from xprune.modules.refused import misfit
from xprune.modules.removed import Removed


def _selected(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Returns the entries of a tensor at these indices along an axis, as a new tensor."""
    return tensor.detach().index_select(axis, index)


Take = Callable[[Tensor, int, Tensor], Tensor]
"""The type of a function that makes a smaller tensor from (tensor, axis, indices of the entries that stay)."""


def remove_units(model: nn.Module, plan: Plan, adapters: Mapping[str, Adapter], take: Take = _selected) -> nn.Module:
    """Removes the units that a plan does not keep from `model`, in place.

    Args:
        model: The model, which is changed. After a PlanError, some of its sites may be cut already. So give a copy.
        plan: The units that stay at each site.
        adapters: The adapters by their names. After the cuts in a module, its adapter changes what cuts cannot change,
            for example the class of the module.
        take: A function that makes each smaller tensor. The default copies the entries that stay.
            `xprune.modules.sliced.slice_of` makes tensors that take no memory.

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
    # Channels are cut before heads and neurons. The reason: a module that loses all its units is replaced by the bias
    # of its last layer, and this bias must have lost its channels by then.
    for site, keep in sorted(pairs, key=lambda pair: unit_kind(pair[0].kind).order):
        check_fit(model, site, adapters)
        unit_kind(site.kind).cut(model, site, keep, partial(_by_cuts, model, site, keep, owners, adapters, take))
    # Such a model must not run, because torch would write outside of a tensor.
    why = misfit(model, (cut.tensor for site in plan.sites for cut in site.cuts))
    if why:
        raise PlanError(f"the plan does not fit this model: {why}. Leave such layers out, or remove the weight_norm.")
    return model


def _by_cuts(
    model: nn.Module,
    site: Site,
    keep: tuple[int, ...],
    owners: dict[int, list[tuple[nn.Module, str]]],
    adapters: Mapping[str, Adapter],
    take: Take,
) -> None:
    """Removes units of one site as its lists of cuts and attributes say.

    If no unit is kept, the whole module is replaced, unless the adapter's module can run without units
    (`Adapter.empties`). If all units are kept, nothing changes.

    Args:
        model: The model, which is changed.
        site: The site.
        keep: The units that stay.
        owners: For the id of each tensor, the modules that hold it, see `_owners`. It is updated.
        adapters: The adapters by their names.
        take: A function that makes each smaller tensor.
    """
    # A module of such an adapter also runs without units. Its tensors get the size 0, and the module stays.
    empties = bool(site.adapter) and adapters[site.adapter].empties
    if not keep and not empties:
        removed = adapters[site.adapter].removed if site.adapter else None
        parts = model.get_submodule(site.consumers[0]), model.get_submodule(site.module)
        parent, _, child = site.module.rpartition(".")
        setattr(model.get_submodule(parent), child, (removed or Removed)(*parts))
    elif len(keep) < site.size:
        # `_cut_tensors` may update the same attributes. So all attributes are read before the cut.
        before = {path: attribute_at(model, path) for path in site.attributes}
        _cut_tensors(model, site, keep, owners, take)
        for path in site.lists:
            _shorten(model.get_submodule(path), keep)
        _set_attributes(model, {path: value * len(keep) // site.size for path, value in before.items()})
        for adapter, path in _adapters_to_resize(model, site, adapters):
            adapter.resize(model.get_submodule(path), site, keep)


def _adapters_to_resize(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> list[tuple[Adapter, str]]:
    """Returns the adapters whose `resize` has to run after the cut of a site, each with the path of its module.

    For most sites, this is the adapter of the site. A residual stream has no adapter, but it cuts tensors inside
    modules of many adapters. Each of these adapters resizes its module.
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
    """Returns the paths of all modules that contain the tensor at a path. The first is "", the path of the model."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def check_fit(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> None:
    """Checks that a site fits a model, before units are removed.

    Args:
        model: The model. It is not changed.
        site: The site. It may come from a saved plan that was made for another model.
        adapters: Adapter by name.

    Raises:
        PlanError: A module or tensor of the site is not in the model, or a tensor has another shape. Or the value of an
            attribute is not a multiple of the number of units. Or the adapter of the site is unknown, or it does not
            serve the module.
    """
    if site.adapter and site.adapter not in adapters:
        raise PlanError(
            f"{site.name}: there is no adapter {site.adapter!r} here. Known adapters: {', '.join(adapters)}. Install "
            "the package that adds it, or add it to xprune.ADAPTERS."
        )
    try:
        for path in (*site.consumers, site.module, *site.norms):
            model.get_submodule(layer_path(model, path))
        for path in site.lists:
            modules = model.get_submodule(path)
            if not isinstance(modules, nn.ModuleList) or len(modules) != site.size:
                raise AttributeError(f"{path} is no nn.ModuleList of {site.size} modules")
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
        wanted = cut.length(site.size)
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
    """Replaces each tensor of a site by a smaller one, and updates the sizes that layers and norm layers hold."""
    for cut in site.cuts:
        old = tensor_at(model, cut.tensor)
        new = take(old, cut.axis, cut.index(keep, site.size).to(old.device))
        value = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        places = owners.pop(id(old))
        # All modules that hold a tied tensor get the same new tensor, so it stays tied.
        for module, name in places:
            setattr(module, name, value)
            _update_sizes(module)
        # A later cut may shrink another axis of this tensor. It looks the new tensor up by its id.
        owners[id(value)] = places
    for path in site.norms:
        norm: Any = model.get_submodule(path)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (norm.normalized_shape[0] * len(keep) // site.size,)
        elif isinstance(norm, nn.GroupNorm):
            norm.num_channels = norm.num_channels * len(keep) // site.size


def _shorten(modules: Any, keep: tuple[int, ...]) -> None:
    """Removes the modules that do not stay from an nn.ModuleList, in place."""
    for index in reversed(range(len(modules))):
        if index not in keep:
            del modules[index]


def _set_attributes(model: nn.Module, values: Mapping[str, int]) -> None:
    """Sets attributes by their paths, and updates the sizes of the layers that have these attributes.

    For example, a convolution with a new number of `groups` also needs a new `in_channels`.
    """
    for path, value in values.items():
        _update_sizes(set_attribute(model, path, value))


def _update_sizes(module: Any) -> None:
    """Sets the attributes of a layer that hold sizes, such as `in_features`, to the sizes of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # A convolution with groups loses whole groups, each with its input channels. In a depthwise convolution, a
        # group is one channel. In other convolutions, a group holds the channels of one head.
        if module.groups > 1:
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        # The weight is (out_channels, in_channels / groups, *kernel).
        module.out_channels, module.in_channels = (
            module.weight.shape[0],
            module.weight.shape[1] * module.groups,
        )
    elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # Here the weight is (in_channels, out_channels / groups, *kernel).
        if module.groups > 1:
            module.groups = module.groups * module.weight.shape[0] // module.in_channels
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    # The Conv1D of transformers is a linear layer with a weight (inputs, outputs).
    elif is_transposed(module):
        module.nx, module.nf = tensor_at(module, "weight").shape
    # Linear layers of some libraries have `in_channels` and `out_channels`.
    elif is_linear(module):
        module.out_channels, module.in_channels = tensor_at(module, "weight").shape
    elif isinstance(module, BATCH_NORMS):
        module.num_features = len(tensor_at(module, "weight" if module.affine else "running_mean"))


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Finds the modules that hold each tensor of a model.

    Returns:
        The id of each tensor -> a list of (module, name of the tensor in the module). The list of a tied tensor has
        several entries.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in tensors_of(module):
            owners.setdefault(id(tensor), []).append((module, name))
    return owners
