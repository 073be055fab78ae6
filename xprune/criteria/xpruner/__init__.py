"""X-Pruner: a mask for each class, learned at the budget. `criterion` is the plug-in.

`masks` holds the masks and `learner` trains them. May import: what `criteria` may.
"""

from xprune.criteria.xpruner.criterion import XPruner

__all__ = ["XPruner"]
