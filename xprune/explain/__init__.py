"""Explanations, and whether they are true."""

from xprune.explain.curves import Curves, Faithfulness
from xprune.explain.deletion import ORDERS, agreement, contrast, faithfulness

__all__ = ["ORDERS", "Curves", "Faithfulness", "agreement", "contrast", "faithfulness"]
