"""Comparisons: prunes the same model with several criteria, selections and budgets, and shows the results.

For developers of xprune: these files may import `explain`, `pipeline` and the packages that those may import. To vary
one more thing in a comparison, add a field to `grid.Grid`.
"""

from xprune.comparison.table import Comparison

__all__ = ["Comparison"]
