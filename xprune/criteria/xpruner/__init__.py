"""The criterion X-Pruner, which learns for each unit and each class how much the unit is needed.

`criterion` contains the plug-in, `masks` the learned numbers, and `learner` their training. For developers of xprune:
these files may import the same packages as `criteria`.
"""

from xprune.criteria.xpruner.criterion import XPruner

__all__ = ["XPruner"]
