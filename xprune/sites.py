"""find_sites: where a model has units that can go."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.errors import ModelError
from xprune.nest import map_tensors
from xprune.site import Site
from xprune.structure import Removed, reference_device, unwrap

UNITS = ("head", "neuron", "channel")
DEFAULT = ("head", "neuron")


def find_sites(
    model: nn.Module, example_inputs: Any, *, units: Sequence[str] = DEFAULT, exclude: Sequence[str] = ()
) -> tuple[Site, ...]:
    """The sites of a model, in its own order.

    example_inputs   what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments
    units            kinds of unit to look for: "head", "neuron", and "channel", the residual streams' channels
    exclude          patterns of site names to leave alone, as in `fnmatch`: "blocks.0.*", "*.mlp"

    The model is traced and not changed. Raises ModelError where its forward fails, where it has no sites, where
    channels are asked for and none can be pruned exactly, or where a pattern matches none (a typing error would prune
    what was to be left alone).
    """
    from xprune.graph import neuron_sites  # needs torch-pruning, which loading a saved model does not

    model = unwrap(model)
    unknown = sorted(set(units) - set(UNITS))
    if unknown or not units:
        raise ModelError(f"units={list(units)!r}: known kinds of unit are {', '.join(UNITS)}.")
    example_inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    known = _adapter_sites(model)
    neurons = neuron_sites(model, example_inputs, known)
    found = {**known, **{s.name: s for s in neurons}}
    if "channel" in units:
        from xprune.channels import channel_sites

        found |= {s.name: s for s in channel_sites(model, example_inputs, known, neurons)}
    sites = _in_order(model, [site for site in found.values() if site.kind in units])
    _refuse_shared(model, sites)
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ModelError(f"exclude={pattern!r} matches no site; sites: {_few([site.name for site in sites])}.")
    sites = [site for site in sites if not any(fnmatchcase(site.name, pattern) for pattern in exclude)]
    if not sites:
        raise ModelError(
            f"{type(model).__name__} has no sites of units {', '.join(units)}: no adapter knows its attention "
            f"({', '.join(ADAPTERS)}), and the graph found no hidden neurons. See the README on adding an architecture."
        )
    return tuple(sites)


def _adapter_sites(model: nn.Module) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in sites)
        for adapter in ADAPTERS.values() if path and not inside and not isinstance(module, Removed) else ():
            site = adapter.site(path, module) if adapter.serves(module) else None
            if site is not None:
                sites[path] = site
                break
    return sites


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


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
