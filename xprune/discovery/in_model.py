"""Proves all sites together, inside the model.

A site can be exact in its module and wrong in the model. A later module may use a second output of the attention,
another module may hold the same weight, the model may reshape to a fixed number of features. So units are removed at
all sites at once, and each output of the pruned model is compared with the gated dense model.

A wrong site must not pass by chance:

- The weights may hide a mistake. A projection or a layer scale that starts at zero lets nothing through. Biases and
  norms whose entries are all equal look right in any order. So the proof runs on a copy with noise on these tensors,
  see `with_noise`.
- About half of the units are removed, drawn at random. A wrong order of the units would have to map those that stay
  onto themselves. An odd number of units stays: a reversed order, or swapped neighbours, could leave an even number in
  place.
- If the gates of a site change nothing, the cut has to change nothing either. A cut of the wrong units would change
  something.

The comparison costs time, so it starts small. Where sites have many units, most units are first removed from both
models (`_thinned`). The rest is a model with the same forward at a fraction of the cost, and one sample is enough. Only
if this comparison fails is the whole model compared.

Two mistakes may still pass: a site whose units have no effect on the example inputs, and a forward that treats few
units in another way than many. `apply` therefore proves each plan again, on the model as it is.
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
from xprune.modules.samples import Samples
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

FEW_FEATURES, FEW_UNITS = 64, 4
"""How much of a large site stays in a thinned model: at least so many features, and at least so many units.

At least one unit in sixteen stays, too.
"""


def proved(
    model: nn.Module, sites: Sequence[Site], example_inputs: Any, samples: Samples | None
) -> tuple[list[Site], dict[str, str]]:
    """Proves all sites at once. If that fails, finds the sites that are wrong.

    Args:
        model: The model. It is not changed.
        sites: The proposed sites.
        example_inputs: What the model is called with.
        samples: Where the samples of the inputs lie. If the model runs on one sample, one is enough. None if it is not
            known.

    Returns:
        The sites that are exact together, in the order given, and the reason for each other site, by its name.

    Raises:
        ModelError: The model does not equal itself: its outputs are not finite, or differ from call to call.
    """
    unshared, left = _without_conflicts(model, sites)
    if not unshared:
        return [], left
    one = samples.take(example_inputs, [0]) if samples and samples.count > 1 else example_inputs
    thin = _thinned(model, unshared)
    if thin is not None and _Prover(thin[0], one).why_wrong(thin[1], own=True) is None:
        return unshared, left
    # The small comparison failed. The reason may be the model: some do not run on one sample, or on few units.
    prover = _Prover(with_noise(model), example_inputs)
    if prover.why_wrong(unshared) is None:
        return unshared, left
    if prover.why_not_itself(unshared) is not None:
        # With noise, the model does not even equal itself. So the noise is at fault, and the proof runs without it.
        prover = _Prover(model, example_inputs)
        if prover.why_wrong(unshared) is None:
            return unshared, left
        why = prover.why_not_itself(unshared)
        if why is not None:
            raise ModelError(
                f"{type(model).__name__} cannot be compared with itself, with every unit kept: {why.rstrip('.')}. A "
                "proof needs a forward with finite outputs, the same at each call in eval mode."
            )
    # At least one site is wrong. Sites that are likely to be right or wrong together are tried together.
    good: list[Site] = []
    for _, similar in groupby(sorted(unshared, key=_similarity), key=_similarity):
        good = prover.with_exact(good, list(similar), left)
    names = {site.name for site in good}
    return [site for site in unshared if site.name in names], left


class _Prover:
    """Compares a model without some units with the same model behind gates."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs

    def why_wrong(self, sites: Sequence[Site], own: bool = False) -> str | None:
        """Returns why these sites are not exact together, or None if they are.

        Args:
            sites: The sites.
            own: True if nobody uses the model afterwards. The comparison then makes fewer copies.
        """
        plan = _half_plan(sites)
        try:
            pruned = remove_units(shared_copy(self.model), plan, ADAPTERS)
        except XPruneError as refused:
            return str(refused)
        except Exception as problem:  # A tensor of the site has another form than the site says.
            return f"the cut of its tensors fails with {type(problem).__name__}: {problem}"
        return exactness.problem(self.model, pruned, plan, self.inputs, own=own)

    def why_not_itself(self, sites: Sequence[Site]) -> str | None:
        """Returns why the model with all its units differs from itself behind gates of 1, or None if it does not."""
        return exactness.problem(self.model, shared_copy(self.model), Plan.full(sites), self.inputs)

    def with_exact(self, good: list[Site], more: list[Site], left: dict[str, str]) -> list[Site]:
        """Adds to `good` those of `more` that are exact together with it.

        If all of them together fail, each half is tried. This takes few comparisons when few sites are wrong.

        Args:
            good: Sites that are exact together.
            more: Sites to try.
            left: Gets the reason for each site that fails.

        Returns:
            A new list, or `good` itself if none can be added.
        """
        why = self.why_wrong([*good, *more])
        if why is None:
            return [*good, *more]
        if len(more) == 1:
            left[more[0].name] = (
                f"{_note_on_ties(self.model, more[0])}we removed some of its units inside the model, and "
                f"{why.rstrip('.')}. Some other part of the model may depend on the number or order of these units. An "
                "adapter may help, see docs/adapters.md."
            )
            return good
        half = len(more) // 2
        return self.with_exact(self.with_exact(good, more[:half], left), more[half:], left)


