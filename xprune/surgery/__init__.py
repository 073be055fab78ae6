"""Surgery: gates on units, the removal of units, and the proof that a pruned model equals the gated dense model.

- `gates` multiplies units by factors while the model runs. The weights stay as they are.
- `cut` removes units from the weights. It checks shapes, but it does not prove that the result is exact.
- `outputs` runs the dense, the gated and the pruned model under the same conditions.
- `exactness` compares the outputs of these models. The tolerance and the comparison are defined there and nowhere else.
- `apply` cuts a model and returns it only if the proof succeeds.

This folder may import adapters, core, modules and errors.
"""

from xprune.surgery.apply import apply
from xprune.surgery.exactness import TOLERANCE, compare, gated_outputs, verify

__all__ = ["TOLERANCE", "apply", "compare", "gated_outputs", "verify"]
