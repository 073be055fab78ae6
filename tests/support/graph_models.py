"""Small random graphs and graph networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xprune.testing import perturb

pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATConv, GATv2Conv, GPSConv, TransformerConv, global_mean_pool

CLASSES = 3


def graph(nodes=12, seed=0, label=None):
    """Returns a random graph whose labels can be learned from the node features.

    With `label`, the graph has this one label. Without, each node has a label.
    """
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(nodes, 5, generator=generator), torch.arange(nodes) % CLASSES
    x[:, :3] += 2 * F.one_hot(labels if label is None else torch.full_like(labels, label), CLASSES)
    edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
    y = labels if label is None else torch.tensor([label])
    edge_attr = torch.randn(3 * nodes, 2, generator=generator)
    return Data(x=x, edge_index=edges, y=y, train_mask=torch.arange(nodes) < 9, edge_attr=edge_attr)


def graphs():
    return [graph(4 + index % 4, index, index % CLASSES) for index in range(8)]


def batch():
    return Batch.from_data_list(graphs()[:3])


class Net(nn.Module):
    """Three graph attentions. The first two concatenate their heads, the last averages them."""

    def __init__(self, kind=GATConv, **options):
        super().__init__()
        self.conv1 = kind(5, 3, heads=4, **options)
        self.conv2 = kind(12, 4, heads=2, **options)
        self.conv3 = kind(8, CLASSES, heads=4, concat=False, **options)

    def forward(self, x, edge_index, edge_attr=None):
        edges = (edge_index,) if edge_attr is None else (edge_index, edge_attr)
        x = F.elu(self.conv1(x, *edges))
        return self.conv3(F.elu(self.conv2(F.dropout(x, 0.5, self.training), *edges)), *edges)


class Classifier(nn.Module):
    """Classifies graphs: an attention that concatenates its heads, a batch norm, pooling and an MLP."""

    def __init__(self, kind=TransformerConv):
        super().__init__()
        self.conv, self.norm = kind(5, 3, heads=4), nn.BatchNorm1d(12)
        self.mlp = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x, edge_index, batch):
        return self.mlp(global_mean_pool(self.norm(self.conv(x, edge_index)).relu(), batch))


class Gps(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lin, self.out = nn.Linear(5, 8), nn.Linear(8, CLASSES)
        self.gps = GPSConv(8, GATConv(8, 8 if options else 2, heads=4, **options), heads=2)

    def forward(self, x, edge_index, batch):
        return self.out(global_mean_pool(self.gps(self.lin(x), edge_index, batch), batch))


def built(kind, *args, **options):
    torch.manual_seed(0)
    return perturb(kind(*args, **options))


NETS = {
    "gat": (GATConv, {}),
    "gat, residual, edges": (GATConv, {"residual": True, "edge_dim": 2}),
    "gatv2": (GATv2Conv, {"residual": True}),
    "gatv2, shared, no bias": (GATv2Conv, {"share_weights": True, "bias": False}),
    "transformer, edges": (TransformerConv, {"edge_dim": 2}),
    "transformer, beta": (TransformerConv, {"beta": True}),
    "transformer, no root": (TransformerConv, {"root_weight": False, "bias": False}),
}


def inputs(name):
    data = graph()
    return (data.x, data.edge_index, data.edge_attr) if "edges" in name else (data.x, data.edge_index)
