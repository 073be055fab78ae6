"""The walk along one residual stream through the dependency graph: everything that holds its channels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping, _SliceIndexMapping, _SplitIndexMapping

from xprune.standin import StandIn
from xprune.structure import is_linear

WRITERS = (nn.Linear, nn.Conv2d, nn.Embedding, StandIn)
"""What writes to a stream."""


class Refused(Exception):
    """Why the channels of a stream cannot go."""


@dataclass(frozen=True)
class Holder:
    """An operation, module or bare parameter that holds the stream.

    out        True where it writes the stream, False where it reads it; of what lets it pass, either
    sideways   a layer over another axis, to which the channels are a batch: it keeps all of its weights
    """

    node: Any
    out: bool
    sideways: bool = False

    @property
    def module(self) -> Any:
        """The module, parameter, or what stands for an operation."""
        return self.node.module

    @property
    def writes(self) -> bool:
        """True for a layer, embedding or stand-in that writes to the stream."""
        return isinstance(self.module, WRITERS) and self.out and not self.sideways


def holders(graph: Any, writer: nn.Module, size: int) -> Iterator[Holder]:
    """Every holder of the `size` channels that the writer writes, itself first; `Refused` where they meet others.

    Bounded: torch-pruning's own walk (`get_pruning_group`) multiplies indices at every wrongly guessed reshape and may
    never end. Here the last channel is followed, once along each dependency. That a reshape has put copies of the
    channels one after another shows in the lengths of the tensors that hold them, and whoever asks has to prove it.
    """
    node = graph.module2node[writer]
    stack = [(node, graph.get_pruner_of_module(writer).prune_out_channels, size - 1)]
    seen = {(node, stack[0][1])}
    while stack:
        node, handler, index = stack.pop()
        found = Holder(node, graph.is_out_channel_pruning_fn(handler), _sideways(graph, node, handler, size))
        yield found
        pruner = graph.get_pruner_of_module(node.module)
        handlers = [pruner.prune_in_channels, pruner.prune_out_channels] if found.sideways else [handler]
        for dep in node.dependencies:
            if (dep.target, dep.handler) in seen or not any(dep.is_triggered_by(known) for known in handlers):
                continue
            mapped = _mapped(dep, index, size)
            if mapped is None:
                continue
            if mapped % size != size - 1:
                raise Refused(f"they are joined with other features before {dep.target.name}")
            seen.add((dep.target, dep.handler))
            stack.append((dep.target, dep.handler, mapped))


def _sideways(graph: Any, node: Any, handler: Any, size: int) -> bool:
    """True for a linear layer, or what stands in for an MLP, that runs over tokens of the transposed stream."""
    module = node.module
    if not (isinstance(module, StandIn) or is_linear(module)) or module not in graph.shapes:
        return False
    out = graph.is_out_channel_pruning_fn(handler) and not isinstance(module, StandIn)
    features = module.in_features if isinstance(module, StandIn) else module.weight.shape[0 if out else 1]
    return bool(features % size) and all(size in shape[1:-1] for shape in graph.shapes[module])


def _mapped(dep: Any, index: int, size: int) -> int | None:
    """Where the channel is after the dependency; None for nowhere. Guesses about reshapes are left out."""
    for mapping in dep.index_mapping:
        if isinstance(mapping, (_ConcatIndexMapping, _SplitIndexMapping)) or (
            isinstance(mapping, _SliceIndexMapping) and _of_features(dep, size)
        ):
            found = mapping([_HybridIndex(idx=index, root_idx=index)])
            if not found:
                return None
            index = int(found[0].idx)
    return index


def _of_features(dep: Any, size: int) -> bool:
    """False for a slice of an axis too short or too long to hold the channels, such as one of tokens."""
    node = next(n for n in (dep.source, dep.target) if n.type == tp.ops.OPTYPE.SLICE).grad_fn
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    dim = getattr(node, "_saved_dim", None)
    return sizes is None or dim is None or int(sizes[dim if dim < 2**63 else dim - 2**64]) % size == 0
