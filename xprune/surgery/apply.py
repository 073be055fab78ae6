"""apply: cuts a model as a plan says, and hands it out only if it is proved equal to the gated dense model."""

import gc
from typing import Any

import torch
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.provenance import inherit
from xprune.errors import ModelError
from xprune.modules.copies import shared_copy, tables_of, unshare, unwrap
from xprune.modules.sliced import fill, slice_of
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify


@undisturbed()
def apply(model: nn.Module, plan: Plan, example_inputs: Any, *, in_place: bool = False) -> nn.Module:
    """Removes the units that a plan does not keep, and proves that the pruned model is exact.

    The proof compares the pruned model with the gated dense model on the example inputs, in eval mode and in float32 or
    better. See `xprune.surgery.exactness`. The random states and torch settings of the caller stay as they are.

    Args:
        model: The dense model. It is not changed unless `in_place` is True.
        plan: The units that stay at each site.
        example_inputs: The inputs for the proof: a tensor, a tuple of arguments, or a dict of keyword arguments.
        in_place: True to cut `model` itself and to return it. This needs no memory for a second model. The proof runs
            first, on a copy whose smaller tensors are computed when an operation reads them. Then the tensors of
            `model` are cut one at a time. If the proof fails, `model` is as it was. After the cut, its gradients are
            gone, and optimizers that held its parameters have to be made anew.

    Returns:
        The pruned model in eval mode. Without `in_place`, it shares no tensor with `model`.

    Raises:
        PlanError: The plan does not fit the model.
        SurgeryError: The pruned model is not exact, or its forward fails. The message names the sites that are to
            blame, if there are any.
        ModelError: The model has no values (meta device), cannot be copied, or is a wrapper such as torch.compile's
            although `in_place` is True.

    Example:
        >>> import xprune
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
        >>> x = torch.randn(3, 4)
        >>> sites = xprune.find_sites(model, x)  # one site: the 6 neurons of the MLP
        >>> pruned = apply(model, xprune.Plan(sites, keeps=((0, 2, 5),)), x)
        >>> pruned[0][0], model[0][0].out_features
        (Linear(in_features=4, out_features=3, bias=True), 6)
    """
    inner = unwrap(model)
    # Tensors that are made in inference mode could not be trained afterwards.
    with torch.inference_mode(False):
        if in_place:
            if inner is not model:
                raise ModelError(
                    f"in_place=True cuts the model itself, but the model is inside a {type(model).__name__}. Give the "
                    "model that is inside, and wrap the model that is returned."
                )
            return _cut_in_place(inner, plan, example_inputs)
        # The copy shares the tensors that lose no units. It gets tensors that it owns once it is proved.
        pruned = remove_units(shared_copy(inner), plan, ADAPTERS)
        verify(inner, pruned, plan, example_inputs)
        inherit(inner, pruned, plan)
        return unshare(pruned, inner)


def _cut_in_place(model: nn.Module, plan: Plan, example_inputs: Any) -> nn.Module:
    """Proves the plan on a copy that shares all weights, then cuts the model. Returns the model in eval mode."""
    verify(model, remove_units(shared_copy(model), plan, ADAPTERS, slice_of), plan, example_inputs)
    # Modules of a copy may refer to each other in circles. Until these are collected, they hold weights that `fill`
    # is to free.
    gc.collect()
    before = _Structure(model)
    try:
        # `slice_of` puts `Sliced` tensors into the model, which refer to the whole ones. So nothing is lost yet.
        remove_units(model, plan, ADAPTERS, slice_of)
        inherit(model, model, plan)
        # From the first real tensor on, the way back is given up: whole tensors are freed one after the other.
        fill(model, before.forget)
    except BaseException:  # an interrupt by the user must not leave half a cut either
        before.put_back()
        raise
    return model.eval()


class _Structure:
    """The classes and attributes of all modules of a model, to undo a cut that fails half-way.

    Args:
        model: The model as it is to be put back. Its tensors are held, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.held = [
            (module, type(module), dict(vars(module)), [(table, dict(table)) for table in tables_of(module)])
            for module in model.modules()
        ]

    def forget(self) -> None:
        """Drops all references, so that the tensors can be freed. `put_back` then does nothing."""
        self.held = []

    def put_back(self) -> None:
        """Gives each module the class and the attributes that it had."""
        for module, kind, state, tables in self.held:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            # The dictionaries stay the same objects, because the handles of hooks refer to them.
            for table, items in tables:
                table.clear()
                table.update(items)
