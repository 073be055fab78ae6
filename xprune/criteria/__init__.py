"""Criteria: each computes a score for every unit. Units with higher scores stay. `CRITERIA` is the table of all.

May import: costs, surgery, training and all below them. To add a criterion, write a file and add a line to the table.
Another package adds criteria with the entry-point group `xprune.criteria`. `docs/own-criterion.md` shows an example.
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
"""Name of a criterion -> its class. Criteria that other packages add are in it too."""
