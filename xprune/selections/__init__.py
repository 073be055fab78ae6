"""The table of selections: how scores become a plan that meets the budget. One file each; entry points add more."""

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
