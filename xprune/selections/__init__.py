"""How scores become a plan that meets the budget. `SELECTIONS` is the table.

May import: costs, surgery, training and all below them. To add one: a file, and a line in the table. Another package
uses the entry-point group `xprune.selections`.
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
"""Selection class by name."""
