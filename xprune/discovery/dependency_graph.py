"""Builds the dependency graph of a model with torch-pruning (DepGraph, Fang et al., CVPR 2023) and follows features.

The graph answers one question: if this layer loses a feature, which other layers lose it too? torch-pruning runs the
model once and reads the autograd graph of its outputs. Each layer, bare parameter and operation becomes a node. A node
has two ends: its inputs and its outputs. It also has a pruner, an object of torch-pruning. The methods
`prune_in_channels` and `prune_out_channels` of the pruner serve as names of the two ends. An edge, called dependency,
leads from one end of a node to one end of a neighbour. It has

- `trigger`: the end of the source node that loses a feature first,
- `handler`: the end of the target node that then loses the feature,
- `index_mapping`: functions that turn indices at the source into indices at the target. They are needed for torch.cat,
  for example.

xprune only reads the graph. It never prunes with it, because torch-pruning guesses the effect of reshapes and
attentions. Modules whose sites are known are replaced by placeholders before the graph is built, see `placeholders`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from xprune.core.site import Site
from xprune.discovery.operations import PRODUCTS, ends, keeps_apart, name_of
from xprune.discovery.placeholders import (
    JoiningPlaceholder,
    JoiningPlaceholderPruner,
    Placeholder,
    PlaceholderPruner,
    put_placeholders,
)
from xprune.discovery.torch_pruning_private import Graph, as_index
from xprune.errors import ModelError
from xprune.modules.calls import call, map_tensors, tensors_in
from xprune.modules.copies import shared_copy
from xprune.modules.forward import devices_for_shapes, error_text, try_forward
from xprune.modules.paths import is_linear

_ENDS = {
    tp.ops.OPTYPE.CONCAT,
    tp.ops.OPTYPE.SPLIT,
    tp.ops.OPTYPE.UNBIND,
    tp.ops.OPTYPE.EXPAND,
    tp.ops.OPTYPE.SLICE,
    tp.ops.OPTYPE.PARAMETER,
    tp.ops.OPTYPE.OUTPUT,
}
"""Kinds of nodes at which a hidden layer ends: operations that join or split features, and the ends of the model."""


class CannotTraceError(ModelError):
    """Raised for a model whose forward runs but cannot be traced. Such a model gets no dependency graph."""


class _LinearPruner(tp.function.LinearPruner):
    """Tells torch-pruning the sizes of linear layers that are not of the class nn.Linear, read from their weights."""

    def get_in_channels(self, layer: Any) -> int:
        """Returns the number of features that the layer reads."""
        return int(layer.weight.shape[1])

    def get_out_channels(self, layer: Any) -> int:
        """Returns the number of features that the layer writes."""
        return int(layer.weight.shape[0])


_LINEAR = _LinearPruner()


class _Graph(Graph):
    """The graph of torch-pruning, plus the shapes and autograd nodes of all modules, with one correction.

    The correction concerns reshapes. In some versions of torch, autograd nodes do not hold shapes. Then torch-pruning
    has one flag (`_2d_4d`) for the whole model. The flag says what every reshape of the model does: it flattens feature
    maps, or it rearranges tokens. If the flag is wrong, the lists of indices of the pruning groups become huge.
    torch-pruning decides for tokens if an nn.Linear has an output with three axes. This class decides for tokens if any
    linear layer, or any `Placeholder`, has an output with more than two axes.

    Attributes:
        shapes: For each module, (shape of its first input tensor, shape of its first output tensor).
        output_nodes: For each module, the autograd node of its first output tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: dict[nn.Module, tuple[list[int], list[int]]] = {}
        self.output_nodes: dict[nn.Module, Any] = {}
        super().__init__()
        for module in model.modules():
            module.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Notes the shapes and the autograd node of a module after its forward. A forward hook."""
        given, returned = tensors_in((args, kwargs)), tensors_in(output)
        if given and returned:
            self.shapes[module] = list(given[0].shape), list(returned[0].shape)
            self.output_nodes[module] = returned[0].grad_fn
        if is_linear(module) or isinstance(module, Placeholder):
            self.has_tokens = self.has_tokens or returned[0].dim() > 2


def trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> tuple[nn.Module, Any]:
    """Builds the dependency graph of a model, in which discovery follows features.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        known: Path of a module -> its site. A placeholder replaces each of these modules.

    Returns:
        (copy of the model with placeholders, dependency graph of this copy).

    Raises:
        CannotTraceError: The forward runs but cannot be traced.
        ModelError: The forward fails.
    """
    first, second = devices_for_shapes(model, example_inputs)
    try:
        return _trace(model, example_inputs, known, first)
    except Exception:
        # The control flow of the forward depends on values of tensors, or the forward fails on any device. In the
        # second case, `try_forward` raises a ModelError.
        try_forward(model, example_inputs)
        return _trace(model, example_inputs, known, second)


def _trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site], device: str | None) -> tuple[Any, Any]:
    """Returns (copy of the model with placeholders, its dependency graph).

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        known: Path of a module -> its site. A placeholder replaces each of these modules.
        device: The device of the copy. If None, it is the device of the model.

    Raises:
        CannotTraceError: The forward cannot be traced.
    """
    # torch-pruning follows gradients, so frozen weights would be missing from the graph.
    copy = shared_copy(model, requires_grad=True, device=device)
    inputs = map_tensors(example_inputs, lambda tensor: tensor.detach().to(device))
    # torch-pruning documents a tuple or a dict. It may unpack a bare tensor along its first axis.
    as_given = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)
    try:
        put_placeholders(copy, inputs, known)
        with torch.enable_grad():
            # torch-pruning finds a pruner by the exact class of a module.
            pruners = {type(m): _LINEAR for m in copy.modules() if is_linear(m) and not isinstance(m, nn.Linear)}
            pruners = {Placeholder: PlaceholderPruner(), JoiningPlaceholder: JoiningPlaceholderPruner(), **pruners}
            graph = _Graph(copy)
            try:
                graph.build_dependency(
                    copy,
                    as_given,
                    # Without `forward_fn`, torch-pruning calls the model inside a bare `except`, which would ignore
                    # Ctrl-C.
                    forward_fn=call,
                    customized_pruners=pruners,
                    output_transform=_traceable,
                    verbose=False,
                )
            except (ZeroDivisionError, TypeError):
                # The nodes exist, but torch-pruning failed to compute indices at a reshape. This is enough: the
                # functions that follow the graph compare numbers of features, and prove what they find.
                if not getattr(graph, "module2node", None):
                    raise
    except Exception as error:
        raise CannotTraceError(
            f"the model's forward cannot be traced on the example inputs: {error_text(error)}. "
            "Check that the outputs of model(example_inputs) depend on the weights through autograd: without detach(), "
            "torch.no_grad() or control flow that depends on values. Modules that adapters know need no trace."
        ) from error
    return copy, graph


def _traceable(output: Any) -> list[Tensor]:
    """Returns the tensors of the model's output from which autograd leads back to layers.

    Raises:
        ValueError: There is no such tensor.
    """
    found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
    if not found:
        raise ValueError("its output holds no tensor with a gradient")
    return found


def reached(graph: Any, consumer: nn.Module, handler: Any, probe: int) -> Iterator[Any]:
    """Follows one feature from the input of a layer to all nodes that lose it too.

    torch-pruning has a similar method, `get_pruning_group`. After a reshape that it guesses wrongly, the number of
    indices grows at each step, and the method may never end. Here, a single index is followed. If a dependency does not
    turn it into the same single index, the walk stops.

    Args:
        graph: The dependency graph.
        consumer: The layer at which the walk starts.
        handler: The end of that layer at which the walk starts: `prune_in_channels` of its pruner.
        probe: The index of the feature.

    Yields:
        Each dependency that the feature reaches, once. If the feature reaches something at which a hidden layer ends,
        such as torch.cat, an attention or the output of the model, None comes last.
    """
    stack, seen = [(graph.module2node[consumer], handler)], {(graph.module2node[consumer], handler)}
    while stack:
        node, handler = stack.pop()
        for dep in node.dependencies:
            if not dep.is_triggered_by(handler) or (dep.target, dep.handler) in seen:
                continue
            idxs = as_index(probe)
            try:
                for mapping in dep.index_mapping:
                    idxs = mapping(idxs) if mapping is not None else idxs
            except (IndexError, TypeError):
                # torch-pruning guesses the effect of some reshapes wrongly, and its mapping does not know this index.
                yield None
                return
            plain = [index.idx for index in idxs] == [probe] and dep.target.type not in _ENDS
            if not plain or (_is_operation(dep.target) and ends(dep.target.grad_fn)):
                yield None
                return
            seen.add((dep.target, dep.handler))
            stack.append((dep.target, dep.handler))
            yield dep


def unknown_operation(node: Any, features: int) -> str:
    """Returns the name of an operation that may mix features, or "" if the node is known not to mix them.

    Args:
        node: A node of the graph.
        features: The number of features that pass through the node.
    """
    if not _is_operation(node) or keeps_apart(node.grad_fn, features):
        return ""
    # With inputs of three axes, a linear layer runs as a reshape, a product and a reshape. In the graph, the node of
    # the layer is the last reshape, and the product before it is a separate node. Such a product belongs to the layer,
    # so it is not an unknown operation. If the node of a layer is itself a product, a further product before it is an
    # unknown operation.
    inside = name_of(node.grad_fn) in PRODUCTS and all(
        is_linear(user.module) and name_of(user.grad_fn) not in PRODUCTS for user in node.outputs
    )
    return "" if inside else name_of(node.grad_fn)


def _is_operation(node: Any) -> bool:
    """Returns True for a node without a layer.

    torch-pruning gives each operation that it does not know the type ELEMENTWISE.
    """
    return bool(node.type == tp.ops.OPTYPE.ELEMENTWISE)