def _half_plan(sites: Sequence[Site]) -> Plan:
    """Returns a plan that keeps about half of the units of each site, an odd number, drawn at random."""
    # `size // 2 | 1` is the next odd number. A site of two units keeps one, a site of one unit keeps it.
    return _random_plan(sites, [max(1, min(site.size // 2 | 1, site.size - 1)) for site in sites])


def _random_plan(sites: Sequence[Site], counts: Sequence[int]) -> Plan:
    """Returns a plan that keeps so many units of each site, drawn at random with a fixed seed."""
    chance = torch.Generator().manual_seed(0)
    orders = [torch.randperm(site.size, generator=chance).tolist() for site in sites]
    return Plan(tuple(sites), tuple(tuple(sorted(order[:n])) for order, n in zip(orders, counts, strict=True)))


def _thinned(model: nn.Module, sites: Sequence[Site]) -> tuple[nn.Module, list[Site]] | None:
    """Removes most units of large sites from a noisy copy of the model.

    Sites whose module changes its class when it is pruned or gated keep all units. The original class has to be
    compared with the new one, too, and a thinned model no longer has it.

    Returns:
        The copy and the sites of the copy. None if the cut fails.
    """
    # Only the adapters of these sites are asked for their classes, because that imports the library of each.
    adapters = {site.adapter for site in sites} & set(ADAPTERS)
    changes = {name for name in adapters if ADAPTERS[name].pruned or ADAPTERS[name].gated}
    # -(-a // b) rounds a / b up: enough units to hold FEW_FEATURES features.
    enough = [max(FEW_UNITS, -(-FEW_FEATURES // site.width), site.size // 16) for site in sites]
    counts = [s.size if s.adapter in changes else min(s.size, few) for s, few in zip(sites, enough, strict=True)]
    try:
        thin = remove_units(with_noise(model), _random_plan(sites, counts), ADAPTERS)
    except Exception:  # A wrong site. The comparison of the whole model finds it and has the reason.
        return None
    return thin, [replace(site, size=count) for site, count in zip(sites, counts, strict=True)]


def _similarity(site: Site) -> tuple[Any, ...]:
    """Returns a key that is equal for sites whose modules are likely to be of one class."""
    cuts = tuple((cut.tensor.removeprefix(site.owner), cut.axis, cut.groups, cut.width) for cut in site.cuts)
    return unit_kind(site.kind).order, site.kind, site.adapter, len(site.cuts), str(cuts)


def _without_conflicts(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], dict[str, str]]:
    """Splits off sites that cut the same tensor along the same axis as another site.

    After the first of two such cuts, the indices of the second one are wrong.

    Returns:
        The other sites, and the reason for each site that is split off, by its name.
    """
    by_name = tensors(model)
    # Tensors are compared by identity: a tied tensor has several names.
    sites_of: dict[tuple[int, int], dict[str, None]] = {}
    for site in sites:
        for cut in site.cuts:
            sites_of.setdefault((id(by_name[cut.tensor]), cut.axis), {})[site.name] = None
    left: dict[str, str] = {}
    for site in sites:
        for cut in site.cuts:
            for other in sites_of[id(by_name[cut.tensor]), cut.axis]:
                if other != site.name:
                    left[site.name] = (
                        f"it shares the tensor {cut.tensor} with {other}, so a cut for one of them would spoil the "
                        "other. Give each module a separate tensor if you want to prune them."
                    )
    return [site for site in sites if site.name not in left], left


def _note_on_ties(model: nn.Module, site: Site) -> str:
    """Returns a sentence about a tensor of the site that another layer holds, too, or "" if there is none."""
    by_name = tensors(model)
    for cut in site.cuts:
        layer = model.get_submodule(cut.tensor.rpartition(".")[0])
        for name, tensor in by_name.items():
            if tensor is by_name[cut.tensor] and model.get_submodule(name.rpartition(".")[0]) is not layer:
                return f"{cut.tensor} is tied to {name}. "
    return ""
