"""The tasks of PyTorch Geometric (PyG): one class for each node of a graph, or for each graph of a batch.

PyG is not imported. The tasks read the attributes of PyG's `Data` and `Batch` objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from xprune.core.site import Site
from xprune.core.task import checked_class_names
from xprune.errors import DataError, GateError
from xprune.modules.calls import Given
from xprune.tasks.classification import Classification
from xprune.tasks.pointwise import Pointwise


@dataclass(frozen=True)
class NodeClassification(Pointwise):
    """Classification of the nodes of a graph. The metric is the fraction of right nodes, among the nodes that count.

    A batch is a PyG `Data` object, or a pair (data, mask). It holds one graph, which is one sample. Labels are
    `data.y`, int64 (nodes,). The model returns logits (nodes, classes). The mask says which nodes count.

    If the data set is a single graph, the loader is a list with one batch. For training, `[data]` uses the nodes of
    `data.train_mask`. For a measurement, `[(data, data.test_mask)]` uses the nodes of the test set.

    Args:
        fields: The names of the attributes of the data that the model is called with, in the order of its arguments.
        mask: The name of the attribute that says which nodes count, bool (nodes,). If the batch is a pair, its mask is
            used instead.
        class_names: The names of the classes, in the order of the class indices, see `Task`.

    Raises:
        DataError: `class_names` is not a list of texts.

    Example:
        >>> from types import SimpleNamespace  # in place of torch_geometric.data.Data
        >>> graph = SimpleNamespace(x=torch.randn(3, 8), edge_index=torch.tensor([[0, 1], [1, 2]]))
        >>> graph.y, graph.train_mask = torch.tensor([0, 1, 1]), torch.tensor([True, True, False])
        >>> task = NodeClassification()
        >>> inputs, targets = task.unpack(graph)  # the model is called with x and edge_index
        >>> task.labels(targets)[0]
        tensor([0, 1])
    """

    fields: tuple[str, ...] = ("x", "edge_index")
    mask: str = "train_mask"
    class_names: Sequence[str] | None = None
    name: ClassVar[str] = "nodes"

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", checked_class_names(self.class_names))

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (values of `fields`, (labels int64 (nodes,), mask bool (nodes,))).

        Raises DataError if the batch has another form. See Task.unpack.
        """
        data, mask = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        inputs = _fields(data, (*self.fields, "y"), "data or (data, mask)")
        mask = mask if mask is not None else getattr(data, self.mask, None)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != inputs[-1].shape[:1]:
            raise DataError(
                f"which nodes count? Give data.{self.mask}, a bool tensor of shape (nodes,), or a batch (data, mask). "
                f"The data has {len(inputs[-1])} labels."
            )
        if inputs[-1].dim() != 1 or inputs[-1].is_floating_point():
            raise DataError(f"data.y has to be integers of shape (nodes,), got {tuple(inputs[-1].shape)}.")
        return inputs[:-1], (inputs[-1].long(), mask)

    def size(self, targets: Any) -> int:
        """Returns 1, since the graph is one sample. See Task.size."""
        return 1

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """Returns the whole graph, since it is one sample. See Task.example."""
        return inputs

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if outputs are not (nodes, classes), no node counts, or a label is not a class.

        See Task.check.
        """
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(targets[0]):
            raise DataError(f"the model does not return logits of shape (nodes, classes) for {len(targets[0])} nodes.")
        super().check(outputs, targets)

    def points(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the logits, labels and samples of the nodes that count. See Pointwise.points."""
        return outputs[targets[1]], *self.labels(targets)

    def labels(self, targets: Any) -> tuple[Tensor, Tensor]:
        """Returns the labels of the nodes that count, and 0 as the sample of each. See Pointwise.labels."""
        labels = targets[0][targets[1]]
        return labels, torch.zeros_like(labels)

    def width(self, outputs: Any) -> int:
        """Returns the number of classes. See Pointwise.width."""
        return int(outputs.shape[1])

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """Returns the fraction of right nodes among those that count, float (1,), since the graph is one sample."""
        logits, labels, _ = self.points(outputs, targets)
        return (logits.argmax(-1) == labels).float().mean()[None]


