"""PyTorch Geometric's graph attentions. Names are PyG's; nothing of it is imported before a module is cut or gated."""

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
    """Heads of one convolution class, joined (`concat=True`) or averaged.

    name      of the adapter
    classes   qualified names of the classes served
    makes     layers whose rows belong to heads; the first reads the nodes' features
    tensors   (tensor, axis) of whatever else belongs to heads
    adds      what is added to the joined heads: tensors whose rows belong to heads where they are joined
    mixer     a layer that reads the joined heads, and how many times over; "" for none
    mean      name of the class in pyg_forwards for heads that are averaged, "" where they are joined

    Heads that are joined feed every layer that reads the convolution's output, which the model alone knows: their
    site has no layer yet. Heads that are averaged feed the aggregation; the mean goes on dividing by the dense number.
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
        """See Adapter. Imported when it is asked for, since PyG is an extra."""
        return getattr(import_module("xprune.adapters.pyg_forwards"), self.mean) if self.mean else None

    gated = pruned

    def site(self, path: str, module: nn.Module) -> Site | None:
        """See Adapter.site; None for a single head, and for heads that are put together in the other way."""
        conv: Any = module
        size, width = int(conv.heads), int(conv.out_channels)
        if size == 1 or bool(conv.concat) == bool(self.mean):
            return None
        named = [(f"{layer}.{part}", 0) for layer in self.makes for part in ("weight", "bias")]
        named += self.tensors if self.mean else (*self.tensors, *((name, 0) for name in self.adds))
        held = {
            id(part_at(conv, n)): (n, axis) for n, axis in reversed(named) if part_at(conv, n) is not None
        }  # shared: once
        named = [pair for pair in named if pair in held.values()]
        cuts = [Cut(f"{path}.{n}", axis, 1, part_at(conv, n).shape[axis] // size) for n, axis in named]
        layer, times = self.mixer if not self.mean and part_at(conv, self.mixer[0]) is not None else ("", 0)
        cuts += [Cut(f"{path}.{layer}.weight", 1, times, width)] if layer else []
        return Site(
            name=path,
            kind="head",
            size=size,
            width=1 if self.mean else width,
            consumers=(f"{path}.aggr_module",) if self.mean else ("", *([f"{path}.{layer}"] if layer else ())),
            axes=(1,) if self.mean else (),
            cuts=tuple(cuts),
            adapter=self.name,
            attributes=(f"{path}.heads",),
        )

    def resize(self, module: Any, site: Site, keep: Sequence[int]) -> None:
        """See Adapter.resize; a mean keeps in mind how many heads it was over."""
        super().resize(module, site, keep)
        if self.mean and not module.dense_heads:
            module.dense_heads = site.size


def _both(name: str, kind: str, mean: str, **parts: Any) -> tuple[GraphHeads, GraphHeads]:
    """The entries of one class: heads that are joined, and heads that are averaged."""
    classes = (f"torch_geometric.nn.conv.{kind}",)
    return GraphHeads(name, classes, **parts), GraphHeads(f"{name}-mean", classes, mean=mean, **parts)


PYG = (
    *_both(
        "pyg-gat",
        "gat_conv.GATConv",
        "MeanGATConv",
        makes=("lin", "lin_src", "lin_dst", "lin_edge"),
        tensors=(("att_src", 1), ("att_dst", 1), ("att_edge", 1)),
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
        mixer=("lin_beta", 3),
    ),
)
