"""Finds the consumers of units that leave their module as features, such as the heads of a graph attention (GAT).

An adapter sees one module and cannot know which layers of the model read its output. It marks the consumer with "".
This file finds the layers on a real forward: the output of the module is made the start of a gradient, so every tensor
that needs a gradient afterwards depends on it. The result is proved by removing units.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.site import Cut, Site
from xprune.errors import ModelError, XPruneError
from xprune.modules.calls import call, tensors_in
from xprune.modules.copies import shared_copy
from xprune.modules.norms import BATCH_NORMS
from xprune.modules.paths import is_linear
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units


def with_consumers(model: nn.Module, site: Site, example_inputs: Any) -> Site:
    """Adds the missing consumers of a site, and the cuts that come with them.

    Between the module and its consumers, each feature has to be treated without regard to the others: by activations,
    dropout, batch norms, or pooling over the nodes of a graph.

    Args:
        model: The model. It is not changed.
        site: A site with "" among its consumers.
        example_inputs: What the model is called with.

    Returns:
        The site with all its consumers, proved.

    Raises:
        ModelError: The consumers cannot be found, or half of the units cannot be removed exactly.
    """
    consumers, norms = _first_consumers(model, site, example_inputs)
    features = site.size * site.width
    for path in consumers:
        reads = model.get_parameter(f"{path}.weight").shape[1]
        if reads != features:
            raise ModelError(
                f"its consumer {path} reads {reads} features, but its units have {features}. Other features are joined "
                "with them on the way."
            )
    cuts = [*site.cuts, *(Cut(f"{path}.weight", 1, 1, site.width) for path in consumers)]
    for path in norms:
        norm = model.get_submodule(path)
        held = (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))
        # The count of batches in a batch norm has no axes and is not cut.
        cuts += [Cut(f"{path}.{name}", 0, 1, site.width) for name, tensor in held if tensor.dim()]
    known = tuple(filter(None, site.consumers))
    found = replace(site, consumers=(*consumers, *known), axes=(), cuts=tuple(cuts))
    _prove(model, found, example_inputs)
    return found


def _first_consumers(model: nn.Module, site: Site, example_inputs: Any) -> tuple[list[str], list[str]]:
    """Returns the first linear layers that the output of a module reaches, and the batch norms on the way.

    Raises:
        ModelError: No linear layer reads the output, it reaches the output of the model, or it is no single tensor.
    """
    # Without gradients of the weights, only what depends on the module's output needs a gradient.
    copy = shared_copy(model, requires_grad=False)
    consumers: dict[str, None] = {}
    norms: dict[str, None] = {}

    def start(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        """Replaces the output of the module by a copy at which gradients start. A forward hook."""
        if not isinstance(output, Tensor):
            raise ModelError(
                "it returns more than one tensor, and xprune cannot tell which layers read its units. Change the call: "
                "it has to return its output alone."
            )
        return output.detach().requires_grad_()

    def note(path: str, is_consumer: bool) -> Any:
        """Makes a forward pre-hook that notes a layer if its input depends on the output of the module."""

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
                return None
            (consumers if is_consumer else norms)[path] = None
            # The gradient ends at a consumer, so layers behind it are not noted. It passes through a norm.
            return (args[0].detach(), *args[1:]) if is_consumer else None

        return hook

    copy.get_submodule(site.name).register_forward_hook(start)
    for path, module in copy.named_modules():
        if is_linear(module) or isinstance(module, BATCH_NORMS):
            module.register_forward_pre_hook(note(path, is_linear(module)))
    with torch.enable_grad():
        outputs = tensors_in(call(copy, example_inputs))
    if any(output.requires_grad for output in outputs):
        raise ModelError(
            "its output reaches the output of the model without a linear layer between them, so its units cannot be "
            "removed: the model would return fewer features."
        )
    if not consumers:
        raise ModelError("no linear layer reads its output, so there is nothing to gate.")
    return list(consumers), list(norms)


def _prove(model: nn.Module, site: Site, example_inputs: Any) -> None:
    """Removes every other unit and compares the model with the gated one.

    Raises:
        ModelError: The outputs differ. Something on the way mixes features, or adds to them.
    """
    plan = Plan((site,), (tuple(range(1, site.size, 2)),))
    try:
        pruned = remove_units(shared_copy(model), plan, ADAPTERS)
    except XPruneError as problem:
        raise ModelError(str(problem)) from problem
    why = exactness.problem(model, pruned, plan, example_inputs)
    if why:
        why = why.rstrip(".")
        if "forward fails" in why:
            raise ModelError(f"with half of its units removed, {why}.")
        raise ModelError(
            f"something mixes its features on the way to {', '.join(site.consumers)}: with half of its units removed, "
            f"{why}."
        )