@dataclass(frozen=True)
class GraphClassification(Classification):
    """Classification of graphs. The metric is the accuracy.

    A batch is a PyG `Batch` object, which PyG's `DataLoader` yields. A sample is a graph. Labels are `batch.y`, int64
    (graphs,). The model returns logits (graphs, classes). In the input of a layer, a row is a node, or a graph if the
    layer comes after pooling. The gates of a graph apply to all its nodes.

    Args:
        fields: The names of the attributes of the batch that the model is called with, in the order of its arguments.
            One of them has to be "batch". This attribute says to which graph each node belongs, int64 (nodes,).
        class_names: The names of the classes, in the order of the class indices, see `Task`.

    Raises:
        DataError: "batch" is not one of the fields, or `class_names` is not a list of texts.

    Example:
        >>> from types import SimpleNamespace  # in place of torch_geometric.data.Batch
        >>> graphs = SimpleNamespace(x=torch.randn(3, 8), edge_index=torch.tensor([[0], [1]]))
        >>> graphs.batch, graphs.y = torch.tensor([0, 0, 1]), torch.tensor([1, 0])  # 2 nodes, and 1 node
        >>> inputs, labels = GraphClassification().unpack(graphs)
        >>> len(inputs), labels
        (3, tensor([1, 0]))
    """

    fields: tuple[str, ...] = ("x", "edge_index", "batch")
    class_names: Sequence[str] | None = None
    name: ClassVar[str] = "graphs"

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", checked_class_names(self.class_names))
        if "batch" not in self.fields:
            raise DataError(
                f"fields={self.fields} lacks 'batch', the attribute that says to which graph each node belongs. Add it."
            )

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (values of `fields`, labels int64 (graphs,)).

        Raises DataError if the batch has another form. See Task.unpack.
        """
        inputs = _fields(batch, (*self.fields, "y"), "a PyG Batch")
        _, labels = super().unpack((inputs, inputs[-1].view(-1)))
        return inputs[:-1], labels

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """Returns the whole batch. Some of its nodes and edges alone would not form a graph. See Task.example."""
        return inputs

    def rows(self, site: Site, inputs: Tensor, samples: int, given: Given) -> Tensor | None:
        """Returns the graph of each node, int64 (nodes,), or None if each row is a graph. See Task.rows.

        Raises:
            GateError: The model was called without `batch`. Or the number of rows is neither the number of nodes nor
                the number of graphs.
        """
        place = self.fields.index("batch")
        # The model of a user may be called with `batch` as a keyword argument.
        graph: Any = given.args[place] if place < len(given.args) else given.kwargs.get("batch")
        if not isinstance(graph, Tensor):
            raise GateError(
                f"{site.name}: the model was called without `batch`, which says to which graph each node belongs. "
                f"Call it with the fields {self.fields}, in this order."
            )
        if len(inputs) == len(graph):
            return graph
        if len(inputs) != samples:
            raise GateError(
                f"{site.name}: {len(inputs)} rows of {site.consumers[0]}'s input are neither the {len(graph)} nodes "
                f"nor the {samples} graphs of the batch. Leave the site out: find_sites(..., exclude=[{site.name!r}])."
            )
        return None


def _fields(data: Any, names: tuple[str, ...], wanted: str) -> tuple[Tensor, ...]:
    """Returns the tensors of some attributes of a batch.

    Args:
        data: The batch.
        names: The names of the attributes.
        wanted: The form that a batch should have, for the error message.

    Raises:
        DataError: An attribute is missing or not a tensor.
    """
    found = [getattr(data, name, None) for name in names]
    missing = [name for name, value in zip(names, found, strict=True) if not isinstance(value, Tensor)]
    if missing:
        raise DataError(
            f"a batch is a {type(data).__name__} without the tensor {missing[0]}. Give {wanted} with "
            f"{', '.join(names)}. Name the attributes that your model takes in fields=."
        )
    return tuple(value for value in found if isinstance(value, Tensor))
