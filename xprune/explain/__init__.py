"""Explanations: which class needs which unit, and a measurement of whether class-wise scores say so correctly.

May import: pipeline and all below it. To add a measurement, write a file here and add its name to `__all__`.
"""

from xprune.explain.curves import Curves, Faithfulness
from xprune.explain.deletion import ORDERS, agreement, contrast, faithfulness

__all__ = ["ORDERS", "Curves", "Faithfulness", "agreement", "contrast", "faithfulness"]
