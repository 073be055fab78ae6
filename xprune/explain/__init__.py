"""Which class needs which unit, and a measurement of how true such a statement is.

May import: pipeline and all below it. A new measurement is a file here and a name in this list.
"""

from xprune.explain.curves import Curves, Faithfulness
from xprune.explain.deletion import ORDERS, agreement, contrast, faithfulness

__all__ = ["ORDERS", "Curves", "Faithfulness", "agreement", "contrast", "faithfulness"]
