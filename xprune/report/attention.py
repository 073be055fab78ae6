"""Attention maps of a dense model, computed from q and k, and checked against the output of the attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.site import Site
from xprune.modules.calls import call
from xprune.surgery.exactness import close


@torch.no_grad()
def attention(model: nn.Module, site: Site, inputs: Any) -> Tensor | None:
    """Computes the attention maps of one attention, softmax(q k^T / sqrt(head size)), and checks them.

    q, k and v are the outputs of the site's producers, in the order of the site's cuts. Some attentions compute
    something else, for example with a position bias, a norm or a rotation of q and k. So the product of map and v is
    compared with the input of the consumer. If they differ, no map is returned.

    Args:
        model: The dense model.
        site: The heads of one of its attentions.
        inputs: What the model is called with.

    Returns:
        Maps of all heads, float32 (rows, heads, tokens, tokens). None if the attention computes something else.
    """
    # A fused qkv is one producer with 3 groups, q with kv are two with 1 and 2, separate layers are three with 1 each.
    producers = {
        c.tensor.rpartition(".")[0]: c.groups for c in site.cuts if c.axis == 0 and c.tensor.endswith(".weight")
    }
    # Norms and gates on heads have such cuts too, but they are no linear layers or make the groups more than 3.
    producers = {path: groups for path, groups in producers.items() if isinstance(model.get_submodule(path), nn.Linear)}
    if sum(producers.values()) != 3:
        return None
    seen: dict[str, Tensor] = {}
    handles = [model.get_submodule(path).register_forward_hook(_keep_output(seen, path)) for path in producers]
    handles.append(
        model.get_submodule(site.consumers[0]).register_forward_pre_hook(_keep_input(seen, site.consumers[0]))
    )
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    parts: list[Tensor] = []
    for path, groups in producers.items():
        if path not in seen or seen[path].dim() != 3 or seen[path].shape[-1] != groups * site.size * site.width:
            return None
        output = seen[path].float()  # (rows, tokens, groups * heads * width)
        rows, tokens, _ = output.shape
        parts += output.view(rows, tokens, groups, site.size, site.width).permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = parts  # each (rows, heads, tokens, width)
    if len({part.shape for part in parts}) > 1:
        return None
    weights = (q @ k.transpose(-2, -1) * site.width**-0.5).softmax(-1)
    real = seen.get(site.consumers[0])
    ours = (weights @ v).transpose(1, 2).flatten(2)  # (rows, tokens, heads * width)
    if real is None or real.shape != ours.shape:
        return None
    return weights if close(real.float(), ours) else None


def _keep_output(seen: dict[str, Tensor], path: str) -> Callable[..., None]:
    """Returns a forward hook that stores the output of the module at `path` in `seen`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[path] = output.detach()

    return hook


def _keep_input(seen: dict[str, Tensor], path: str) -> Callable[..., None]:
    """Returns a forward pre-hook that stores the first input of the module at `path` in `seen`."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            seen[path] = args[0].detach()

    return hook
