"""Consumers: the layers that a module's output feeds, for units whose features leave the module, as a GAT's heads do.

Found on the real forward, with gradients: what needs one depends on the module's output. Then proved by removing units.
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
from xprune.modules.copies import alias
from xprune.modules.norms import BATCH_NORMS
from xprune.modules.paths import is_linear
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units


def with_consumers(model: nn.Module, site: Site, example_inputs: Any) -> Site:
    """The site with the layers that its units feed, where an adapter could not know them.

    Between the two may lie whatever treats each feature by itself: activations, dropout, batch norms, pooling over
    nodes. Raises ModelError, with the reason, for anything else.
    """
    consumers, norms = _first_readers(model, site, example_inputs)
    features = site.size * site.width
    for path in consumers:
        reads = model.get_parameter(f"{path}.weight").shape[1]
        if reads != features:
            raise ModelError(f"{path} reads {reads} features, of which {site.name} writes {features}")
    cuts = [*site.cuts, *(Cut(f"{path}.weight", 1, 1, site.width) for path in consumers)]
    for path in norms:
        norm = model.get_submodule(path)
        held = (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))
        cuts += [Cut(f"{path}.{name}", 0, 1, site.width) for name, tensor in held if tensor.dim()]
    found = replace(site, layer=consumers[0], feeds=(*consumers, *filter(None, site.feeds)), cuts=tuple(cuts))
    _prove(model, found, example_inputs)
    return found


def _first_readers(model: nn.Module, site: Site, example_inputs: Any) -> tuple[list[str], list[str]]:
    """(linear layers that read what the site's module gave before any other does, batch norms on the way)."""
    copy = alias(model, requires_grad=False)
    consumers: dict[str, None] = {}
    norms: dict[str, None] = {}

    def source(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ModelError("it returns more than its output")
        return output.detach().requires_grad_()

    def reads(path: str, ends: bool) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
                return None
            (consumers if ends else norms)[path] = None
            return (args[0].detach(), *args[1:]) if ends else None

        return hook

    copy.get_submodule(site.name).register_forward_hook(source)
    for path, module in copy.named_modules():
        if is_linear(module) or isinstance(module, BATCH_NORMS):
            module.register_forward_pre_hook(reads(path, is_linear(module)))
    with torch.enable_grad():
        outputs = tensors_in(call(copy, example_inputs))
    if any(output.requires_grad for output in outputs):
        raise ModelError("its output reaches the model's, past every layer")
    if not consumers:
        raise ModelError("no linear layer reads its output")
    return list(consumers), list(norms)


def _prove(model: nn.Module, site: Site, example_inputs: Any) -> None:
    """ModelError where half of the units cannot be removed exactly: something mixes features, or adds to them."""
    plan = Plan((site,), (tuple(range(1, site.size, 2)),))
    try:
        pruned = remove_units(alias(model), plan, ADAPTERS)
    except XPruneError as problem:
        raise ModelError(str(problem)) from problem
    why = exactness.problem(model, pruned, plan, example_inputs)
    if why:
        mixed = "" if "forward fails" in why else f"features are mixed on the way to {', '.join(site.feeds)}: "
        raise ModelError(f"{mixed}with units gone {why}")
