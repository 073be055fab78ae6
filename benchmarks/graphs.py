"""Compares criteria on graph attentions at half of the MACs, with the dense model and with random scores.

    python -m benchmarks.graphs --data DIR [--name cora-gat]

DIR holds cora.npz and mutag.npz. The MACs include the work for each edge. The result is docs/results/graphs-NAME, with
comparison.json and table.md. Each cell of the table is written when it is done, so a stopped benchmark continues.

There are five seeds. Each seed trains its own dense model, with early stopping on the validation data. Cora has its
public split. MUTAG is split at random for each seed: 128 graphs for training, 20 for validation and 40 for the test.
Test nodes and test graphs are only measured. Nothing is trained or chosen with them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATConv, TransformerConv, global_mean_pool

import xprune
from benchmarks.record import RESULTS

SEEDS = (0, 1, 2, 3, 4)


class Gat(nn.Module):
    """Two GAT layers of 8 heads, with the settings of Velickovic et al. (ICLR 2018).

    The first layer concatenates its heads. The second layer averages them.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first = GATConv(features, 8, heads=8, dropout=0.6)
        self.second = GATConv(64, classes, heads=8, concat=False, dropout=0.6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Returns logits (nodes, classes)."""
        x = F.elu(self.first(F.dropout(x, 0.6, self.training), edge_index))
        return self.second(F.dropout(x, 0.6, self.training), edge_index)


class Block(nn.Module):
    """A transformer block over a graph: attention between connected nodes, then an MLP."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attend, self.join = (
            TransformerConv(hidden_size, hidden_size // heads, heads, dropout=0.3),
            nn.Linear(hidden_size, hidden_size),
        )
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Dropout(0.5), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Maps (nodes, hidden_size) to the same shape."""
        x = x + F.dropout(self.join(self.attend(self.norm1(x), edge_index)), 0.5, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), 0.5, self.training)


class GraphTransformer(nn.Module):
    """Three transformer blocks between an embedding and a classifier.

    With `batch`, the model classifies graphs: the features of a graph are the mean over its nodes.
    """

    def __init__(self, features: int, classes: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(features, hidden_size), nn.Linear(hidden_size, classes)
        self.blocks = nn.ModuleList(Block(hidden_size, 8) for _ in range(3))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        """Returns logits (nodes, classes), or (graphs, classes) if `batch` gives the graph of each node."""
        x = self.embed(F.dropout(x, 0.5, self.training) if batch is None else x)
        for block in self.blocks:
            x = block(x, edge_index)
        return self.head(x if batch is None else global_mean_pool(x, batch))


@dataclass(frozen=True)
class Splits:
    """The training, validation and test batches of one seed."""

    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any]


def cora(data: Path, seed: int) -> Splits:
    """Returns Cora with its public split. The features of each node add up to 1."""
    pack = np.load(data / "cora.npz")
    ends, words = pack["x_indptr"], pack["x_indices"]
    x = torch.zeros(len(pack["y"]), pack["num_features"].item())
    for node, (a, b) in enumerate(pairwise(ends)):
        x[node, words[a:b]] = 1 / max(b - a, 1)
    masks = {f"{name}_mask": torch.from_numpy(pack[f"{name}_mask"]).bool() for name in ("train", "val", "test")}
    edges, labels = (torch.from_numpy(pack[name]).long() for name in ("edge_index", "y"))
    graph = Data(x=x, edge_index=edges, y=labels, **masks)
    return Splits([graph], [(graph, graph.val_mask)], [(graph, graph.test_mask)])


def mutag(data: Path, seed: int) -> Splits:
    """Returns MUTAG with a random split of its graphs."""
    pack = dict(np.load(data / "mutag.npz"))
    graphs = []
    for index, label in enumerate(pack["y"]):
        (a, b), (c, d) = pack["node_ptr"][index : index + 2], pack["edge_ptr"][index : index + 2]
        # A node is an atom of one of 7 elements.
        x = F.one_hot(torch.from_numpy(pack["x"][a:b]).long(), 7).float()
        edges = torch.from_numpy(pack["edge_index"][:, c:d]).long()
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([int(label)])))
    order = torch.randperm(len(graphs), generator=torch.Generator().manual_seed(seed)).tolist()
    train, val, test = ([graphs[i] for i in part] for part in (order[:128], order[128:148], order[148:]))
    shuffled = DataLoader(train, 32, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Splits(shuffled, DataLoader(val, 20), DataLoader(test, 40))


@dataclass(frozen=True)
class Workload:
    """A model, its data, its task, and how it is trained.

    Args:
        splits: Returns the batches of a seed, from a folder.
        build: Returns the model with random weights.
        task: The task.
        passes: Most passes over the training data.
        patience: Training stops after so many passes without a lower validation loss.
        lr: Learning rate of the dense model.
        decay: Weight decay of the dense model.
        tune: Fine-tuning after pruning, also of the dense model.
    """

    splits: Callable[[Path, int], Splits]
    build: Callable[[], nn.Module]
    task: xprune.Task
    passes: int
    patience: int
    lr: float
    decay: float
    tune: xprune.Finetune


NODES, GRAPHS = xprune.NodeClassification(), xprune.GraphClassification()
WORKLOADS = {
    "mutag-transformer": Workload(
        mutag, lambda: GraphTransformer(7, 2), GRAPHS, 60, 20, 1e-3, 5e-2, xprune.Finetune(epochs=10, lr=5e-4)
    ),
    "cora-gat": Workload(
        cora, lambda: Gat(1433, 7), NODES, 120, 40, 1e-2, 5e-4, xprune.Finetune(epochs=30, lr=3e-3, clip=None)
    ),
    "cora-transformer": Workload(
        cora, lambda: GraphTransformer(1433, 7), NODES, 60, 20, 3e-3, 5e-2, xprune.Finetune(epochs=30, lr=1e-3)
    ),
}


def dense(workload: Workload, splits: Splits, seed: int) -> nn.Module:
    """Trains a dense model and returns it with the weights of the lowest validation loss."""
    torch.manual_seed(seed)
    model, task = workload.build(), workload.task
    optimizer = torch.optim.AdamW(model.parameters(), workload.lr, weight_decay=workload.decay)
    # The paper of GAT uses Adam, whose weight decay is an L2 penalty.
    if isinstance(model, Gat):
        optimizer = torch.optim.Adam(model.parameters(), workload.lr, weight_decay=workload.decay)
    best, kept, waited = float("inf"), model.state_dict(), 0
    for _ in range(workload.passes):
        model.train()
        for batch in splits.train:
            inputs, targets = task.unpack(batch)
            optimizer.zero_grad()
            task.loss(task.forward(model, inputs), targets).backward()
            optimizer.step()
        loss = xprune.evaluate(model, splits.val, task=task).loss
        waited += 1
        if loss < best:
            best, waited, kept = loss, 0, {name: value.clone() for name, value in model.state_dict().items()}
        if waited >= workload.patience:
            break
    model.load_state_dict(kept)
    return model.eval()


def main(
    data: Annotated[Path, typer.Option(help="folder with cora.npz and mutag.npz")],
    name: Annotated[list[str] | None, typer.Option(help="a workload, can be repeated; default: all")] = None,
) -> None:
    """Runs the cells that are missing and writes a table for each workload."""
    # The models are tiny. With several threads, the threads spend their time waiting for each other.
    torch.set_num_threads(1)
    fast = {"random": "random", "magnitude": "magnitude", "taylor": "taylor"}
    criteria = {**fast, "integrated gradients": "captum:IntegratedGradients", "xpruner": "xpruner,steps=150"}
    for label in name or WORKLOADS:
        workload, folder = WORKLOADS[label], RESULTS / f"graphs-{label}"

        def case(seed: int, workload: Workload = workload) -> xprune.Case:
            splits = workload.splits(data, seed)
            return xprune.Case(dense(workload, splits, seed), splits.train, splits.test)

        grid = xprune.Grid(criteria, seeds=SEEDS, finetune=workload.tune, task=workload.task)
        settings = {"workload": label, "command": "python -m benchmarks.graphs --data DIR"}
        found = xprune.compare(case, grid, folder, metric="accuracy, test", dense="one for each seed", **settings)
        (folder / "table.md").write_text(found.markdown())


if __name__ == "__main__":
    typer.run(main)
