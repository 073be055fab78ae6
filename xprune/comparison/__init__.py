"""Comparison: a grid of criteria, selections, budgets and seeds on the same terms, its table and its picture.

May import: explain, pipeline and all below them.
"""

from xprune.comparison.table import Comparison

__all__ = ["Comparison"]
