"""The selection LearnedThresholds, which learns a threshold for each site.

`selection` contains the plug-in, and `learner` the training of the thresholds. For developers of xprune: these files
may import the same packages as `selections`.
"""

from xprune.selections.learned.selection import LearnedThresholds

__all__ = ["LearnedThresholds"]
