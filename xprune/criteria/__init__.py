"""The table of criteria: what decides which units go. One file each; entry points add more."""

from collections.abc import Mapping

from xprune.core.interfaces import Criterion
from xprune.core.registry import table
from xprune.criteria.captum.methods import IntegratedGradients
from xprune.criteria.magnitude import Magnitude
from xprune.criteria.random import Random
from xprune.criteria.taylor import Taylor
from xprune.criteria.xpruner.criterion import XPruner

CRITERIA: Mapping[str, type[Criterion]] = table(
    "criteria", (Random, Magnitude, Taylor, IntegratedGradients, XPruner), Criterion, classes=True
)
"""Criterion class by name."""
