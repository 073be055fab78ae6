"""Finds the consumers of units that are the output of a module, such as the heads of a graph attention (GAT).

An adapter sees one module only. It cannot know which layers of the model read the output of this module. So it writes
"" in place of the consumer's path. The functions here run the model to find the layers. They make the output of the
module the start of a gradient. Then every tensor that needs a gradient depends on this output. At the end, units are
removed to prove the result.
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
    """Adds the missing consumers of a site, and their cuts.

    Between the module and its consumers, only operations that treat each feature separately are allowed, such as
    activations, dropout, batch norms, and pooling over the nodes of a graph.

    Args:
        model: The model. It is not changed.
        site: A site that has "" among its consumers.
        example_inputs: The inputs that the model is called with.

    Returns:
        The site with all its consumers. It is proved.

    Raises:
        ModelError: The consumers cannot be found, or half of the units cannot be removed exactly.
    """
    consumers, norms = _first_consumers(model, site, example_inputs)
    features = site.size * site.width
    for path in consumers:
        reads = model.get_parameter(f"{path}.weight").shape[1]
        if reads != features:
            raise ModelError(
                f"its consumer {path} reads {reads} features, but its units have {features}. Something between "
                "them joins these features with others."
            )
    cuts = [*site.cuts, *(Cut(f"{path}.weight", 1, 1, site.width) for path in consumers)]
    for path in norms:
        norm = model.get_submodule(path)
        held = (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))
        # `num_batches_tracked` of a batch norm has no axes and is not cut.
        cuts += [Cut(f"{path}.{name}", 0, 1, site.width) for name, tensor in held if tensor.dim()]
    known = tuple(filter(None, site.consumers))
    found = replace(site, consumers=(*consumers, *known), axes=(), cuts=tuple(cuts))
    _prove(model, found, example_inputs)
    return found


def _first_consumers(model: nn.Module, site: Site, example_inputs: Any) -> tuple[list[str], list[str]]:
    """Finds the layers that read the output of a module.

    Returns:
        (consumers, norms), two lists of paths: the first linear layers that the output reaches, and the batch norms
        between the module and these layers.

    Raises:
        ModelError: No linear layer reads the output. Or the output reaches the output of the model without a linear
            layer between them. Or the output is not a single tensor.
    """
    # The weights need no gradients in this copy. So a tensor needs a gradient only if it depends on the module's
    # output.
    copy = shared_copy(model, requires_grad=False)
    consumers: dict[str, None] = {}
    norms: dict[str, None] = {}

    def start(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        """Replaces the output of the module by a copy at which gradients start. A forward hook."""
        if not isinstance(output, Tensor):
            raise ModelError(
                "it returns something else than a single tensor, so xprune cannot find the layers that read its units. "
                "Change the model so that it returns its output tensor only."
            )
        return output.detach().requires_grad_()

    def note(path: str, is_consumer: bool) -> Any:
        """Returns a forward pre-hook that notes a layer if its input depends on the output of the module."""

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
                return None
            (consumers if is_consumer else norms)[path] = None
            # At a consumer, the input loses its gradient, so later layers are not noted. At a batch norm, it keeps its
            # gradient.
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
    """Removes every other unit, and compares the pruned model with the gated model.

    Raises:
        ModelError: The outputs differ, or units cannot be cut out. An operation before the consumers may mix features.
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
            f"an operation before {', '.join(site.consumers)} mixes its features: with half of its units removed, "
            f"{why}."
        )
