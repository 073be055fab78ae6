"""apply: cuts a model as a plan says, and returns it only if it is proved equal to the gated dense model."""

import gc
from typing import Any

import torch
from torch import nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.provenance import inherit
from xprune.errors import ModelError
from xprune.modules.copies import shared_copy, tables_of, unshare, unwrap
from xprune.modules.refused import CUT, refuse
from xprune.modules.sliced import fill, slice_of
from xprune.modules.undisturbed import undisturbed
from xprune.surgery.cut import remove_units
from xprune.surgery.exactness import verify


@undisturbed()
def apply(model: nn.Module, plan: Plan, example_inputs: Any, *, in_place: bool = False) -> nn.Module:
    """Removes the units that a plan does not keep, and proves that the pruned model is exact.

    The proof compares the pruned model with the gated dense model on the example inputs, in eval mode and in float32 or
    better. See `xprune.surgery.exactness`. `apply` restores the caller's random states and torch settings when it ends.

    Args:
        model: The dense model. It is not changed unless `in_place` is True.
        plan: The units that stay at each site.
        example_inputs: The inputs for the proof: a tensor, a tuple of arguments, or a dict of keyword arguments.
        in_place: If True, `model` itself is cut and returned. This needs no memory for a second model. The proof runs
            first, on a copy that does not store the cut tensors: each one is computed from the full tensor when an
            operation reads it. Then the tensors of
            `model` are cut one at a time. If the proof fails, `model` is unchanged. After the cut, the parameters of
            `model` are new ones without gradients, so an optimizer for `model` has to be created again.

    Returns:
        The pruned model in eval mode. Without `in_place`, it shares no tensor with `model`.

    Raises:
        PlanError: The plan does not fit the model.
        SurgeryError: The pruned model is not exact, or its forward fails. To find the cause, each site is pruned
            alone. The message names the sites that are then not exact.
        ModelError: The model cannot be copied, or a part of it is of a kind that cannot be cut, see
            `xprune.modules.refused`. Or `in_place` is True and the model is a wrapper around another one, such as that
            of torch.compile.

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
    refuse(inner, CUT)
    # The caller may be in inference mode. Tensors that are made in that mode cannot be trained later.
    with torch.inference_mode(False):
        if in_place:
            if inner is not model:
                raise ModelError(
                    f"in_place=True cuts the model itself, but the model is inside a {type(model).__name__}. Give the "
                    "model that is inside, and wrap the model that is returned."
                )
            return _cut_in_place(inner, plan, example_inputs)
        # The copy shares with the model all tensors that lose no units, which saves memory during the proof. After the
        # proof, `unshare` gives the copy memory of its own for these tensors.
        pruned = remove_units(shared_copy(inner), plan, ADAPTERS)
        verify(inner, pruned, plan, example_inputs)
        inherit(inner, pruned, plan)
        return unshare(pruned, inner)


def _cut_in_place(model: nn.Module, plan: Plan, example_inputs: Any) -> nn.Module:
    """Proves the plan on a copy that shares all weights, then cuts the model. Returns the model in eval mode.

    If the cut fails or is interrupted before the first tensor is freed, the model is restored.
    """
    verify(model, remove_units(shared_copy(model), plan, ADAPTERS, slice_of), plan, example_inputs)
    # The modules of the proved copy may refer to each other in circles. Python frees such modules only when it collects
    # garbage. Until then they keep the weights alive that `fill` has to free.
    gc.collect()
    before = _Structure(model)
    try:
        # `slice_of` puts `Sliced` tensors into the model. Each of them refers to its whole tensor, so the model can
        # still be restored.
        remove_units(model, plan, ADAPTERS, slice_of)
        inherit(model, model, plan)
        # `fill` calls `before.forget` once it has made the first real tensor. From then on, the whole tensors are freed
        # one after another, so the model can no longer be restored.
        fill(model, before.forget)
    # Ctrl-C is no Exception, and it must not leave a model that is cut in part.
    except BaseException:
        before.put_back()
        raise
    return model.eval()


class _Structure:
    """The classes and attributes of all modules of a model, which undo a cut that fails half-way.

    Args:
        model: The model before the cut. Its tensors are referred to, not copied.
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
        """Restores the class and the attributes that each module had before the cut."""
        for module, kind, state, tables in self.held:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            # The dictionaries stay the same objects, because the handles of hooks refer to them.
            for table, items in tables:
                table.clear()
                table.update(items)
