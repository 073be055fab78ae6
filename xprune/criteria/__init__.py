"""Criteria. A criterion computes a score for each unit, and units with higher scores stay. `CRITERIA` lists them all.

To add a criterion to xprune, write a file here and add its class to `CRITERIA`. These files may import `costs`,
`surgery`, `training` and the packages that those may import. Another package adds criteria with the entry-point group
`xprune.criteria`. `docs/own-criterion.md` shows an example.
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
"""The class of each criterion by its name. Criteria of other packages are included."""
