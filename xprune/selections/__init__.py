"""The table of selections: how scores become a plan that meets the budget. One file each; entry points add more."""

from collections.abc import Mapping

from xprune.interfaces import Selection
from xprune.selections.global_threshold import Global
from xprune.selections.learned import LearnedThresholds
from xprune.selections.uniform import Uniform
from xprune.tables import table

SELECTIONS: Mapping[str, type[Selection]] = table("selections", (Uniform, Global, LearnedThresholds))
"""Selection class by name."""
