"""find_sites: where a model has units that can go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.site import Cut, Site, Sites
from xprune.discovery.consumers import with_consumers
from xprune.discovery.in_model import proved
from xprune.errors import ModelError
from xprune.modules.calls import map_tensors
from xprune.modules.copies import reference_device, unwrap
from xprune.modules.removed import Removed
from xprune.modules.samples import Samples, find_samples
from xprune.surgery.gates import with_gated_classes

UNITS = ("head", "neuron", "channel")
DEFAULT = ("head", "neuron")


def find_sites(
    model: nn.Module,
    example_inputs: Any,
    *,
    units: Sequence[str] = DEFAULT,
    exclude: Sequence[str] = (),
    batch_axis: int | None = None,
) -> Sites:
    """Finds the sites of a model, in its own order. `sites.left` says which attentions and MLPs gave none, and why.

    Where no adapter serves a class, units are proposed by structure and each proposal is proved on the module by
    cutting. Then all sites are proved once more, together and inside the model. The model is traced and not changed.

    Args:
        model: The model.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        units: Kinds of unit to look for: "head", "neuron", and "channel", the residual streams' channels.
        exclude: Patterns of site names to leave alone, as in `fnmatch`: "blocks.0.*", "*.mlp".
        batch_axis: Axis of the samples in the inputs: 1 where tokens come first. None: found by taking a sample away.

    Raises:
        ModelError: Where the forward fails, where the model has no sites, where channels are asked for and none can be
            pruned exactly, or where a pattern matches none (a typing error would prune what was to be left alone).
    """
    from xprune.discovery.by_structure import (
        sites_by_structure,  # both need torch-pruning, which loading a saved model does not
    )
    from xprune.discovery.dependency_graph import CannotTraceError
    from xprune.discovery.neurons import neuron_sites

    model = unwrap(model)
    unknown = sorted(set(units) - set(UNITS))
    if unknown or not units:
        raise ModelError(f"units={list(units)!r}: known kinds of unit are {', '.join(UNITS)}.")
    example_inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    known = _adapter_sites(model)
    heads, left = sites_by_structure(model, example_inputs, known, "head")
    known.update(heads)
    seen = {**known, **{path: _opaque(model, path) for path in left}}
    in_graph, followed = list[Site](), dict[str, str]()
    try:
        in_graph, followed = neuron_sites(model, example_inputs, seen)
    except CannotTraceError as reason:  # it runs, so what is known of its modules still holds
        followed = {type(model).__name__: str(reason)}
    found = {**known, **{site.name: site for site in in_graph}}
    neurons, more = sites_by_structure(model, example_inputs, found, "neuron")
    found, left = {**found, **neurons}, {**left, **more}
    left |= {path: why for path, why in followed.items() if not _covered(path, found, left)}
    if "channel" in units:
        from xprune.discovery.channels import channel_sites

        hidden = [site for site in found.values() if site.kind == "neuron"]
        found |= {s.name: s for s in channel_sites(model, example_inputs, seen, hidden)}
    wanted = [site for site in found.values() if site.kind in units]
    sites = _in_order(model, _closed(model, wanted, example_inputs, left))
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ModelError(f"exclude={pattern!r} matches no site; sites: {_few([site.name for site in sites])}.")
    sites = [site for site in sites if not any(fnmatchcase(site.name, pattern) for pattern in exclude)]
    if sites:
        layers = [site.layer for site in sites]
        samples = find_samples(
            model, example_inputs, layers, batch_axis, prepare=lambda copy: with_gated_classes(copy, sites)
        )
        sites, wrong = proved(model, sites, example_inputs, samples)
        sites, left = [_with_batch_axis(site, samples) for site in sites], {**wrong, **left}
    if not sites:
        raise ModelError(_nothing(model, units, left))
    return Sites(sites, left)


def _opaque(model: nn.Module, path: str) -> Site:
    """What the graph needs to know of an attention that is left alone, so as not to look into it: its two ends."""
    layers = {n: part for n, part in model.get_submodule(path).named_modules() if isinstance(part, nn.Linear)}
    first = next(iter(layers))
    back = [name for name, part in layers.items() if part.out_features == layers[first].in_features]
    first, last = f"{path}.{first}", f"{path}.{(back or list(layers))[-1]}"
    return Site(path, "head", 1, 1, last, cuts=(Cut(f"{first}.weight", 0), Cut(f"{last}.weight", 1)), module=path)


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


def _with_batch_axis(site: Site, samples: Samples | None) -> Site:
    """The site with the axis of the samples in its layer's input, -1 where that is not known."""
    return replace(site, batch=samples.layers.get(site.layer, -1) if samples else -1)


def _covered(path: str, found: Mapping[str, Site], left: Mapping[str, str]) -> bool:
    """True for a layer that belongs to a site, or to a module that has a reason of its own."""
    ours = any(path in site.feeds or path in site.modules for site in found.values())
    return ours or any(path == other or path.startswith(f"{other}.") for other in left)


def _closed(model: nn.Module, sites: Iterable[Site], example_inputs: Any, left: dict[str, str]) -> list[Site]:
    """The sites with all that their units feed; those of which that cannot be told are put into `left`, with why."""
    found = []
    for site in sites:
        try:
            found.append(site if site.layer else with_consumers(model, site, example_inputs))
        except ModelError as reason:
            left[site.name] = str(reason)
        except Exception as problem:  # whatever a forward raises while it is probed
            left[site.name] = f"its forward fails while it is probed: {type(problem).__name__}: {problem}"
    return found


def _in_order(model: nn.Module, sites: list[Site]) -> list[Site]:
    order = {path: position for position, (path, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda site: order[site.layer])


def _nothing(model: nn.Module, units: Sequence[str], left: Mapping[str, str]) -> str:
    """Why a model has no sites, the reason first."""
    reasons = [f"{path}, {why}" for path, why in left.items()]
    first, *others = reasons or [
        "it has no attention that says its number of heads, and no hidden layer that layers of one module write and a "
        "linear layer or 1x1 convolution of it reads"
    ]
    also = "".join(f" Left alone too: {reason}." for reason in others[:2])
    return (
        f"{type(model).__name__} has no sites of units {', '.join(units)}: {first.rstrip('.')}.{also} "
        "See docs/adapters.md on adding an architecture."
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
