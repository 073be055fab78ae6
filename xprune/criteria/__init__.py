"""Criteria. A criterion computes a score for each unit, and units with higher scores stay. `CRITERIA` lists them all.

To add a criterion to xprune, write a file here and add its class to `CRITERIA`. These files may import `costs`,
`surgery`, `training` and the packages that those may import. Another package adds criteria with the entry-point group
`xprune.criteria`. `docs/own-criterion.md` shows an example.
"""

from collections.abc import Mapping

from xprune.core.interfaces import Criterion
from xprune.core.registry import Later, table
from xprune.criteria.magnitude import Magnitude
from xprune.criteria.random import Random
from xprune.criteria.taylor import Taylor
from xprune.criteria.xpruner.criterion import XPruner

# This criterion is imported only when a user asks for it, because Captum imports matplotlib, which takes long.
INTEGRATED_GRADIENTS = Later("captum:IntegratedGradients", "xprune.criteria.captum.methods:IntegratedGradients")

CRITERIA: Mapping[str, type[Criterion]] = table(
    "criteria", (Random, Magnitude, Taylor, INTEGRATED_GRADIENTS, XPruner), Criterion, classes=True
)
"""The class of each criterion by its name. Criteria of other packages are included."""
