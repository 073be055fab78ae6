"""Surgery: a plan carried out on a copy, exactly, or not at all."""

from typing import Any

from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.provenance import inherit
from xprune.modules.copies import alias, own, unwrap
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify


@undisturbed()
def apply(model: nn.Module, plan: Plan, example_inputs: Any) -> nn.Module:
    """A smaller model: `model` without the units that the plan lets go. The model given is not changed.

    The result is compared with the gated dense model on the example inputs (float32, eval mode, error at most
    1e-4 x max(1, max |output|)) and is returned in eval mode. Raises PlanError where the plan does not fit the model
    and SurgeryError, naming the sites, where the comparison or the pruned forward fails.
    """
    model = unwrap(model)
    pruned = remove_units(alias(model), plan, ADAPTERS)
    verify(model, pruned, plan, example_inputs)
    inherit(model, pruned, plan)
    return own(pruned, model)
