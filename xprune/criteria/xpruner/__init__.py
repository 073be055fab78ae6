"""X-Pruner: class-wise masks, learned at the budget. `criterion` is the plug-in; `masks` and `learner` do its work."""

from xprune.criteria.xpruner.criterion import XPruner

__all__ = ["XPruner"]
