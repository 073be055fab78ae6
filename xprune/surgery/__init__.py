"""Surgery: gates on units, their removal, and the proof that both give the same outputs.

May import: adapters, core, modules, errors. To change what counts as exact, see `exactness`.
"""

from xprune.surgery.apply import apply
from xprune.surgery.exactness import TOLERANCE, compare, gated_outputs, verify

__all__ = ["TOLERANCE", "apply", "compare", "gated_outputs", "verify"]
