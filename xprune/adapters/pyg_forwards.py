"""The convolutions of PyG with averaged heads, changed so that heads can be gated and removed."""

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

from xprune.modules.torch_private import has_pre_hooks


class _MeanOfHeads:
    """Mixin for a convolution of PyG that averages its heads, so that the heads can be gated and removed.

    PyG's forward averages the heads right after the aggregation, with `mean(dim=1)`. There are two problems. First, no
    layer reads the separate heads of a node, so there is no input on which gates can act. The input of the aggregation
    has a row for each edge and not for each node. Second, the mean divides by the number of remaining heads. So a
    removal would also change the factor of the heads that stay.

    If the aggregation has a hook, this class calls the aggregation a second time, with one row for each node. This
    second call returns the rows unchanged, except that the hook multiplies them by the gates. To solve the second
    problem, the class scales the heads so that the mean divides by the number of heads of the dense model.

    Attributes:
        dense_heads: Number of heads of the dense model. 0 before any head was removed.
        aggr_module: PyG's aggregation.
        node_dim: Axis of the nodes in the messages.
        heads: Number of remaining heads.
    """

    dense_heads = 0
    aggr_module: Any
    node_dim: int
    heads: int

    def aggregate(
        self, inputs: Tensor, index: Tensor, ptr: Tensor | None = None, dim_size: int | None = None
    ) -> Tensor:
        """Aggregates messages (edges, heads, channels). Returns the features of the nodes (nodes, heads, channels)."""
        # A call of `forward` runs no hooks, so the gates do not act on this call.
        out = self.aggr_module.forward(inputs, index, ptr=ptr, dim_size=dim_size, dim=self.node_dim)
        if has_pre_hooks(self.aggr_module):
            own_node = torch.arange(len(out), device=out.device)
            out = self.aggr_module(out, own_node, dim_size=len(out), dim=self.node_dim)
        # PyG calls mean(dim=1) next: sum / heads * heads / dense_heads = sum / dense_heads.
        return out * (self.heads / (self.dense_heads or self.heads))


class MeanGATConv(_MeanOfHeads, GATConv):
    """GATConv with averaged heads that can be gated and removed. See `_MeanOfHeads`."""


class MeanGATv2Conv(_MeanOfHeads, GATv2Conv):
    """GATv2Conv with averaged heads that can be gated and removed. See `_MeanOfHeads`."""


class MeanTransformerConv(_MeanOfHeads, TransformerConv):
    """TransformerConv with averaged heads that can be gated and removed. See `_MeanOfHeads`."""
