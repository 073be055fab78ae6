"""Selections: each turns scores into a plan that meets the budget. `SELECTIONS` is the table of all.

May import: costs, surgery, training and all below them. To add a selection, write a file and add a line to the table.
Another package adds selections with the entry-point group `xprune.selections`.
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
"""Name of a selection -> its class. Selections that other packages add are in it too."""
