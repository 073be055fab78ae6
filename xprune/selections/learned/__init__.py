"""A selection that learns a threshold for each site. `selection` is the plug-in, and `learner` trains the thresholds.

May import: the same as `selections`.
"""

from xprune.selections.learned.selection import LearnedThresholds

__all__ = ["LearnedThresholds"]
