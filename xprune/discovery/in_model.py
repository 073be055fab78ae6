"""Proves all sites of a model together.

A site can be exact in its module and wrong in the model. For example, a later module may use a second output of the
attention, another module may use the same weight, or the model may reshape to a fixed number of features. So units are
removed at all sites at once, and each output of the pruned model is compared with the gated dense model.

A wrong site must not pass by accident:

- The weights may hide a mistake. If a projection or a layer scale is zero, no unit before it has an effect. If all
  entries of a bias or a norm layer are equal, any order of them looks right. So the proof runs on a copy with noise on
  these tensors, see `with_noise`.
- About half of the units are removed, chosen at random. If the site has a wrong order of the units, the kept units
  would have to be the same in both orders to pass. An odd number of units is kept, since an even number could stay the
  same if the order is reversed or if neighbours are swapped.
- If the gates of a site change nothing, the cut must change nothing either. A cut of the wrong units would change
  something.

The comparison takes time, so a small one comes first. If sites have many units, most units are first removed from both
models (`_thinned`). The model that remains has the same forward at a fraction of the cost. One sample is enough for it.
Only if this comparison fails, the whole model is compared.

Two mistakes may still pass: a site whose units have no effect on the example inputs, and a forward that treats a small
number of units in another way than a large number. So `apply` proves each plan again, on the model as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.core.unit_kind import unit_kind
from xprune.errors import ModelError, XPruneError
from xprune.modules.copies import shared_copy, tensors, with_noise
from xprune.modules.forward import error_text
from xprune.modules.samples import Samples
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

FEW_FEATURES, FEW_UNITS = 64, 4
"""A thinned model keeps at least FEW_FEATURES features and at least FEW_UNITS units of each large site.

It also keeps at least one unit in sixteen.
"""


def proved(
    model: nn.Module, sites: Sequence[Site], example_inputs: Any, samples: Samples | None
) -> tuple[list[Site], dict[str, str]]:
    """Proves all sites at once. If this fails, finds the sites that are wrong.

    Args:
        model: The model. It is not changed.
        sites: The proposed sites.
        example_inputs: The inputs that the model is called with.
        samples: Where the samples of the inputs lie. The small comparison then uses one sample. If None, it uses all
            inputs.

    Returns:
        (sites, reasons): the sites that are exact together, in the given order, and a dict with the reason for each
        other site by its name.

    Raises:
        ModelError: No proof is possible, because the outputs of the model are not finite, or differ from call to call.
    """
    unshared, left = _without_conflicts(model, sites)
    if not unshared:
        return [], left
    one = samples.take(example_inputs, [0]) if samples and samples.count > 1 else example_inputs
    thin = _thinned(model, unshared)
    if thin is not None and _Prover(thin[0], one).why_wrong(thin[1], own=True) is None:
        return unshared, left
    # The small comparison failed. The sites may still be right: some models do not run with one sample, or with few
    # units.
    prover = _Prover(with_noise(model), example_inputs)
    if prover.why_wrong(unshared) is None:
        return unshared, left
    if prover.why_not_itself(unshared) is not None:
        # With noise, the model does not even equal itself with all gates at 1. So the noise is the reason, and the
        # proof runs without noise.
        prover = _Prover(model, example_inputs)
        if prover.why_wrong(unshared) is None:
            return unshared, left
        why = prover.why_not_itself(unshared)
        if why is not None:
            raise ModelError(
                f"{type(model).__name__} cannot be compared with itself, with every unit kept: {why.rstrip('.')}. A "
                "proof needs a forward with finite outputs that are the same at each call in eval mode."
            )
    # At least one site is wrong. Similar sites are likely to be all right or all wrong, so they are tested together.
    good: list[Site] = []
    for _, similar in groupby(sorted(unshared, key=_similarity), key=_similarity):
        good = prover.with_exact(good, list(similar), left)
    names = {site.name for site in good}
    return [site for site in unshared if site.name in names], left


class _Prover:
    """Removes units from a model, and compares it with the same model with gates of 0 on these units.

    Args:
        model: The model. It is not changed.
        inputs: The inputs that the model is called with.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs

    def why_wrong(self, sites: Sequence[Site], own: bool = False) -> str | None:
        """Returns the reason why these sites are not exact together, or None if they are.

        Args:
            sites: The sites.
            own: True if the model is not used afterwards. The comparison then makes fewer copies.
        """
        plan = _half_plan(sites)
        try:
            pruned = remove_units(shared_copy(self.model), plan, ADAPTERS)
        except XPruneError as refused:
            return str(refused)
        # A tensor of a site has another form than the site says.
        except Exception as problem:
            return f"the cut of its tensors fails with {error_text(problem)}"
        return exactness.problem(self.model, pruned, plan, self.inputs, own=own)

    def why_not_itself(self, sites: Sequence[Site]) -> str | None:
        """Returns the reason why the model with all units differs from itself with gates of 1, or None."""
        return exactness.problem(self.model, shared_copy(self.model), Plan.full(sites), self.inputs)

    def with_exact(self, good: list[Site], more: list[Site], left: dict[str, str]) -> list[Site]:
        """Adds to `good` those sites of `more` that are exact together with `good`.

        If `good` and all of `more` are not exact together, each half of `more` is tried. This takes few comparisons if
        few sites are wrong.

        Args:
            good: Sites that are exact together.
            more: Sites to try.
            left: A dict to which the reason for each failed site is added, by the name of the site.

        Returns:
            A new list, or `good` itself if no site can be added.
        """
        why = self.why_wrong([*good, *more])
        if why is None:
            return [*good, *more]
        if len(more) == 1:
            left[more[0].name] = (
                f"{_note_on_ties(self.model, more[0])}xprune removed some of its units inside the model, and "
                f"{why.rstrip('.')}. Some other part of the model may depend on the number or order of these units. An "
                "adapter may help, see docs/adapters.md."
            )
            return good
        half = len(more) // 2
        return self.with_exact(self.with_exact(good, more[:half], left), more[half:], left)


