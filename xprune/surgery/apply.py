"""Surgery: a plan carried out on a copy, or on the model itself, exactly, or not at all."""

import gc
from typing import Any

import torch
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.provenance import inherit
from xprune.errors import ModelError
from xprune.modules.copies import alias, own, tables_of, unwrap
from xprune.modules.sliced import fill, slice_of
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify


@undisturbed()
def apply(model: nn.Module, plan: Plan, example_inputs: Any, *, in_place: bool = False) -> nn.Module:
    """A smaller model: `model` without the units that the plan lets go.

    The smaller model is compared with the gated dense one on the example inputs before anything is handed out, in
    eval mode and at float32 or better (see `xprune.surgery.exactness`).

    Args:
        model: The dense model. It is not changed, unless `in_place` says so.
        plan: The units that stay.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
        in_place: Cut the model itself, and return it. This needs no second model: the proof runs on a copy of the
            structure whose smaller tensors are made when they are read, and the model's tensors are then cut one at a
            time. Where the proof fails the model is as it was. Its gradients are gone afterwards, and optimizers
            that held its parameters have to be made anew.

    Returns:
        The smaller model in eval mode.

    Raises:
        PlanError: The plan does not fit the model.
        SurgeryError: The pruned model does not give what the gated one gives, or its forward fails. The message says
            which sites are to blame, if any.
        ModelError: `in_place` was asked for a model inside a wrapper.
    """
    inner = unwrap(model)
    with torch.inference_mode(False):
        if in_place:
            if inner is not model:
                raise ModelError(
                    f"in_place=True cuts the model itself and got it inside a {type(model).__name__}: give the model "
                    "that is inside, and wrap what is returned."
                )
            return _cut_in_place(inner, plan, example_inputs)
        pruned = remove_units(alias(inner), plan, ADAPTERS)
        verify(inner, pruned, plan, example_inputs)
        inherit(inner, pruned, plan)
        return own(pruned, inner)


def _cut_in_place(model: nn.Module, plan: Plan, example_inputs: Any) -> nn.Module:
    """Proves the plan on a copy that shares all weights, then cuts the model."""
    verify(model, remove_units(alias(model), plan, ADAPTERS, slice_of), plan, example_inputs)
    gc.collect()  # modules of copies may refer to each other in circles, and hold the weights that are to be freed
    before = _Structure(model)
    try:
        remove_units(model, plan, ADAPTERS, slice_of)  # frees nothing yet
        inherit(model, model, plan)
        fill(model, before.forget)
    except BaseException:
        before.put_back()
        raise
    return model.eval()


class _Structure:
    """The modules of a model, their classes and all that they hold, to put back where a cut ends half-way."""

    def __init__(self, model: nn.Module) -> None:
        self.held = [
            (module, type(module), dict(vars(module)), [(table, dict(table)) for table in tables_of(module)])
            for module in model.modules()
        ]

    def forget(self) -> None:
        """Lets go of the tensors, so that they can be freed."""
        self.held = []

    def put_back(self) -> None:
        """Makes the model what it was, unless that is forgotten."""
        for module, kind, state, tables in self.held:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            # The tables themselves stay: the handles of hooks point to them.
            for table, items in tables:
                table.clear()
                table.update(items)
