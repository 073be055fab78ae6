"""PyG's convolutions whose heads are averaged, with a place where a head can be gated and a divisor that stays."""

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

from xprune.modules.torch_private import has_pre_hooks


class _MeanOfHeads:
    """Where hooks look on, heads (nodes, heads, channels) pass the aggregation once more, each node by itself.

    A row is a node there, no edge. `dense_heads` is how many heads the mean was over before any went, 0 for those
    that are there.
    """

    dense_heads = 0
    aggr_module: Any
    node_dim: int
    heads: int

    def aggregate(
        self, inputs: Tensor, index: Tensor, ptr: Tensor | None = None, dim_size: int | None = None
    ) -> Tensor:
        """Messages (edges, heads, channels) to (nodes, heads, channels)."""
        out = self.aggr_module.forward(inputs, index, ptr=ptr, dim_size=dim_size, dim=self.node_dim)
        if has_pre_hooks(self.aggr_module):
            itself = torch.arange(len(out), device=out.device)
            out = self.aggr_module(out, itself, dim_size=len(out), dim=self.node_dim)
        return out * (self.heads / (self.dense_heads or self.heads))


class MeanGATConv(_MeanOfHeads, GATConv):
    """See _MeanOfHeads."""


class MeanGATv2Conv(_MeanOfHeads, GATv2Conv):
    """See _MeanOfHeads."""


class MeanTransformerConv(_MeanOfHeads, TransformerConv):
    """See _MeanOfHeads."""
