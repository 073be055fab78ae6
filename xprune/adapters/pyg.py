"""The adapters of PyTorch Geometric's graph attentions. PyG is imported only for the classes of averaged heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from xprune.core.interfaces import Adapter
from xprune.core.site import Cut, Site
from xprune.modules.paths import part_at


@dataclass(frozen=True)
class GraphHeads(Adapter):
    """Describes the heads of one convolution class, either joined (`concat=True`) or averaged (`concat=False`).

    Joined heads are the convolution's output. Their consumers are the layers that read this output. Only the model
    knows them, so the site names one as "" and `find_sites` fills it in.

    Averaged heads are gated at the aggregation inside the convolution. The mean still divides by the number of heads of
    the dense model after heads were removed.

    Args:
        name: Name of the adapter.
        classes: Qualified names of the classes that are served.
        makes: Names of the layers whose rows are (heads, width). The first one reads the nodes' features.
        tensors: Pairs (tensor, axis) of other tensors with an axis of heads.
        adds: Names of tensors that are added to the joined heads. Their rows are (heads, width) if heads are joined.
        mixer: A layer whose input holds the joined heads, and how many times it holds them. ("", 0) for none.
        mean: Name of the class in `pyg_forwards` for averaged heads. "" if heads are joined.

    Example:
        >>> gat = GraphHeads("gat", ("torch_geometric.nn.conv.gat_conv.GATConv",), makes=("lin",))
        >>> conv = nn.ModuleDict({"lin": nn.Linear(8, 6, bias=False)})
        >>> conv.heads, conv.out_channels, conv.concat = 3, 2, True
        >>> site = gat.site("conv1", conv)
        >>> site.size, site.width, site.consumers
        (3, 2, ('',))
    """

    name: str
    classes: tuple[str, ...]
    makes: tuple[str, ...]
    tensors: tuple[tuple[str, int], ...] = ()
    adds: tuple[str, ...] = ()
    mixer: tuple[str, int] = ("", 0)
    mean: str = ""

    @property
    def pruned(self) -> type[nn.Module] | None:  # type: ignore[override]
        """Returns the class for averaged heads, or None for joined ones. Imports PyG, which is an optional package."""
        return getattr(import_module("xprune.adapters.pyg_forwards"), self.mean) if self.mean else None

    gated = pruned
    """The same class: averaged heads can be gated nowhere in PyG's own forward."""

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Returns the site of a convolution.

        None if it has one head only. None too if its heads are averaged and this entry is for joined ones, or the other
        way round.
        """
        conv: Any = module
        size, width = int(conv.heads), int(conv.out_channels)
        if size == 1 or bool(conv.concat) == bool(self.mean):
            return None
        named = [(f"{layer}.{part}", 0) for layer in self.makes for part in ("weight", "bias")]
        named += self.tensors if self.mean else (*self.tensors, *((name, 0) for name in self.adds))
        # PyG may use one layer for sources and targets, under two names. A tensor is cut once, under its first name.
        # The list is reversed because a later entry of a dict replaces an earlier one with the same key.
        first_names = {
            id(part_at(conv, name)): (name, axis) for name, axis in reversed(named) if part_at(conv, name) is not None
        }
        named = [pair for pair in named if pair in first_names.values()]
        cuts = [Cut(f"{path}.{name}", axis, 1, part_at(conv, name).shape[axis] // size) for name, axis in named]
        layer, times = self.mixer if not self.mean and part_at(conv, self.mixer[0]) is not None else ("", 0)
        cuts += [Cut(f"{path}.{layer}.weight", 1, times, width)] if layer else []
        return Site(
            name=path,
            kind="head",
            size=size,
            # The aggregation sees heads on an axis of their own (nodes, heads, channels), so one entry is one head.
            width=1 if self.mean else width,
            consumers=(f"{path}.aggr_module",) if self.mean else ("", *([f"{path}.{layer}"] if layer else ())),
            axes=(1,) if self.mean else (),
            cuts=tuple(cuts),
            adapter=self.name,
            attributes=(f"{path}.heads",),
        )

    def resize(self, module: Any, site: Site, keep: Sequence[int]) -> None:
        """Gives the convolution its `pruned` class. A mean also stores the number of heads of the dense model."""
        super().resize(module, site, keep)
        # At a second pruning the number is set already.
        if self.mean and not module.dense_heads:
            module.dense_heads = site.size


def _both(name: str, kind: str, mean: str, **parts: Any) -> tuple[GraphHeads, GraphHeads]:
    """Returns the two entries of one class: for joined heads and for averaged heads."""
    classes = (f"torch_geometric.nn.conv.{kind}",)
    return GraphHeads(name, classes, **parts), GraphHeads(f"{name}-mean", classes, mean=mean, **parts)


PYG = (
    *_both(
        "pyg-gat",
        "gat_conv.GATConv",
        "MeanGATConv",
        makes=("lin", "lin_src", "lin_dst", "lin_edge"),  # `lin` for one kind of nodes, otherwise `lin_src`, `lin_dst`
        tensors=(("att_src", 1), ("att_dst", 1), ("att_edge", 1)),  # each (1, heads, channels)
        adds=("bias", "res.weight"),
    ),
    *_both(
        "pyg-gatv2",
        "gatv2_conv.GATv2Conv",
        "MeanGATv2Conv",
        makes=("lin_l", "lin_r", "lin_edge"),
        tensors=(("att", 1),),
        adds=("bias", "res.weight"),
    ),
    *_both(
        "pyg-transformer",
        "transformer_conv.TransformerConv",
        "MeanTransformerConv",
        makes=("lin_key", "lin_query", "lin_value", "lin_edge"),
        adds=("lin_skip.weight", "lin_skip.bias"),
        mixer=("lin_beta", 3),  # reads heads, skip connection and their difference, side by side
    ),
)
