"""find_sites: lists the sites of a model. It is the entry point of discovery."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.coverage import Coverage
from xprune.core.site import Site, Sites
from xprune.core.unit_kind import Search, UnitKind, unit_kind
from xprune.discovery.consumers import with_consumers
from xprune.discovery.in_model import proved
from xprune.discovery.kinds import UNIT_KINDS
from xprune.discovery.watch import watch
from xprune.errors import ModelError
from xprune.modules.calls import map_tensors
from xprune.modules.copies import reference_device, tensors, unwrap
from xprune.modules.forward import error_text
from xprune.modules.part import Part
from xprune.modules.paths import layer_path, part_at
from xprune.modules.refused import CUT, missing_tensors, named_reasons, refuse
from xprune.modules.removed import Removed
from xprune.modules.samples import Samples, find_samples
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.gates import with_gated_classes

IDLE = "the model's forward does not run it on the example inputs, so its units have no effect that could be measured."
"""The reason for a module that the forward does not call."""


@undisturbed()
def find_sites(
    model: nn.Module,
    example_inputs: Any,
    *,
    units: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    inside: str | Sequence[str] = (),
    batch_axis: int | None = None,
) -> Sites:
    """Finds the sites of a model: the places where units can be removed exactly.

    Adapters know the sites of common classes. Other sites are found in the dependency graph of the model, or proposed
    from the structure of a module. At the end, all sites are proved together: units are removed from a copy of the
    model, and the outputs have to be those of the gated dense model. A site that fails is left out.

    Args:
        model: The model, in any mode and on any device except meta. A copy of it runs in eval mode. The model is not
            changed.
        example_inputs: The inputs that the model is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        units: The unit kinds to look for, one name or a list of names: "head", "neuron", "channel" (the channels of
            residual streams), or a kind that another package adds to the table UNIT_KINDS. If None, heads and neurons
            are looked for, and all other kinds that set `by_default`.
        exclude: Sites whose names match are left out. One pattern or a list of patterns in the notation of `fnmatch`,
            such as "blocks.0.*" or "*.mlp".
        inside: The part of the model to prune: one pattern or a list of patterns of module paths, such as
            "vision_model.*". A pattern means the modules that match and everything inside them. Only sites that lie
            inside as a whole are returned, so a plan for them changes no tensor outside. An empty list means the whole
            model.
        batch_axis: The axis of the inputs along which samples lie: 0, or 1 if tokens come first. If None, it is found
            by running the model with one sample less.

    Returns:
        The sites as a tuple, in the order of the modules in the model. Its attribute `left` has the modules that look
        like an attention or MLP but give no site: path of the module -> reason. With `inside`, these are modules
        inside. The attribute `inside` of the result holds the patterns.

    Raises:
        ModelError: The forward fails, or the model has no sites. Or `units` names an unknown kind. Or `units` names
            "channel", but no stream can be pruned exactly. Or a pattern of `exclude` matches no site. This is an error
            because a typing mistake would prune units that the user wants to keep. Or a pattern of `inside` matches no
            module.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> sites = find_sites(model, torch.randn(4, 5, 8))
        >>> [(site.name, site.kind, site.size) for site in sites]
        [('0.self_attn', 'head', 2), ('0.linear2', 'neuron', 16)]
        >>> sites.left
        {}
    """
    model = unwrap(model)
    refuse(model, CUT)
    units = (units,) if isinstance(units, str) else units
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    default = [name for name, kind in UNIT_KINDS.items() if kind.by_default]
    units = default if units is None else units
    unknown = sorted(set(units) - set(UNIT_KINDS))
    if unknown or not units:
        raise ModelError(
            f"units={list(units)!r} is not a list of known unit kinds. Give one or more of: {', '.join(UNIT_KINDS)}."
        )
    part = Part.of(model, inside) if inside else None
    example_inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    record = watch(model, example_inputs)
    if part is not None:
        # Attentions outside of the part are not tried.
        record.attended = {path: seen for path, seen in record.attended.items() if part.holds(path)}
    known = _adapter_sites(model)
    # A composite model may run only a part of its modules on these inputs. The rest cannot be gated.
    idle = {name: IDLE for name, site in known.items() if site.owner not in record.ran}
    known = {name: site for name, site in known.items() if name not in idle}
    search = Search(known, idle, known, model=model, example_inputs=example_inputs, record=record)
    # The default kinds are searched even if the caller asks for other kinds only. A later kind has to know which
    # modules belong to sites of earlier kinds, and why other modules have no sites.
    for kind in _with_needed((*default, *units)):
        search = search.after(kind.find(search))
    found, left = search.sites, dict(search.left)
    wanted = [site for site in found.values() if site.kind in units]
    # An expert that no token chose does not run either. The class that an adapter gives a module may call more layers.
    resting = {s.name for s in wanted if not s.adapter and not _runs(model, s, record.ran)}
    left |= dict.fromkeys(resting, IDLE)
    wanted = [site for site in wanted if site.name not in resting]
    if part is not None:
        # A reason for the whole model has the class of the model in place of a path.
        left = {path: why for path, why in left.items() if part.holds(path) or path == type(model).__name__}
        wanted = _inside(model, part, wanted, left)
    complete = _with_all_consumers(model, _with_all_tensors(model, wanted, left), example_inputs, left)
    if part is not None:
        # Some consumers were not known before.
        complete = _inside(model, part, complete, left)
    sites = [_keep_one_unit_if_shared(model, site, complete) for site in _in_model_order(model, complete)]
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            names = _first_names([site.name for site in sites])
            raise ModelError(f"exclude={pattern!r} matches no site. Correct the pattern. The sites are: {names}.")
    # Excluded sites are dropped before the proof, so that they cannot make the proof of others fail.
    sites = [site for site in sites if not any(fnmatchcase(site.name, pattern) for pattern in exclude)]
    if sites:
        layers = [layer_path(model, site.consumers[0]) for site in sites]
        # In some classes, the forward calls the consumer only if the module has its gated class, see Adapter.gated.
        samples = find_samples(
            model, example_inputs, layers, batch_axis, prepare=lambda copy: with_gated_classes(copy, sites)
        )
        sites, wrong = proved(model, sites, example_inputs, samples)
        sites, left = [_with_batch_axis(model, site, samples) for site in sites], {**wrong, **left}
    left = named_reasons(model, left)
    if not sites:
        raise ModelError(_no_sites(model, units, left, part))
    return Sites(sites, left, part.patterns if part else ())


def _runs(model: nn.Module, site: Site, ran: Collection[str]) -> bool:
    """Returns True if the forward calls all consumers of a site that are known, else False."""
    return all(layer_path(model, path) in ran for path in site.consumers if path)


def _with_needed(names: Sequence[str]) -> list[UnitKind]:
    """Returns the unit kinds of these names without repeats. The kinds that a kind needs come before it."""
    found: dict[str, UnitKind] = {}
    for name in names:
        kind = UNIT_KINDS[name]
        found |= {each.name: each for each in (*_with_needed(kind.needs), kind)}
    return list(found.values())


def _adapter_sites(model: nn.Module) -> dict[str, Site]:
    """Returns the sites of all modules that an adapter knows, by their names.

    Modules inside such a module are skipped. The model itself is skipped too, since its path is empty.
    """
    sites: dict[str, Site] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in sites)
        # A module that lost all its units was replaced by one of the class Adapter.removed. The adapter may serve this
        # class too.
        for adapter in ADAPTERS.values() if path and not inside and not isinstance(module, Removed) else ():
            site = adapter.site(path, module) if adapter.serves(module) else None
            if site is not None:
                sites[site.name] = site
                break
    return sites


def _inside(model: nn.Module, part: Part, sites: Iterable[Site], left: dict[str, str]) -> list[Site]:
    """Returns the sites whose tensors, layers and attributes all lie in a part of the model.

    If only some of them lie in the part, the site is left out, and the reason is added to the dict `left`. Consumers
    that are not known yet are ignored.
    """
    by_name, names = tensors(model), dict[int, list[str]]()
    for name, tensor in by_name.items():
        # A tied tensor has several names. A cut changes it at all these places.
        names.setdefault(id(tensor), []).append(name)
    found = []
    for site in sites:
        held = [name for cut in site.cuts for name in names[id(by_name[cut.tensor])]]
        paths = [*held, *(path for path in (*site.consumers, *site.norms, *site.attributes) if path)]
        outside = [path for path in paths if not part.holds(path)]
        inner = [path for path in paths if part.holds(path)]
        if not outside:
            found.append(site)
        elif inner:
            # A module with two paths may have its site at the other one. The name of a stream is not a path.
            ours = part.holds(site.name) or part_at(model, site.name) is None
            left[site.name if ours else inner[0].rpartition(".")[0]] = (
                f"a cut of its units would also change {outside[0]}, which is not inside {', '.join(part.patterns)}. "
                "Give more patterns with inside= if you want to prune it."
            )
    return found


def _with_batch_axis(model: nn.Module, site: Site, samples: Samples | None) -> Site:
    """Returns the site with `batch` set to the sample axis of its first consumer's input, or to -1 if it is unknown."""
    return replace(site, batch=samples.layers.get(layer_path(model, site.consumers[0]), -1) if samples else -1)


