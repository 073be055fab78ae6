"""Placeholder: one operation in place of an attention or MLP that an adapter knows, for the dependency graph to see.

It gives what the module gave, in shape and nesting, and depends on all that the module was given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.site import Site
from xprune.modules.calls import call, map_tensors, slow_path, tensors_in


class Placeholder(nn.Module):
    """In place of a module: it reads `in_features` of the stream and writes `out_features` to it.

    outputs   what the module gave, one nest for each of its calls in a forward pass
    original  the module, whose attributes its surroundings may ask for
    """

    def __init__(self, in_features: int, out_features: int, outputs: Sequence[Any], original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)  # a tuple: it is no submodule
        self.in_features, self.out_features = in_features, out_features
        self.outputs, self.calls = tuple(outputs), 0
        self.weight = nn.Parameter(torch.zeros(1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.original[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The nest of this call: its first tensor made by one operation on all inputs, the others as they were."""
        given = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1
        first = tensors_in(given)[0]
        reads = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        made = _Made.apply(first, self.weight.to(first.device), *reads)
        return map_tensors(given, lambda t: made if t is first else t)


class JoiningPlaceholder(Placeholder):
    """In place of a module that adds its input itself, see Adapter.joins."""


class _Made(torch.autograd.Function):
    """Zeros like the first argument, which depend on all others."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *reads: Tensor) -> Tensor:
        return torch.zeros_like(like)


class PlaceholderPruner(tp.BasePruningFunc):
    """Tells the graph how many features a placeholder reads and writes. Nothing is pruned through the graph."""

    def get_in_channels(self, layer: Placeholder) -> int:
        """Features of the stream that it reads."""
        return layer.in_features

    def get_out_channels(self, layer: Placeholder) -> int:
        """Features of the stream that it writes."""
        return layer.out_features

    def prune_in_channels(self, layer: Placeholder, idxs: Sequence[int]) -> Placeholder:
        """Never called: groups are read, not carried out."""
        return layer

    def prune_out_channels(self, layer: Placeholder, idxs: Sequence[int]) -> Placeholder:
        """Never called: groups are read, not carried out."""
        return layer


class JoiningPlaceholderPruner(PlaceholderPruner):
    """Tells the graph that what is read and what is written are one stream: in torch-pruning, that both are one."""

    prune_in_channels = PlaceholderPruner.prune_out_channels


@torch.no_grad()
def put_placeholders(model: nn.Module, inputs: Any, known: Mapping[str, Site]) -> None:
    """Replaces the modules of known sites (path -> site) in place, after a forward pass that shows what they give."""
    outputs: dict[str, list[Any]] = {path: [] for path in known}

    def watch(path: str) -> Any:
        return model.get_submodule(path).register_forward_hook(lambda _module, _args, out: outputs[path].append(out))

    handles = [watch(path) for path in known]
    try:
        with slow_path():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for path, site in known.items():
        if outputs[path]:  # else it is not called, and nothing has to be seen of it
            reads, given = site.cuts[0], tensors_in(outputs[path][0])[0]
            weight = model.get_parameter(reads.tensor)
            parent, _, child = path.rpartition(".")
            features = weight.shape[1 - reads.axis], given.shape[site.axes[0]]
            joins = site.adapter in ADAPTERS and ADAPTERS[site.adapter].joins
            made = (JoiningPlaceholder if joins else Placeholder)(*features, outputs[path], model.get_submodule(path))
            setattr(model.get_submodule(parent), child, made.to(weight.device))
