"""Gates on units, the removal of units, and the proof that both give the same outputs.

May import: adapters, core, modules, errors. What counts as exact is decided in `exactness` and nowhere else.
"""

from xprune.surgery.apply import apply
from xprune.surgery.exactness import TOLERANCE, compare, gated_outputs, verify

__all__ = ["TOLERANCE", "apply", "compare", "gated_outputs", "verify"]
