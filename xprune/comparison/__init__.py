"""Comparisons: runs criteria, selections and budgets on the same model and data, and shows a table and a picture.

May import: explain, pipeline and all below them. To vary one more thing, add a field to `grid.Grid`.
"""

from xprune.comparison.table import Comparison

__all__ = ["Comparison"]
