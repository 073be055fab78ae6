"""A grid of criteria, selections, budgets and seeds on the same terms, with its table and its picture.

May import: explain, pipeline and all below them. What a grid varies is a field of `grid.Grid`.
"""

from xprune.comparison.table import Comparison

__all__ = ["Comparison"]
