"""Explanations, and whether they are true."""

from xprune.explain.curves import Curves, Faithfulness
from xprune.explain.deletion import agreement, contrast, faithfulness

__all__ = ["Curves", "Faithfulness", "agreement", "contrast", "faithfulness"]
