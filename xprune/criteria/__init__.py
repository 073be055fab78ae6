"""What decides which units go: each criterion scores units. `CRITERIA` is the table.

May import: costs, surgery, training and all below them. To add one: a file, and a line in the table. Another package
uses the entry-point group `xprune.criteria`. `docs/own-criterion.md` shows an example.
"""

from collections.abc import Mapping

from xprune.core.interfaces import Criterion
from xprune.core.registry import Later, table
from xprune.criteria.magnitude import Magnitude
from xprune.criteria.random import Random
from xprune.criteria.taylor import Taylor
from xprune.criteria.xpruner.criterion import XPruner

# Imported when it is looked up: Captum imports matplotlib.
INTEGRATED_GRADIENTS = Later("captum:IntegratedGradients", "xprune.criteria.captum.methods:IntegratedGradients")

CRITERIA: Mapping[str, type[Criterion]] = table(
    "criteria", (Random, Magnitude, Taylor, INTEGRATED_GRADIENTS, XPruner), Criterion, classes=True
)
"""Criterion class by name."""
