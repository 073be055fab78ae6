"""PyG's convolutions with averaged heads, changed so that a head can be gated and the mean's divisor stays."""

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

from xprune.modules.torch_private import has_pre_hooks


class _MeanOfHeads:
    """Mixin for a convolution that averages its heads.

    PyG's forward averages the heads right after the aggregation, with `mean(dim=1)`. No layer reads the separate heads
    of a node, so there is no input to gate: the aggregation itself reads a row for each edge. The mean also divides by
    the number of heads that are left, so it changes by more than the removed heads.

    If a hook is on the aggregation, this class calls the aggregation a second time, with one row for each node. Each
    node gets its own row back, times the gates. The class also scales the heads so that the mean divides by the number
    of heads of the dense model.

    Attributes:
        dense_heads: Number of heads of the dense model. 0 before any head was removed.
        aggr_module: PyG's aggregation.
        node_dim: Axis of the nodes in the messages.
        heads: Number of heads that are left.
    """

    dense_heads = 0
    aggr_module: Any
    node_dim: int
    heads: int

    def aggregate(
        self, inputs: Tensor, index: Tensor, ptr: Tensor | None = None, dim_size: int | None = None
    ) -> Tensor:
        """Aggregates messages (edges, heads, channels) to nodes (nodes, heads, channels)."""
        # .forward, so that the hooks of a gate do not see this call.
        out = self.aggr_module.forward(inputs, index, ptr=ptr, dim_size=dim_size, dim=self.node_dim)
        if has_pre_hooks(self.aggr_module):
            own_node = torch.arange(len(out), device=out.device)
            out = self.aggr_module(out, own_node, dim_size=len(out), dim=self.node_dim)
        # mean(dim=1) follows: sum / heads * heads / dense_heads = sum / dense_heads.
        return out * (self.heads / (self.dense_heads or self.heads))


class MeanGATConv(_MeanOfHeads, GATConv):
    """GATConv with averaged heads that can be gated and removed. See `_MeanOfHeads`."""


class MeanGATv2Conv(_MeanOfHeads, GATv2Conv):
    """GATv2Conv with averaged heads that can be gated and removed. See `_MeanOfHeads`."""


class MeanTransformerConv(_MeanOfHeads, TransformerConv):
    """TransformerConv with averaged heads that can be gated and removed. See `_MeanOfHeads`."""
