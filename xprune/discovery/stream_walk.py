"""Follows the channels of one residual stream through the dependency graph, to everything that holds them.

A stream is held by many nodes: the layers that write to it, those that read it, norms, embeddings, additions. The walk
starts at one layer that writes and follows a single channel, the last one, along each dependency.

Two things make this more than a search in a graph:

- Channels can be tied. torch.cat may put two halves of a stream beside each other, and a convolution of groups may read
  four channels as one. Then several channels have to be removed together, and form one unit. The walk starts with one
  channel in each unit. When a node shows that channels are tied, the walk begins anew with larger units.
- The same channels can lie in a tensor in several copies, one after another, for example where a reshape has joined
  neighbouring patches. The walk does not follow copies. `channels` finds them from the length of the tensor and proves
  the result.
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
    """Raised for a stream whose channels cannot be removed. The message says why, and calls the channels "they"."""


@dataclass(frozen=True)
class _Tied(Exception):
    """How the channels of a stream are tied. Raised when a node needs larger units than the walk has.

    The channels are parts of size x width, one after another. Unit i has the i-th `width` channels of each part.

    Attributes:
        size: The number of units. 1 means that all channels are tied.
        width: How many neighbouring channels a unit has in each part.
    """

    size: int
    width: int


@dataclass(frozen=True)
class Holder:
    """A node of the graph that holds the channels of a stream: an operation, a module or a bare parameter.

    Attributes:
        node: The node.
        out: True if the node writes the stream, False if it reads the stream. Either if it only passes channels on.
        size: The number of units: the number of channels, or less if channels are tied.
        width: How many neighbouring channels a unit has in this node.
        sideways: True for a layer that runs over another axis, such as tokens, and for which the channels are a batch.
            It keeps all its weights.
    """

    node: Any
    out: bool
    size: int
    width: int
    sideways: bool = False

    @property
    def module(self) -> Any:
        """The module or bare parameter of the node. For an operation, a module that torch-pruning made."""
        return self.node.module

    @property
    def writes(self) -> bool:
        """True for a layer, embedding or placeholder that writes to the stream, False for any other node."""
        return isinstance(self.module, PRODUCERS) and self.out and not self.sideways


def holders(graph: Any, producer: nn.Module, channels: int) -> Iterator[Holder]:
    """Lists everything that holds the channels that a layer writes.

    The walk is bounded. torch-pruning's own `get_pruning_group` multiplies indices at every reshape that it guesses
    wrongly, and may never end. Here, the last channel is followed, once along each dependency.

    Args:
        graph: The dependency graph.
        producer: A layer that writes the channels.
        channels: How many channels it writes.

    Yields:
        Each holder, the producer first.

    Raises:
        Refused: The channels cannot be removed separately. The holders found so far come first.
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
            raise Refused("they are joined or grouped with others, so all of them would go together") from wanted
        except Refused:
            yield from found
            raise
        yield from found
        return


def _walk(graph: Any, producer: nn.Module, channels: int, tied: _Tied) -> Iterator[Holder]:
    """Walks through the graph once, with channels tied in a given way.

    Args:
        graph: The dependency graph.
        producer: The layer at which the walk starts.
        channels: How many channels it writes.
        tied: How the channels are tied.

    Yields:
        Each holder.

    Raises:
        _Tied: A node needs the channels tied in another way.
    """
    size, node = tied.size, graph.module2node[producer]
    # (node, end of the node, index of the last channel there, channels of a unit there)
    stack = [(node, graph.get_pruner_of_module(producer).prune_out_channels, channels - 1, tied.width)]
    seen = {(node, stack[0][1])}
    while stack:
        node, handler, index, width = stack.pop()
        # The ends of the node from which the walk continues, each with the index and the width of a unit there. Most
        # nodes have one: the end at which the walk has arrived.
        pruner, ends = graph.get_pruner_of_module(node.module), {handler: (index, width)}
        sideways = _is_sideways(graph, node, handler, size * width)
        if sideways:
            # The channels pass through the layer as a batch does, so the walk continues at both ends.
            ends = dict.fromkeys((pruner.prune_in_channels, pruner.prune_out_channels), (index, width))
        elif getattr(node.module, "groups", 1) > 1:
            # A unit takes whole groups of a convolution, and so both input and output channels.
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
            # A split or slice may cut off the channel that is followed. The last unit of another part is as good.
            others = range(part - 1, part * (channels // (size * tied.width)), part)
            mapped = next((m for i in (index, *others) if (m := _mapped(dep, i, part)) is not None), None)
            if mapped is None:
                continue
            if (mapped + 1) % part:
                # The last channel does not end a part there, so the parts have to be smaller: the largest number of
                # units that fits both. If units do not even start at a multiple of their width, none fits.
                raise _Tied(
                    math.gcd(size, (mapped + 1) // width_here) if (mapped + 1) % width_here == 0 else 1, tied.width
                )
            seen.add((dep.target, dep.handler))
            stack.append((dep.target, dep.handler, mapped, width_here))


def _widths_in_groups(layer: Any, tied: _Tied, width: int, out: bool) -> tuple[int, int]:
    """Returns how many channels of a unit a convolution of groups reads, and how many it writes.

    Args:
        layer: The convolution.
        tied: How the channels are tied.
        width: How many neighbouring channels a unit has at the end of the layer where the walk arrives.
        out: True if that end is the output.

    Raises:
        _Tied: The unit covers only a part of a group. Units have to be larger.
    """
    reads, writes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    per_group = writes if out else reads
    if width % per_group:
        factor = per_group // math.gcd(per_group, width)
        raise _Tied(tied.size // factor if tied.size % factor == 0 else 1, tied.width * factor)
    return width // per_group * reads, width // per_group * writes


def _is_sideways(graph: Any, node: Any, handler: Any, size: int) -> bool:
    """Returns True for a linear layer, or the placeholder of an MLP, that runs over tokens of the transposed stream.

    Its features are not a multiple of the stream's channels, and an inner axis of its input and output has the length
    of the stream.
    """
    module = node.module
    if not (isinstance(module, Placeholder) or is_linear(module)) or module not in graph.shapes:
        return False
    out = graph.is_out_channel_pruning_fn(handler) and not isinstance(module, Placeholder)
    features = module.in_features if isinstance(module, Placeholder) else module.weight.shape[0 if out else 1]
    return bool(features % size) and all(size in shape[1:-1] for shape in graph.shapes[module])


def _mapped(dep: Any, index: int, size: int) -> int | None:
    """Returns the index of a channel behind a dependency, or None if the channel does not arrive there.

    Only concatenations, splits and slices change the index. torch-pruning's mappings for reshapes are guesses, and are
    left out.
    """
    for mapping in dep.index_mapping:
        if isinstance(mapping, JOINS_AND_SPLITS) or (isinstance(mapping, SLICES) and _slices_channels(dep, size)):
            found = mapping(as_index(index))
            if not found:
                return None
            index = int(found[0].idx)
    return index


def _slices_channels(dep: Any, size: int) -> bool:
    """Returns False for a slice of an axis that cannot hold the channels, such as one of tokens.

    An axis of channels is a multiple of `size` long. If the autograd node does not hold the shape, the answer is True.
    """
    node = next(n for n in (dep.source, dep.target) if n.type == tp.ops.OPTYPE.SLICE).grad_fn
    sizes, dim = saved_sizes(node), saved_dim(node)
    # Autograd stores a negative axis as an unsigned 64-bit number: -1 is 2**64 - 1.
    return sizes is None or dim is None or int(sizes[dim if dim < 2**63 else dim - 2**64]) % size == 0
