"""find_sites: where a model has units that can go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.site import Site, Sites
from xprune.core.unit_kind import Search, UnitKind
from xprune.discovery.consumers import with_consumers
from xprune.discovery.in_model import proved
from xprune.discovery.kinds import UNIT_KINDS
from xprune.errors import ModelError
from xprune.modules.calls import map_tensors
from xprune.modules.copies import reference_device, refuse_meta, unwrap
from xprune.modules.removed import Removed
from xprune.modules.samples import Samples, find_samples
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.gates import with_gated_classes


@undisturbed()
def find_sites(
    model: nn.Module,
    example_inputs: Any,
    *,
    units: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    batch_axis: int | None = None,
) -> Sites:
    """Finds the sites of a model, in its own order. `sites.left` says which attentions and MLPs gave none, and why.

    Where no adapter serves a class, units are proposed by structure and each proposal is proved on the module by
    cutting. Then all sites are proved once more, together and inside the model. The model is traced and not changed.

    Args:
        model: The model.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        units: Kinds of unit to look for, by their names in UNIT_KINDS: "head", "neuron", and "channel", the residual
            streams' channels, or one that another package adds. None: those that are looked for unasked.
        exclude: Patterns of site names to leave alone, as in `fnmatch`: "blocks.0.*", "*.mlp".
        batch_axis: Axis of the samples in the inputs: 1 where tokens come first. None: found by taking a sample away.

    Raises:
        ModelError: Where the forward fails, where the model has no sites, where channels are asked for and none can be
            pruned exactly, or where a pattern matches none (a typing error would prune what was to be left alone).
    """
    model = unwrap(model)
    refuse_meta(model)
    units = (units,) if isinstance(units, str) else units  # one name, or one pattern, may stand alone
    exclude = (exclude,) if isinstance(exclude, str) else exclude
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
    sites = [_kept_where_shared(model, site) for site in _in_order(model, _closed(model, wanted, example_inputs, left))]
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ModelError(f"exclude={pattern!r} matches no site; sites: {_few([site.name for site in sites])}.")
    sites = [site for site in sites if not any(fnmatchcase(site.name, pattern) for pattern in exclude)]
    if sites:
        layers = [site.consumers[0] for site in sites]
        samples = find_samples(
            model, example_inputs, layers, batch_axis, prepare=lambda copy: with_gated_classes(copy, sites)
        )
        sites, wrong = proved(model, sites, example_inputs, samples)
        sites, left = [_with_batch_axis(site, samples) for site in sites], {**wrong, **left}
    if not sites:
        raise ModelError(_nothing(model, units, left))
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


def _with_batch_axis(site: Site, samples: Samples | None) -> Site:
    """The site with the axis of the samples in its layer's input, -1 where that is not known."""
    return replace(site, batch=samples.layers.get(site.consumers[0], -1) if samples else -1)


def _closed(model: nn.Module, sites: Iterable[Site], example_inputs: Any, left: dict[str, str]) -> list[Site]:
    """The sites with all that their units feed; those of which that cannot be told are put into `left`, with why."""
    found = []
    for site in sites:
        try:
            found.append(with_consumers(model, site, example_inputs) if "" in site.consumers else site)
        except ModelError as reason:
            left[site.name] = str(reason)
        except Exception as problem:  # whatever a forward raises while it is probed
            left[site.name] = f"its forward fails while it is probed: {type(problem).__name__}: {problem}"
    return found


def _in_order(model: nn.Module, sites: list[Site]) -> list[Site]:
    order = {path: place for place, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(sites, key=lambda site: order[site.consumers[0]])


def _kept_where_shared(model: nn.Module, site: Site) -> Site:
    """The site, of which one unit has to stay where its module stands at several places: one of them would remain."""
    if not site.module:
        return site
    module = model.get_submodule(site.module)
    places = sum(part is module for _, part in model.named_modules(remove_duplicate=False))
    return replace(site, module="") if places > 1 else site


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
