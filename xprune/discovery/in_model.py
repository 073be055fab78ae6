"""The proof of all sites at once, inside the model: what is true of a module alone may be wrong where it stands.

A site can be exact by itself and wrong in the model: a second output that a later module takes, a tensor that another
module holds too, a reshape to a fixed width outside of it. So units of all sites go at once, and the pruned model has
to give what the gated one gives, in every output.

Why a wrong site does not pass by chance:

- Weights as given may hide it. A projection or a layer scale that starts at zero lets nothing through, and biases and
  norms that are all alike look right in any order. So the proof runs on a copy with noise on these (`stirred`).
- About half of the units go, drawn at random: a wrong order would have to map those that stay onto themselves. An odd
  number stays: to turn the order of an even number around, or to swap neighbours, leaves no odd number in place.
- Where the gates of a site change nothing, the cut has to change nothing either. A cut of other units would.

Where sites have many units, most of these go from both sides first (`_thinned`). What is left is a model of the same
forward that costs a fraction, and the same comparison is made on it. Where that fails, the whole model is looked at.

What may still pass is a site whose units count for nothing on the example inputs, and a forward that goes another way
for few units than for many. `apply` proves each plan again, on the model as it is.
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
from xprune.modules.copies import alias, stirred, tensors
from xprune.modules.samples import Samples
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

FEW, LEAST = 64, 4
"""Features, and units, that are looked at of sites that have many; one unit in sixteen, where that is more."""


def proved(
    model: nn.Module, sites: Sequence[Site], example_inputs: Any, samples: Samples | None
) -> tuple[list[Site], dict[str, str]]:
    """Proves all sites at once, and finds the culprits where that fails.

    Args:
        model: The model. It is not changed.
        sites: The sites proposed.
        example_inputs: What the model is called with.
        samples: Where its samples lie: one of them is enough where the model runs on one. None: not known.

    Returns:
        The sites that are exact together, in the order given, and for each other site the reason, by its name.

    Raises:
        ModelError: Where the model does not equal itself: its outputs are not finite, or differ from call to call.
    """
    held, left = _without_conflicts(model, sites)
    if not held:
        return [], left
    one = samples.take(example_inputs, [0]) if samples and samples.count > 1 else example_inputs
    thin = _thinned(model, held)
    if thin is not None and _Prover(thin[0], one).why(thin[1], own=True) is None:
        return held, left
    prover = _Prover(stirred(model), example_inputs)
    if prover.why(held) is None:
        return held, left  # it does not run on one sample alone, or on few units
    if prover.why_not_itself(held) is not None:
        prover = _Prover(model, example_inputs)  # the noise is at fault: with it the model does not equal itself
        if prover.why(held) is None:
            return held, left
        why = prover.why_not_itself(held)
        if why is not None:
            raise ModelError(f"{type(model).__name__} cannot be compared with itself, with every unit kept: {why}.")
    good: list[Site] = []
    for _, alike in groupby(sorted(held, key=_likeness), key=_likeness):
        good = prover.grown(good, list(alike), left)
    names = {site.name for site in good}
    return [site for site in held if site.name in names], left


class _Prover:
    """Compares the model without units with the model behind gates."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs

    def why(self, sites: Sequence[Site], own: bool = False) -> str | None:
        """Why these sites are not exact together; None where they are. `own`: the model is not looked at again."""
        plan = _plan(sites)
        try:
            pruned = remove_units(alias(self.model), plan, ADAPTERS)
        except XPruneError as refused:
            return str(refused)
        except Exception as problem:  # a tensor that is not what the site takes it for
            return f"its units cannot be cut out: {type(problem).__name__}: {problem}"
        return exactness.problem(self.model, pruned, plan, self.inputs, own=own)

    def why_not_itself(self, sites: Sequence[Site]) -> str | None:
        """Why the model is not equal to itself, with every unit kept; None where it is."""
        return exactness.problem(self.model, alias(self.model), Plan.full(sites), self.inputs)

    def grown(self, good: list[Site], more: list[Site], left: dict[str, str]) -> list[Site]:
        """`good` with those of `more` that are exact together with it. The others go into `left`, by halves."""
        why = self.why([*good, *more])
        if why is None:
            return [*good, *more]
        if len(more) == 1:
            left[more[0].name] = f"{_tied(self.model, more[0])}Without some of its units, {why}"
            return good
        half = len(more) // 2
        return self.grown(self.grown(good, more[:half], left), more[half:], left)


def _plan(sites: Sequence[Site]) -> Plan:
    """About half of the units of each site, an odd number of them, drawn at random."""
    return _drawn(sites, [max(1, min(site.size // 2 | 1, site.size - 1)) for site in sites])


def _drawn(sites: Sequence[Site], counts: Sequence[int]) -> Plan:
    """So many units of each site, drawn at random."""
    chance = torch.Generator().manual_seed(0)
    orders = [torch.randperm(site.size, generator=chance).tolist() for site in sites]
    return Plan(tuple(sites), tuple(tuple(sorted(order[:n])) for order, n in zip(orders, counts, strict=True)))


def _thinned(model: nn.Module, sites: Sequence[Site]) -> tuple[nn.Module, list[Site]] | None:
    """(the stirred model with few units at each site that has many, the sites as they then are); None where that fails.

    A site of a class that changes once units have gone is left whole: the class before has to be looked at too.
    """
    # Only the adapters of these sites are asked for their classes, which imports the library of each.
    adapters = {site.adapter for site in sites} & set(ADAPTERS)
    changes = {name for name in adapters if ADAPTERS[name].pruned or ADAPTERS[name].gated}
    enough = [max(LEAST, -(-FEW // site.width), site.size // 16) for site in sites]
    counts = [s.size if s.adapter in changes else min(s.size, few) for s, few in zip(sites, enough, strict=True)]
    try:
        thin = remove_units(stirred(model), _drawn(sites, counts), ADAPTERS)
    except Exception:  # a site that is wrong, which the whole model will tell
        return None
    return thin, [replace(site, size=count) for site, count in zip(sites, counts, strict=True)]


def _likeness(site: Site) -> tuple[Any, ...]:
    """The same for modules that are likely to be of one class, so that they are tried together."""
    cuts = tuple((cut.tensor.removeprefix(site.owner), cut.axis, cut.groups, cut.width) for cut in site.cuts)
    return unit_kind(site.kind).order, site.kind, site.adapter, len(site.cuts), str(cuts)


def _without_conflicts(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], dict[str, str]]:
    """(sites that cut no tensor along the same axis as another, why not for the others by name).

    Each of two such sites would spoil the other's indices.
    """
    held = tensors(model)
    takers: dict[tuple[int, int], dict[str, None]] = {}
    for site in sites:
        for cut in site.cuts:
            takers.setdefault((id(held[cut.tensor]), cut.axis), {})[site.name] = None
    left: dict[str, str] = {}
    for site in sites:
        for cut in site.cuts:
            for other in takers[id(held[cut.tensor]), cut.axis]:
                if other != site.name:
                    left[site.name] = f"it shares the tensor {cut.tensor} with {other}, so that neither can lose units"
    return [site for site in sites if site.name not in left], left


def _tied(model: nn.Module, site: Site) -> str:
    """A sentence about a tensor of the site that another layer holds too; "" where there is none."""
    held = tensors(model)
    for cut in site.cuts:
        layer = model.get_submodule(cut.tensor.rpartition(".")[0])
        for name, tensor in held.items():
            if tensor is held[cut.tensor] and model.get_submodule(name.rpartition(".")[0]) is not layer:
                return f"{cut.tensor} is tied to {name}. "
    return ""
