"""Chooses for each site a multiple of features that the kernels of a device like (`Budget(round_to="auto")`)."""

from dataclasses import replace

import torch
from torch import nn

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.target import Target
from xprune.core.unit_kind import unit_kind
from xprune.modules.copies import reference_device

LARGEST = 64
"""The largest multiple of features on an accelerator. Tiles of matrix products are multiples of 64 features or less."""

LEAST = 8
"""The smallest multiple of features on an accelerator. Tensor cores need multiples of 8 half-precision numbers."""

COSTS = 0.01
"""A multiple is small enough if one step of a site costs at most this fraction of the allowed cost."""

CHOICES = 4
"""A site has to have at least this many numbers of units to choose from. Otherwise its multiple is reduced."""


def rounded(budget: Budget, costs: Costs, model: nn.Module) -> Budget:
    """Returns the same budget with a multiple for each site in place of round_to="auto".

    On a CPU, every width is as good as the next one (`docs/results/widths-cpu.json`), so the multiple is 1. On an
    accelerator, products whose sizes are no multiples of 8 leave the fast kernels, and sizes that fill whole tiles are
    faster still: a multiple is at most 64 and at least 8, as large as the two rules `COSTS` and `CHOICES` allow.

    Args:
        budget: The budget.
        costs: The costs of the sites. The first resource that the budget limits says what a step costs.
        model: The dense model. Its device counts if the budget has no target.

    Returns:
        The budget, in which `round_to` holds pairs (name of a site, multiple). If `round_to` is not "auto", the budget
        as it is.
    """
    if budget.round_to != "auto":
        return budget
    kind = _device_kind(budget, model)
    if kind == "cpu":
        return replace(budget, round_to=1)
    name = budget.limited[0]
    cost, full = costs.of(name), [site.size for site in costs.sites]
    each = cost.linear(full).units(full)
    allowed = costs.share(budget, name) * cost.total(full)
    multiples = []
    for site, unit in zip(costs.sites, each, strict=True):
        multiple = LARGEST
        # Features of heads lie in whole heads, so only neurons and channels have steps of many units.
        while multiple > LEAST and not _is_small(multiple, site.size, site.width, unit, allowed):
            multiple //= 2
        # A small site keeps its freedom: a multiple that leaves fewer choices is not used at all.
        while multiple > 1 and site.size * site.width < CHOICES * multiple and not unit_kind(site.kind).crosses:
            multiple //= 2
        multiples.append((site.name, multiple))
    return replace(budget, round_to=tuple(multiples))


def _is_small(multiple: int, size: int, width: int, unit: float, allowed: float) -> bool:
    """Returns True if a multiple of features leaves a site enough choices, and a step costs little.

    Args:
        multiple: The multiple of features.
        size: The number of units of the site.
        width: The number of features of a unit.
        unit: The cost of one unit.
        allowed: The cost that the budget allows.
    """
    units = -(-multiple // width)
    return size >= CHOICES * units and units * unit <= max(COSTS * allowed, unit)


def _device_kind(budget: Budget, model: nn.Module) -> str:
    """Returns the kind of the device that the pruned model is meant for, such as "cpu" or "cuda"."""
    target = budget.target if isinstance(budget.target, Target) else Target()
    if target.table is not None:
        from xprune.core.latency_table import LatencyTable

        target = LatencyTable.read(target.table).target
    return reference_device(model).type if target.device is None else torch.device(target.device).type