def _with_all_consumers(
    model: nn.Module, sites: Iterable[Site], example_inputs: Any, left: dict[str, str]
) -> list[Site]:
    """Returns the sites with all their consumers.

    An adapter that cannot know a consumer writes "" in its place. This function finds the consumer. If it cannot be
    found, the site is left out, and the reason is added to the dict `left`.
    """
    found = []
    for site in sites:
        try:
            found.append(with_consumers(model, site, example_inputs) if "" in site.consumers else site)
        except ModelError as reason:
            left[site.name] = str(reason)
        # The forward of the model runs here, and it may raise any error.
        except Exception as problem:
            left[site.name] = (
                "its consumers are unknown: the model's forward fails while we look for the layers that read its "
                f"output, with {error_text(problem)}. Check that the model runs on the example inputs, "
                "or write an adapter that names the consumers."
            )
    return found


def _with_all_tensors(model: nn.Module, sites: Iterable[Site], left: dict[str, str]) -> list[Site]:
    """Returns the sites whose tensors the model has. For the others, the reason is added to the dict `left`.

    An adapter knows the tensors of a class. But a parametrised layer computes its weight, and does not hold it.
    """
    why = {site.name: missing_tensors(model, [cut.tensor for cut in site.cuts]) for site in sites}
    left |= {name: reason for name, reason in why.items() if reason}
    return [site for site in sites if not why[site.name]]


