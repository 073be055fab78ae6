"""X-Pruner: learns a mask for each class, and one mask for the plan, at the budget.

`criterion` is the plug-in, `masks` holds the masks, and `learner` trains them. May import: the same as `criteria`.
"""

from xprune.criteria.xpruner.criterion import XPruner

__all__ = ["XPruner"]
