"""A threshold for each site, learned by gradient. `selection` is the plug-in, `learner` takes its steps.

May import: what `selections` may.
"""

from xprune.selections.learned.selection import LearnedThresholds

__all__ = ["LearnedThresholds"]
