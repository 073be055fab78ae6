"""Follows the channels of one residual stream through the dependency graph, to all nodes that hold them.

Many nodes hold the channels of a stream: layers that write to it or read from it, norm layers, embeddings, additions.
We call these nodes holders. The walk starts at one layer that writes, and follows a single channel, the last one, along
the dependencies.

Two things make this more difficult than a search in a graph:

- Channels can be tied: they have to be removed together. For example, torch.cat may join two halves of a stream, or a
  convolution with groups may read four channels as one group. Tied channels form one unit. The walk first takes each
  channel as a unit. If a node shows that channels are tied, the walk starts again with larger units.
- A tensor can hold several copies of the channels, one after another. An example is a reshape that joins neighbouring
  patches. The walk does not follow the copies. `channels` finds them from the length of the tensor and proves the
  result.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import nn

from xprune.discovery.placeholders import Placeholder
from xprune.discovery.torch_pruning_private import JOINS_AND_SPLITS, SLICES, as_index
from xprune.modules.paths import is_linear
from xprune.modules.torch_private import saved_dim, saved_sizes

PRODUCERS = (nn.Linear, nn.Conv2d, nn.Embedding, Placeholder)
"""Classes of modules that can write to a stream."""


class Refused(Exception):
    """Raised for a stream whose channels cannot be removed. In the message, "they" are the channels."""


@dataclass(frozen=True)
class _Tied(Exception):
    """Raised if a node needs larger units than the walk has. It says how the channels of the stream are tied.

    The channels lie in parts, one after another, each of size * width channels. Unit i consists of the i-th group of
    `width` neighbouring channels of each part.

    Attributes:
        size: The number of units. 1 means that all channels are tied together.
        width: The number of neighbouring channels that a unit has in each part.
    """

    size: int
    width: int


@dataclass(frozen=True)
class Holder:
    """A node of the dependency graph that holds the channels of a stream: an operation, a module or a bare parameter.

    Attributes:
        node: The node.
        out: True if the node writes the channels, False if it reads them. For a node that only passes channels on, it
            has no meaning.
        size: The number of units. It is the number of channels, or less if channels are tied.
        width: The number of neighbouring channels that a unit has in this node.
        sideways: True for a layer that computes over another axis, such as tokens, and treats the channels like samples
            of a batch. No weight of such a layer is cut.
    """

    node: Any
    out: bool
    size: int
    width: int
    sideways: bool = False

    @property
    def module(self) -> Any:
        """The module or bare parameter of the node. For an operation, it is a module that torch-pruning made."""
        return self.node.module

    @property
    def writes(self) -> bool:
        """True for a layer, embedding or placeholder that writes to the stream. False for any other node."""
        return isinstance(self.module, PRODUCERS) and self.out and not self.sideways


def holders(graph: Any, producer: nn.Module, channels: int) -> Iterator[Holder]:
    """Lists all nodes that hold the channels which a layer writes.

    The walk always ends: it follows only the last channel, and each dependency once. torch-pruning's own method
    `get_pruning_group` may never end. After a reshape that it guesses wrongly, it follows more and more indices.

    Args:
        graph: The dependency graph.
        producer: A layer that writes the channels.
        channels: The number of channels that it writes.

    Yields:
        Each holder. The producer comes first.

    Raises:
        Refused: The channels cannot be removed separately. It is raised after the holders that were found so far.
    """
    tied, found = _Tied(channels, 1), list[Holder]()
    while True:
        found.clear()
        try:
            for holder in _walk(graph, producer, channels, tied):
                found.append(holder)
        except _Tied as wanted:
            if wanted.size > 1:
                # Each new walk has fewer units, so this ends.
                tied = wanted
                continue
            yield from found
            raise Refused("they are tied to each other, so they can only be removed all together") from wanted
        except Refused:
            yield from found
            raise
        yield from found
        return


def _walk(graph: Any, producer: nn.Module, channels: int, tied: _Tied) -> Iterator[Holder]:
    """Walks through the graph once, with units of a given size.

    Args:
        graph: The dependency graph.
        producer: The layer at which the walk starts.
        channels: The number of channels that it writes.
        tied: The size of the units.

    Yields:
        Each holder.

    Raises:
        _Tied: A node needs larger units.
    """
    size, node = tied.size, graph.module2node[producer]
    # (node, end of the node, index of the followed channel at this end, channels of a unit at this end)
    stack = [(node, graph.get_pruner_of_module(producer).prune_out_channels, channels - 1, tied.width)]
    seen = {(node, stack[0][1])}
    while stack:
        node, handler, index, width = stack.pop()
        # The ends of the node from which the walk continues, each with the index of the channel and the width of a unit
        # there. For most nodes, this is only the end at which the walk has arrived.
        pruner, ends = graph.get_pruner_of_module(node.module), {handler: (index, width)}
        sideways = _is_sideways(graph, node, handler, size * width)
        if sideways:
            # The channels pass through the layer like samples of a batch, so the walk continues at both ends.
            ends = dict.fromkeys((pruner.prune_in_channels, pruner.prune_out_channels), (index, width))
        elif getattr(node.module, "groups", 1) > 1:
            # A unit consists of whole groups of a convolution, so it has both input and output channels.
            out = handler != pruner.prune_in_channels or pruner.prune_in_channels == pruner.prune_out_channels
            width_in, width_out = _widths_in_groups(node.module, tied, width, out)
            units_up_to_here = (index + 1) // width
            ends = {pruner.prune_in_channels: (units_up_to_here * width_in - 1, width_in)}
            ends[pruner.prune_out_channels] = units_up_to_here * width_out - 1, width_out
            seen |= {(node, end) for end in ends}
            width = width_out
        yield Holder(node, len(ends) > 1 or graph.is_out_channel_pruning_fn(handler), size, width, sideways)
        for dep in node.dependencies:
            end = next((known for known in ends if dep.is_triggered_by(known)), None)
            if end is None or (dep.target, dep.handler) in seen:
                continue
            index, width_here = ends[end]
            part = size * width_here
            # A split or slice may leave out the followed channel. Then the last channel of another part is followed.
            others = range(part - 1, part * (channels // (size * tied.width)), part)
            mapped = next((m for i in (index, *others) if (m := _mapped(dep, i, part)) is not None), None)
            if mapped is None:
                continue
            if (mapped + 1) % part:
                # At the target, the followed channel is not the last one of a part. So the parts have to be smaller.
                # The new number of units is the largest one that fits at both ends. If units do not start at multiples
                # of their width, no number fits, and all channels are tied.
                raise _Tied(
                    math.gcd(size, (mapped + 1) // width_here) if (mapped + 1) % width_here == 0 else 1, tied.width
                )
            seen.add((dep.target, dep.handler))
            stack.append((dep.target, dep.handler, mapped, width_here))


def _widths_in_groups(layer: Any, tied: _Tied, width: int, out: bool) -> tuple[int, int]:
    """Returns (input channels, output channels) that a unit has in a convolution with groups.

    Args:
        layer: The convolution.
        tied: The size of the units.
        width: The number of neighbouring channels of a unit at the end of the layer where the walk arrives.
        out: True if this end is the output of the layer, False if it is the input.

    Raises:
        _Tied: A unit covers only a part of a group. Units have to be larger.
    """
    reads, writes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    per_group = writes if out else reads
    if width % per_group:
        factor = per_group // math.gcd(per_group, width)
        raise _Tied(tied.size // factor if tied.size % factor == 0 else 1, tied.width * factor)
    return width // per_group * reads, width // per_group * writes


def _is_sideways(graph: Any, node: Any, handler: Any, size: int) -> bool:
    """Returns True for a layer that computes over another axis of the stream, such as tokens. Else False.

    It may be a linear layer, or the placeholder of an MLP, that reads the transposed stream. Then its number of
    features is not a multiple of the number of channels, and an inner axis of its input and output is as long as the
    stream.
    """
    module = node.module
    if not (isinstance(module, Placeholder) or is_linear(module)) or module not in graph.shapes:
        return False
    out = graph.is_out_channel_pruning_fn(handler) and not isinstance(module, Placeholder)
    features = module.in_features if isinstance(module, Placeholder) else module.weight.shape[0 if out else 1]
    return bool(features % size) and all(size in shape[1:-1] for shape in graph.shapes[module])


def _mapped(dep: Any, index: int, size: int) -> int | None:
    """Returns the index of a channel at the target of a dependency, or None if the channel does not arrive there.

    Only concatenations, splits and slices change the index. torch-pruning's index mappings for reshapes are guesses, so
    they are ignored.
    """
    for mapping in dep.index_mapping:
        if isinstance(mapping, JOINS_AND_SPLITS) or (isinstance(mapping, SLICES) and _slices_channels(dep, size)):
            found = mapping(as_index(index))
            if not found:
                return None
            index = int(found[0].idx)
    return index


def _slices_channels(dep: Any, size: int) -> bool:
    """Returns False for a slice along an axis that cannot hold the channels, such as an axis of tokens. Else True.

    The length of an axis of channels is a multiple of `size`. If the autograd node does not hold the shape, the answer
    is True.
    """
    node = next(n for n in (dep.source, dep.target) if n.type == tp.ops.OPTYPE.SLICE).grad_fn
    sizes, dim = saved_sizes(node), saved_dim(node)
    # Autograd stores a negative axis as an unsigned 64-bit number: -1 is 2**64 - 1.
    return sizes is None or dim is None or int(sizes[dim if dim < 2**63 else dim - 2**64]) % size == 0