def _half_plan(sites: Sequence[Site]) -> Plan:
    """Returns a plan that keeps about half of the units of each site, an odd number, chosen at random."""
    # `size // 2 | 1` is half of the units, or one more if that is even. A site of one or two units keeps one unit.
    return _random_plan(sites, [max(1, min(site.size // 2 | 1, site.size - 1)) for site in sites])


def _random_plan(sites: Sequence[Site], counts: Sequence[int]) -> Plan:
    """Returns a plan that keeps these numbers of units. The units are chosen at random, with a fixed seed."""
    chance = torch.Generator().manual_seed(0)
    orders = [torch.randperm(site.size, generator=chance).tolist() for site in sites]
    return Plan(tuple(sites), tuple(tuple(sorted(order[:n])) for order, n in zip(orders, counts, strict=True)))


def _thinned(model: nn.Module, sites: Sequence[Site]) -> tuple[nn.Module, list[Site]] | None:
    """Removes most units of large sites from a noisy copy of the model, so that the first comparison takes little time.

    Some modules change their class when they are pruned or gated. Their sites keep all units. The reason: the proof has
    to compare the original class with the new one, and a thinned module would already have the new class.

    Returns:
        (the copy, the sites of the copy), or None if units cannot be cut out.
    """
    # Only the adapters of these sites are used, because reading the classes of an adapter imports its library.
    adapters = {site.adapter for site in sites} & set(ADAPTERS)
    changes = {name for name in adapters if ADAPTERS[name].pruned or ADAPTERS[name].gated}
    # -(-a // b) rounds a / b up: enough units to hold FEW_FEATURES features.
    enough = [max(FEW_UNITS, -(-FEW_FEATURES // site.width), site.size // 16) for site in sites]
    counts = [s.size if s.adapter in changes else min(s.size, few) for s, few in zip(sites, enough, strict=True)]
    try:
        thin = remove_units(with_noise(model), _random_plan(sites, counts), ADAPTERS)
    # A site is wrong. The comparison of the whole model will find it, together with the reason.
    except Exception:
        return None
    return thin, [replace(site, size=count) for site, count in zip(sites, counts, strict=True)]


def _similarity(site: Site) -> tuple[Any, ...]:
    """Returns a key that is equal for sites whose modules are likely to have the same class."""
    cuts = tuple((cut.tensor.removeprefix(site.owner), cut.axis, cut.groups, cut.width) for cut in site.cuts)
    return unit_kind(site.kind).order, site.kind, site.adapter, len(site.cuts), str(cuts)


def _without_conflicts(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], dict[str, str]]:
    """Joins sites that share a tensor, and leaves out those that cannot be joined.

    If two sites cut the same tensor along the same axis, the indices of the second cut would be wrong after the first
    one. Two modules with tied weights lose the same units, so their sites become one site.

    Returns:
        (sites, reasons): the sites without conflicts, and a dict with the reason for each site that is left out, by its
        name.
    """
    by_name = tensors(model)
    # Tensors are compared by identity: a tied tensor has several names.
    joined: list[Site] = []
    left: dict[str, str] = {}
    for site in sites:
        mine = {(id(by_name[cut.tensor]), cut.axis): cut for cut in site.cuts}
        for place, other in enumerate(joined):
            theirs = {(id(by_name[cut.tensor]), cut.axis): cut for cut in other.cuts}
            shared = mine.keys() & theirs.keys()
            if not shared:
                continue
            same = all(mine[key].parts == theirs[key].parts for key in shared)
            if not same or (site.size, site.width, site.kind) != (other.size, other.width, other.kind):
                tensor = mine[next(iter(shared))].tensor
                left[site.name] = (
                    f"it shares the tensor {tensor} with {other.name}, which uses it in another way. So a cut for one "
                    "of them would spoil the other. Give each module a separate tensor if you want to prune them."
                )
            else:
                joined[place] = replace(
                    other,
                    # A module that lost all its units would be replaced in one place only.
                    module="",
                    consumers=(*other.consumers, *site.consumers),
                    axes=(*other.axes, *site.axes),
                    cuts=(*other.cuts, *(cut for key, cut in mine.items() if key not in theirs)),
                    norms=tuple(dict.fromkeys((*other.norms, *site.norms))),
                    attributes=tuple(dict.fromkeys((*other.attributes, *site.attributes))),
                )
            break
        else:
            joined.append(site)
    return joined, left


def _note_on_ties(model: nn.Module, site: Site) -> str:
    """Returns a sentence about a tensor of the site that another layer holds too, or "" if there is no such tensor."""
    by_name = tensors(model)
    for cut in site.cuts:
        layer = model.get_submodule(cut.tensor.rpartition(".")[0])
        for name, tensor in by_name.items():
            if tensor is by_name[cut.tensor] and model.get_submodule(name.rpartition(".")[0]) is not layer:
                return f"{cut.tensor} is tied to {name}. "
    return ""
