"""find_sites: where a model has units that can go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.site import Site, Sites
from xprune.core.unit_kind import Search, UnitKind
from xprune.discovery.consumers import with_consumers
from xprune.discovery.kinds import UNIT_KINDS
from xprune.errors import ModelError
from xprune.modules.calls import call, map_tensors, slow_path, tensors_in
from xprune.modules.copies import alias, reference_device, unwrap
from xprune.modules.removed import Removed


def find_sites(
    model: nn.Module, example_inputs: Any, *, units: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> Sites:
    """The sites of a model, in its own order; `sites.left` says which attentions and MLPs gave none, and why.

    example_inputs   what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments
    units            kinds of unit to look for, by their names in UNIT_KINDS: "head", "neuron", and "channel", the
                     residual streams' channels, or one that another package adds; None: heads and neurons, and what
                     else is looked for unasked
    exclude          patterns of site names to leave alone, as in `fnmatch`: "blocks.0.*", "*.mlp"

    Where no adapter serves a class, units are proposed by structure and each proposal is proved on the module by
    cutting. The model is traced and not changed. Raises ModelError where its forward fails, where it has no sites,
    where channels are asked for and none can be pruned exactly, or where a pattern matches none (a typing error would
    prune what was to be left alone).
    """
    model = unwrap(model)
    default = [name for name, kind in UNIT_KINDS.items() if kind.by_default]
    units = default if units is None else units
    unknown = sorted(set(units) - set(UNIT_KINDS))
    if unknown or not units:
        raise ModelError(f"units={list(units)!r}: known kinds of unit are {', '.join(UNIT_KINDS)}.")
    example_inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    known = _adapter_sites(model)
    search = Search(known, closed=known, model=model, example_inputs=example_inputs)
    for kind in _with_needed((*default, *units)):
        search = search.after(kind.find(search))
    found, left = search.sites, dict(search.left)
    wanted = [site for site in found.values() if site.kind in units]
    sites = _in_order(model, _closed(model, wanted, example_inputs, left))
    sites = _with_batch_axes(model, sites, example_inputs)
    _refuse_shared(model, sites)
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ModelError(f"exclude={pattern!r} matches no site; sites: {_few([site.name for site in sites])}.")
    sites = [site for site in sites if not any(fnmatchcase(site.name, pattern) for pattern in exclude)]
    if not sites:
        raise ModelError(
            f"{type(model).__name__} has no sites of units {', '.join(units)}: no adapter knows its attention "
            f"({', '.join(ADAPTERS)}), and the graph found no hidden neurons. {_reasons(left)}"
            "See docs/adapters.md on adding an architecture."
        )
    return Sites(sites, left)


def _with_needed(names: Sequence[str]) -> list[UnitKind]:
    """The kinds of these names, each behind those that it needs."""
    found: dict[str, UnitKind] = {}
    for name in names:
        kind = UNIT_KINDS[name]
        found |= {each.name: each for each in (*_with_needed(kind.needs), kind)}
    return list(found.values())


def _adapter_sites(model: nn.Module) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in sites)
        for adapter in ADAPTERS.values() if path and not inside and not isinstance(module, Removed) else ():
            site = adapter.site(path, module) if adapter.serves(module) else None
            if site is not None:
                sites[site.name] = site
                break
    return sites


def _with_batch_axes(model: nn.Module, sites: list[Site], example_inputs: Any) -> list[Site]:
    """The sites with the axis of the samples in their layers' inputs: the one that grows with the batch."""
    paths = {site.layer for site in sites}
    for device in ("meta", None):  # a forward that looks at values does not run on the meta device
        try:
            shapes = [_shapes(model, paths, example_inputs, times, device) for times in (1, 2)]
            break
        except Exception:  # or there is no batch along the first axis
            shapes = [{}, {}]
    found = []
    for site in sites:
        one, two = (seen.get(site.layer, torch.Size()) for seen in shapes)
        grown = [axis for axis, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
        found.append(replace(site, batch=grown[0]) if grown and grown[0] != site.axis % len(one) else site)
    return found


@torch.no_grad()
def _shapes(
    model: nn.Module, paths: Iterable[str], example_inputs: Any, times: int, device: str | None
) -> dict[str, torch.Size]:
    """Shape of each layer's input, for a batch that is so many times the example's."""
    seen: dict[str, torch.Size] = {}
    copy = alias(model, device=device)
    for path in paths:
        copy.get_submodule(path).register_forward_pre_hook(partial(_see, seen, path), with_kwargs=True)
    with slow_path():
        call(copy, map_tensors(example_inputs, lambda t: torch.cat([t.to(device)] * times)))
    return seen


def _see(seen: dict[str, torch.Size], path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
    given = tensors_in((args, kwargs))
    seen[path] = given[0].shape if given else torch.Size()


def _closed(model: nn.Module, sites: Iterable[Site], example_inputs: Any, left: dict[str, str]) -> list[Site]:
    """The sites with all that their units feed; those of which that cannot be told are put into `left`, with why."""
    found = []
    for site in sites:
        try:
            found.append(site if site.layer else with_consumers(model, site, example_inputs))
        except ModelError as reason:
            left[site.name] = str(reason)
    return found


def _in_order(model: nn.Module, sites: list[Site]) -> list[Site]:
    order = {path: position for position, (path, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda site: order[site.layer])


def _refuse_shared(model: nn.Module, sites: list[Site]) -> None:
    """Two sites that cut one tensor would each spoil the other's indices."""
    cut_by: dict[tuple[int, int], str] = {}
    for site in sites:
        for cut in site.cuts:
            owner, _, name = cut.tensor.rpartition(".")
            key = (id(getattr(model.get_submodule(owner), name)), cut.axis)
            if cut_by.setdefault(key, site.name) != site.name:
                raise ModelError(
                    f"{site.name} and {cut_by[key]} share the tensor {cut.tensor}; exclude both or untie it."
                )


def _reasons(left: Mapping[str, str]) -> str:
    return "".join(f"Left alone: {path}, {why}. " for path, why in list(left.items())[:3])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
