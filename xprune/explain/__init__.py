"""Explanations: measures whether class-wise scores are right about which class needs which unit.

For developers of xprune: these files may import `pipeline` and the packages that it may import. To add a measurement,
write a file here and add its name to `__all__`.
"""

from xprune.explain.curves import Curves, Faithfulness
from xprune.explain.deletion import ORDERS, agreement, contrast, faithfulness

__all__ = ["ORDERS", "Curves", "Faithfulness", "agreement", "contrast", "faithfulness"]
