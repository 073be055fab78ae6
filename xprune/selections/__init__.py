"""Selections. A selection turns scores into a plan that meets the budget. `SELECTIONS` lists them all.

To add a selection to xprune, write a file here and add its class to `SELECTIONS`. These files may import `costs`,
`surgery`, `training` and the packages that those may import. Another package adds selections with the entry-point group
`xprune.selections`.
"""

from collections.abc import Mapping

from xprune.core.interfaces import Selection
from xprune.core.registry import table
from xprune.selections.global_threshold import Global
from xprune.selections.learned.selection import LearnedThresholds
from xprune.selections.uniform import Uniform

SELECTIONS: Mapping[str, type[Selection]] = table(
    "selections", (Uniform, Global, LearnedThresholds), Selection, classes=True
)
"""The class of each selection by its name. Selections of other packages are included."""
