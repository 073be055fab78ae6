"""Attention maps of a dense model, taken from q and k only where they provably are what the attention computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.site import Site
from xprune.modules.calls import call
from xprune.surgery.exactness import close


@torch.no_grad()
def attention(model: nn.Module, site: Site, inputs: Any) -> Tensor | None:
    """softmax(q k^T / sqrt(width)) of every head, float32 (rows, heads, tokens, tokens); None where it is not that.

    q, k and v are the outputs of the layers that make the units' features, in the order that the site's cuts say. An
    attention with a bias, a norm or a rotation between q and k computes something else: attention x v then differs
    from what it feeds to its last layer, and there is no map.
    """
    producers = {
        c.tensor.rpartition(".")[0]: c.groups for c in site.cuts if c.axis == 0 and c.tensor.endswith(".weight")
    }
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
        rows, tokens, _ = seen[path].shape
        parts += seen[path].float().view(rows, tokens, groups, site.size, site.width).permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = parts  # (rows, heads, tokens, width)
    if len({part.shape for part in parts}) > 1:
        return None
    weights = (q @ k.transpose(-2, -1) * site.width**-0.5).softmax(-1)
    fed = seen.get(site.consumers[0])
    ours = (weights @ v).transpose(1, 2).flatten(2)
    if fed is None or fed.shape != ours.shape:
        return None
    return weights if close(fed.float(), ours) else None


def _keep_output(seen: dict[str, Tensor], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[path] = output.detach()

    return hook


def _keep_input(seen: dict[str, Tensor], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            seen[path] = args[0].detach()

    return hook
