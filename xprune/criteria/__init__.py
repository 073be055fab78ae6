"""Criteria: each computes a score for every unit. Units with higher scores stay. `CRITERIA` is the table of all.

May import: costs, surgery, training and all below them. To add a criterion, write a file and add a line to the table.
Another package adds criteria with the entry-point group `xprune.criteria`. `docs/own-criterion.md` shows an example.
"""

from collections.abc import Mapping

from xprune.core.interfaces import Criterion
from xprune.core.registry import Later, table
from xprune.criteria.magnitude import Magnitude
from xprune.criteria.random import Random
from xprune.criteria.taylor import Taylor
from xprune.criteria.xpruner.criterion import XPruner

# It is imported when it is looked up, because Captum imports matplotlib.
INTEGRATED_GRADIENTS = Later("captum:IntegratedGradients", "xprune.criteria.captum.methods:IntegratedGradients")

CRITERIA: Mapping[str, type[Criterion]] = table(
    "criteria", (Random, Magnitude, Taylor, INTEGRATED_GRADIENTS, XPruner), Criterion, classes=True
)
"""Name of a criterion -> its class. Criteria that other packages add are in it too."""
