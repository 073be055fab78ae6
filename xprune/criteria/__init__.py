"""What decides which units go: each criterion scores units. `CRITERIA` is the table.

May import: costs, surgery, training and all below them. To add one: a file, and a line in the table. Another package
uses the entry-point group `xprune.criteria`. `docs/own-criterion.md` shows an example.
"""

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
