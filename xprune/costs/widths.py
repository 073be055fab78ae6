"""Chooses for each site a multiple of features that the kernels of a device like (`Budget(round_to="auto")`)."""

import math
from dataclasses import replace

import torch
from torch import nn

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.latency_table import LatencyTable
from xprune.core.site import Site
from xprune.core.target import Target
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
        The budget, in which `round_to` holds pairs (name of a site, multiple). A site without a pair has the multiple
        1. If `round_to` is not "auto", the budget as it is.
    """
    if budget.round_to != "auto":
        return budget
    kind = _device_kind(budget, model)
    if kind == "cpu":
        return replace(budget, round_to=())
    name = budget.limited[0]
    cost, full = costs.of(name), [site.size for site in costs.sites]
    each = cost.linear(full).units(full)
    allowed = costs.share(budget, name) * cost.total(full)
    multiples = []
    for site, unit in zip(costs.sites, each, strict=True):
        multiple = LARGEST
        while multiple > 1 and not _is_small(multiple, site, unit, allowed):
            multiple //= 2
        multiples.append((site.name, multiple))
    return replace(budget, round_to=tuple(multiples))


def _is_small(multiple: int, site: Site, unit: float, allowed: float) -> bool:
    """Returns True if a multiple of features leaves a site enough choices, and a step costs little.

    Args:
        multiple: The multiple of features.
        site: The site.
        unit: The cost of one unit.
        allowed: The cost that the budget allows.
    """
    # The smallest number of units whose features are a multiple.
    step = multiple // math.gcd(multiple, site.width)
    if step == 1:
        return True
    # `LEAST` is worth more than a small step: without it, products leave the fast kernels.
    return site.size >= CHOICES * step and (multiple <= LEAST or step * unit <= COSTS * allowed)


def _device_kind(budget: Budget, model: nn.Module) -> str:
    """Returns the kind of the device that the pruned model is meant for, such as "cpu" or "cuda"."""
    target = budget.target if isinstance(budget.target, Target) else Target()
    if target.table is not None:
        target = LatencyTable.read(target.table).target
    return reference_device(model).type if target.device is None else torch.device(target.device).type
