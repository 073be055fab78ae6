"""Computes attention maps of a dense model from q and k, and checks them with the output of the attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.site import Site
from xprune.modules.calls import call
from xprune.surgery.exactness import close


@torch.no_grad()
def attention(model: nn.Module, site: Site, inputs: Any) -> Tensor | None:
    """Computes the attention maps of one attention as softmax(q k^T / sqrt(head size)), and checks them.

    The report shows these maps. q, k and v are read from the outputs of the site's producers. This formula is not right
    for each attention: some add a position bias, or normalise or rotate q and k. So the function multiplies the maps by
    v and compares the product with the input of the consumer. If they differ, it returns None.

    Args:
        model: The dense model.
        site: A site of heads in the model.
        inputs: The inputs that the model is called with.

    Returns:
        The attention maps of all heads, float32 (rows, heads, tokens, tokens). None if the attention uses another
        formula.
    """
    # There are 3 groups in all: a fused qkv is one producer with 3 groups, q and a fused kv are two producers with 1
    # and 2 groups, and separate layers are three producers with 1 group each.
    producers = {
        c.tensor.rpartition(".")[0]: c.groups for c in site.cuts if c.axis == 0 and c.tensor.endswith(".weight") and not c.segments
    }
    # Norm layers and layers for gates on heads have such cuts too. They are not linear layers, or the sum of the groups
    # is not 3.
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
    """Returns a forward hook that stores the output of a module in `seen`, under the key `path`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[path] = output.detach()

    return hook


def _keep_input(seen: dict[str, Tensor], path: str) -> Callable[..., None]:
    """Returns a forward pre-hook that stores the first input of a module in `seen`, under the key `path`."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            seen[path] = args[0].detach()

    return hook
