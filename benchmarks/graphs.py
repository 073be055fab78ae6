"""Graph attentions: dense against pruned at half of the MACs, edges counted, every criterion, five seeds.

    python -m benchmarks.graphs --data DIR [--name cora-gat]

Each seed has a dense model of its own, trained with early stopping on validation. Cora has its public split; MUTAG is
split by chance, anew for each seed, into 128 graphs to train on, 20 to validate on and 40 to test on. Test nodes and
graphs train nothing and choose nothing.
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
    """Two GAT layers of 8 heads, joined and then averaged, with the settings of Velickovic et al. (ICLR 2018)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first = GATConv(features, 8, heads=8, dropout=0.6)
        self.second = GATConv(64, classes, heads=8, concat=False, dropout=0.6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits (nodes, classes)."""
        x = F.elu(self.first(F.dropout(x, 0.6, self.training), edge_index))
        return self.second(F.dropout(x, 0.6, self.training), edge_index)


class Block(nn.Module):
    """A transformer block over a graph: attention along edges, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = TransformerConv(width, width // heads, heads, dropout=0.3), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.5), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(nodes, width) to the same."""
        x = x + F.dropout(self.join(self.attend(self.norm1(x), edge_index)), 0.5, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), 0.5, self.training)


class GraphTransformer(nn.Module):
    """Three blocks between an embedding and a head; graphs, where there are several, are means over their nodes."""

    def __init__(self, features: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(features, width), nn.Linear(width, classes)
        self.blocks = nn.ModuleList(Block(width, 8) for _ in range(3))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        """Logits (nodes, classes), or (graphs, classes) where `batch` says the graph of each node."""
        x = self.embed(F.dropout(x, 0.5, self.training) if batch is None else x)
        for block in self.blocks:
            x = block(x, edge_index)
        return self.head(x if batch is None else global_mean_pool(x, batch))


@dataclass(frozen=True)
class Splits:
    """Loaders of one seed."""

    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any]


def cora(data: Path, seed: int) -> Splits:
    """Cora, its public split, features normalised by row."""
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
    """MUTAG, split by chance."""
    pack = dict(np.load(data / "mutag.npz"))
    graphs = []
    for index, label in enumerate(pack["y"]):
        (a, b), (c, d) = pack["node_ptr"][index : index + 2], pack["edge_ptr"][index : index + 2]
        x = F.one_hot(torch.from_numpy(pack["x"][a:b]).long(), 7).float()  # kinds of atoms
        edges = torch.from_numpy(pack["edge_index"][:, c:d]).long()
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([int(label)])))
    order = torch.randperm(len(graphs), generator=torch.Generator().manual_seed(seed)).tolist()
    train, val, test = ([graphs[i] for i in part] for part in (order[:128], order[128:148], order[148:]))
    shuffled = DataLoader(train, 32, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Splits(shuffled, DataLoader(val, 20), DataLoader(test, 40))


@dataclass(frozen=True)
class Workload:
    """A model, its data, its task, and how it is trained: passes at most and without improvement, rates."""

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
    """Trains with early stopping on the loss of the validation split."""
    torch.manual_seed(seed)
    model, task = workload.build(), workload.task
    optimizer = torch.optim.AdamW(model.parameters(), workload.lr, weight_decay=workload.decay)
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
    name: Annotated[list[str] | None, typer.Option(help="workloads; all where not given")] = None,
) -> None:
    """Runs the grids from where they stopped."""
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
