"""The walk along one residual stream through the dependency graph: everything that holds its channels."""

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

WRITERS = (nn.Linear, nn.Conv2d, nn.Embedding, Placeholder)
"""What writes to a stream."""


class Refused(Exception):
    """Why the channels of a stream cannot go."""


@dataclass(frozen=True)
class _Tied(Exception):
    """Channels go together: `width` that follow one another, or those at the same place of parts of `size` each."""

    size: int
    width: int


@dataclass(frozen=True)
class Holder:
    """An operation, module or bare parameter that holds the stream.

    out        True where it writes the stream, False where it reads it; of what lets it pass, either
    size       units: channels, or fewer where some of them are tied
    width      channels of a unit that follow one another there
    sideways   a layer over another axis, to which the channels are a batch: it keeps all of its weights
    """

    node: Any
    out: bool
    size: int
    width: int
    sideways: bool = False

    @property
    def module(self) -> Any:
        """The module, parameter, or what stands for an operation."""
        return self.node.module

    @property
    def writes(self) -> bool:
        """True for a layer, embedding or placeholder that writes to the stream."""
        return isinstance(self.module, WRITERS) and self.out and not self.sideways


def holders(graph: Any, writer: nn.Module, channels: int) -> Iterator[Holder]:
    """Every holder of the channels that the writer writes, itself first; `Refused` where they meet others.

    Bounded: torch-pruning's own walk (`get_pruning_group`) multiplies indices at every wrongly guessed reshape and may
    never end. Here the last channel is followed, once along each dependency. That a reshape has put copies of the
    channels one after another shows in the lengths of the tensors that hold them, and whoever asks has to prove it.
    """
    tied, found = _Tied(channels, 1), list[Holder]()
    while True:
        found.clear()
        try:
            for holder in _walk(graph, writer, channels, tied):
                found.append(holder)
        except _Tied as wanted:
            if wanted.size > 1:
                tied = wanted
                continue
            yield from found
            raise Refused("they are joined or grouped with others so that they would all go together") from wanted
        except Refused:
            yield from found
            raise
        yield from found
        return


def _walk(graph: Any, writer: nn.Module, channels: int, tied: _Tied) -> Iterator[Holder]:
    """The holders of units that are `tied`; _Tied where others have to be, Refused where none can."""
    size, node = tied.size, graph.module2node[writer]
    stack = [(node, graph.get_pruner_of_module(writer).prune_out_channels, channels - 1, tied.width)]
    seen = {(node, stack[0][1])}
    while stack:
        node, handler, index, width = stack.pop()
        pruner, sides = graph.get_pruner_of_module(node.module), {handler: (index, width)}
        sideways = _sideways(graph, node, handler, size * width)
        if sideways:
            sides = dict.fromkeys((pruner.prune_in_channels, pruner.prune_out_channels), (index, width))
        elif getattr(node.module, "groups", 1) > 1:
            out = handler != pruner.prune_in_channels or pruner.prune_in_channels == pruner.prune_out_channels
            read, made = _grouped(node.module, tied, width, out)
            place = (index + 1) // width
            sides = {pruner.prune_in_channels: (place * read - 1, read)}
            sides[pruner.prune_out_channels] = place * made - 1, made
            seen |= {(node, side) for side in sides}
            width = made
        yield Holder(node, len(sides) > 1 or graph.is_out_channel_pruning_fn(handler), size, width, sideways)
        for dep in node.dependencies:
            side = next((known for known in sides if dep.is_triggered_by(known)), None)
            if side is None or (dep.target, dep.handler) in seen:
                continue
            index, held = sides[side]
            part = size * held
            others = range(part - 1, part * (channels // (size * tied.width)), part)  # of the parts that are tied
            mapped = next((m for i in (index, *others) if (m := _mapped(dep, i, part)) is not None), None)
            if mapped is None:
                continue
            if (mapped + 1) % part:
                raise _Tied(math.gcd(size, (mapped + 1) // held) if (mapped + 1) % held == 0 else 1, tied.width)
            seen.add((dep.target, dep.handler))
            stack.append((dep.target, dep.handler, mapped, held))


def _grouped(layer: Any, tied: _Tied, width: int, out: bool) -> tuple[int, int]:
    """Channels of a unit that a convolution of groups reads, and that it writes; a unit takes whole groups along."""
    reads, writes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    share = writes if out else reads
    if width % share:
        factor = share // math.gcd(share, width)
        raise _Tied(tied.size // factor if tied.size % factor == 0 else 1, tied.width * factor)
    return width // share * reads, width // share * writes


def _sideways(graph: Any, node: Any, handler: Any, size: int) -> bool:
    """True for a linear layer, or what stands in for an MLP, that runs over tokens of the transposed stream."""
    module = node.module
    if not (isinstance(module, Placeholder) or is_linear(module)) or module not in graph.shapes:
        return False
    out = graph.is_out_channel_pruning_fn(handler) and not isinstance(module, Placeholder)
    features = module.in_features if isinstance(module, Placeholder) else module.weight.shape[0 if out else 1]
    return bool(features % size) and all(size in shape[1:-1] for shape in graph.shapes[module])


def _mapped(dep: Any, index: int, size: int) -> int | None:
    """Where the channel is after the dependency; None for nowhere. Guesses about reshapes are left out."""
    for mapping in dep.index_mapping:
        if isinstance(mapping, JOINS_AND_SPLITS) or (isinstance(mapping, SLICES) and _of_features(dep, size)):
            found = mapping(as_index(index))
            if not found:
                return None
            index = int(found[0].idx)
    return index


def _of_features(dep: Any, size: int) -> bool:
    """False for a slice of an axis too short or too long to hold the channels, such as one of tokens."""
    node = next(n for n in (dep.source, dep.target) if n.type == tp.ops.OPTYPE.SLICE).grad_fn
    sizes, dim = saved_sizes(node), saved_dim(node)
    return sizes is None or dim is None or int(sizes[dim if dim < 2**63 else dim - 2**64]) % size == 0
