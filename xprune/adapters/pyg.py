"""The adapters for the graph attentions of PyTorch Geometric (PyG). Only averaged heads need an import of PyG."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from xprune.core.interfaces import Adapter
from xprune.core.registry import imported
from xprune.core.site import Cut, Site
from xprune.modules.paths import part_at


@dataclass(frozen=True)
class GraphHeads(Adapter):
    """Describes the heads of a convolution class of PyG: concatenated (`concat=True`) or averaged (`concat=False`).

    With `concat=True`, the output of the convolution is the concatenated heads. Their consumers are the layers of the
    model that read this output. The adapter cannot know these layers, so the site names the consumer "", and
    `find_sites` replaces "" by the layers that it finds.

    With `concat=False`, the convolution returns the mean over its heads. Gates act inside the convolution, on its
    aggregation. After heads were removed, the mean still divides by the number of heads of the dense model.

    Args:
        name: Name of the adapter.
        classes: Full names of the classes that the adapter describes.
        makes: Names of the layers whose rows have the order (heads, width). The first layer reads the features of the
            nodes.
        tensors: Pairs (tensor, axis) of other tensors that have one entry, or several, for each head along this axis.
        adds: Names of tensors that are added to the output of the heads. If the heads are concatenated, the rows of
            these tensors have the order (heads, width).
        mixer: Pair (name of a layer, number). The input of this layer holds the concatenated heads so many times, one
            after the other. ("", 0) if there is no such layer.
        mean: Name of the class in `pyg_forwards` for averaged heads. "" if the heads are concatenated.

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
        """Returns the class for averaged heads, and imports PyG for it. None if the heads are concatenated."""
        return imported(f"xprune.adapters.pyg_forwards:{self.mean}") if self.mean else None

    gated = pruned
    """The same class, because no layer in PyG's forward has the averaged heads as its input."""

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Returns the site of a convolution, or None if this adapter does not fit it.

        The adapter does not fit if the convolution has only one head. It also does not fit if the heads are averaged
        and the adapter is for concatenated heads, or the reverse.
        """
        conv: Any = module
        size, width = int(conv.heads), int(conv.out_channels)
        if size == 1 or bool(conv.concat) == bool(self.mean):
            return None
        named = [(f"{layer}.{part}", 0) for layer in self.makes for part in ("weight", "bias")]
        named += self.tensors if self.mean else (*self.tensors, *((name, 0) for name in self.adds))
        # PyG may use one layer for the sources and for the targets of edges. Then the layer has two names. The tensor
        # must be cut only once, under its first name. The list is reversed because a later entry of a dict replaces an
        # earlier one with the same key.
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
            # The gated call of the aggregation has an input (nodes, heads, channels): one entry of axis 1 is one head.
            width=1 if self.mean else width,
            consumers=(f"{path}.aggr_module",) if self.mean else ("", *([f"{path}.{layer}"] if layer else ())),
            axes=(1,) if self.mean else (),
            cuts=tuple(cuts),
            adapter=self.name,
            attributes=(f"{path}.heads",),
        )

    def resize(self, module: Any, site: Site, keep: Sequence[int]) -> None:
        """Makes the module an instance of `self.pruned`, if there is such a class.

        If the heads are averaged, the module also gets the number of heads of the dense model: the average still
        divides by it.
        """
        super().resize(module, site, keep)
        # If the convolution was pruned before, the number is already stored.
        if self.mean and not module.dense_heads:
            module.dense_heads = site.size


def _both(name: str, kind: str, mean: str, **parts: Any) -> tuple[GraphHeads, GraphHeads]:
    """Returns the two adapters for one class: for concatenated heads, and for averaged heads."""
    classes = (f"torch_geometric.nn.conv.{kind}",)
    return GraphHeads(name, classes, **parts), GraphHeads(f"{name}-mean", classes, mean=mean, **parts)


PYG = (
    *_both(
        "pyg-gat",
        "gat_conv.GATConv",
        "MeanGATConv",
        # A module has either `lin`, or `lin_src` and `lin_dst` if the sources and targets of edges are different nodes.
        makes=("lin", "lin_src", "lin_dst", "lin_edge"),
        tensors=(("att_src", 1), ("att_dst", 1), ("att_edge", 1)),  # each has the shape (1, heads, channels)
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
        # The input of lin_beta is the heads, the skip connection and the difference of the two, concatenated.
        mixer=("lin_beta", 3),
    ),
)
