"""Tasks of PyTorch Geometric: a class for each node of a graph, or for each graph of a batch. PyG is not imported."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xprune.core.site import Site
from xprune.errors import DataError, GateError
from xprune.modules.calls import Given
from xprune.tasks.classification import Classification
from xprune.tasks.pointwise import Pointwise


@dataclass(frozen=True)
class NodeClassification(Pointwise):
    """A class for each node. A batch is a PyG `Data`, or (data, mask): one graph, which is one sample.

    fields   attributes of the data that the model is called with, in this order
    mask     attribute that says which nodes count, bool (nodes,); a mask given beside the data takes its place

    For a graph in one piece, loaders are lists: train on [data], which counts the nodes of `train_mask`, measure on
    [(data, data.test_mask)]. Outputs are (nodes, classes), labels `data.y` int64 (nodes,); the metric is the accuracy
    over the nodes that count.
    """

    fields: tuple[str, ...] = ("x", "edge_index")
    mask: str = "train_mask"

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """(the fields, (labels, mask)); DataError where the batch is something else."""
        data, mask = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        inputs = _fields(data, (*self.fields, "y"), "data or (data, mask)")
        mask = mask if mask is not None else getattr(data, self.mask, None)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != inputs[-1].shape[:1]:
            raise DataError(
                f"which nodes count? Wanted data.{self.mask}, bool (nodes,), or a batch of (data, mask); "
                f"the data has {len(inputs[-1])} labels."
            )
        if inputs[-1].dim() != 1 or inputs[-1].is_floating_point():
            raise DataError(f"data.y has to be integers of shape (nodes,), got {tuple(inputs[-1].shape)}.")
        return inputs[:-1], (inputs[-1].long(), mask)

    def size(self, targets: Any) -> int:
        """One: the graph."""
        return 1

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """The whole graph."""
        return inputs

    def check(self, outputs: Any, targets: Any) -> None:
        """DataError where outputs are not (nodes, classes), no node counts, or a label is out of range."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(targets[0]):
            raise DataError(f"the model does not return logits of shape (nodes, classes) for {len(targets[0])} nodes.")
        super().check(outputs, targets)

    def points(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See Pointwise.points: the nodes of the mask."""
        return outputs[targets[1]], *self.labels(targets)

    def labels(self, targets: Any) -> tuple[Tensor, Tensor]:
        """See Pointwise.labels."""
        labels = targets[0][targets[1]]
        return labels, torch.zeros_like(labels)

    def width(self, outputs: Any) -> int:
        """See Pointwise.width."""
        return int(outputs.shape[1])

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """Share of the nodes that are right, float (1,)."""
        logits, labels, _ = self.points(outputs, targets)
        return (logits.argmax(-1) == labels).float().mean()[None]


@dataclass(frozen=True)
class GraphClassification(Classification):
    """A class for each graph. A batch is a PyG `Batch`, as its `DataLoader` makes them: a sample is a graph.

    fields   attributes of the batch that the model is called with, in this order; `batch`, int64 (nodes,), is the
             graph of each node and has to be one of them

    Outputs are (graphs, classes), labels `batch.y` int64 (graphs,). A row of a layer's input is a node and belongs to
    its graph, or it is a graph.
    """

    fields: tuple[str, ...] = ("x", "edge_index", "batch")

    def __post_init__(self) -> None:
        if "batch" not in self.fields:
            raise DataError(f"fields={self.fields}: a model of graphs is called with `batch`, the graph of each node.")

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """(the fields, labels); DataError where the batch is something else."""
        inputs = _fields(batch, (*self.fields, "y"), "a PyG Batch")
        _, labels = super().unpack((inputs, inputs[-1].view(-1)))
        return inputs[:-1], labels

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """The whole batch: rows of nodes and of edges cannot be cut alike."""
        return inputs

    def rows(self, site: Site, inputs: Tensor, samples: int, given: Given) -> Tensor | None:
        """The graph of each node, or None where a row is a graph; GateError for rows of another kind."""
        graph: Tensor = given.args[self.fields.index("batch")]
        if len(inputs) == len(graph):
            return graph
        if len(inputs) != samples:
            raise GateError(
                f"{site.name}: {len(inputs)} rows of {site.consumers[0]}'s input are neither the {len(graph)} nodes "
                f"nor the {samples} graphs of the batch. Leave the site out: find_sites(..., exclude=[{site.name!r}])."
            )
        return None


def _fields(data: Any, names: tuple[str, ...], wanted: str) -> tuple[Tensor, ...]:
    found = [getattr(data, name, None) for name in names]
    missing = [name for name, value in zip(names, found, strict=True) if not isinstance(value, Tensor)]
    if missing:
        raise DataError(
            f"a batch is a {type(data).__name__} without the tensor {missing[0]}; wanted {wanted} with "
            f"{', '.join(names)}. Name what your model takes in fields=."
        )
    return tuple(value for value in found if isinstance(value, Tensor))