def _in_model_order(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Sorts sites by the position of their first consumer among the modules of the model."""
    order = {path: place for place, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(sites, key=lambda site: order[layer_path(model, site.consumers[0])])


def _keep_one_unit_if_shared(model: nn.Module, site: Site, sites: Iterable[Site]) -> Site:
    """Returns the site with `module` set to "" if its module cannot be replaced, else unchanged.

    A module that loses all its units is replaced at one path only. If it has several paths, the old module would remain
    at the others. If another site cuts its tensors, this site would not find them any more. If `module` is "", a plan
    has to keep at least one unit.
    """
    if not site.module:
        return site
    module = model.get_submodule(site.module)
    places = sum(part is module for _, part in model.named_modules(remove_duplicate=False))
    others = (other for other in sites if other is not site and not unit_kind(other.kind).crosses)
    cut = any(cut.tensor.startswith(f"{site.module}.") for other in others for cut in other.cuts)
    return replace(site, module="") if places > 1 or cut else site


def _no_sites(model: nn.Module, units: Sequence[str], left: Mapping[str, str], part: Part | None) -> str:
    """Returns the error message for a model without sites. It has up to three different reasons."""
    reasons = [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {why.rstrip('.')}."
        for why, paths in Coverage(None, 0, left).reasons
    ]
    where = f" inside {', '.join(part.patterns)}" if part else ""
    first, *others = reasons or [
        "it computes no attention with several heads, and it has no hidden layer: "
        "features that one layer of a module produces and a linear layer or 1x1 convolution of the same module reads."
    ]
    also = "".join(f" Also left alone: {reason}" for reason in others[:2])
    return (
        f"{type(model).__name__} has no sites of units {', '.join(units)}{where}: {first}{also} "
        "docs/adapters.md says how to add an architecture."
    )


def _first_names(names: Sequence[str]) -> str:
    """Returns the first six names as one text, and how many more names there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
