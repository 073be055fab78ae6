"""Builds the dependency graph of a model with torch-pruning (DepGraph, Fang et al., CVPR 2023) and follows features.

The graph answers one question: if this layer loses a feature, which other layers lose it, too? torch-pruning runs the
model once and reads the autograd graph of its outputs. Each layer, bare parameter and operation becomes a node. A node
has two ends, its inputs and its outputs, and a pruner. The methods `prune_in_channels` and `prune_out_channels` of the
pruner name the ends. An edge, called dependency, leads from one end of a node to one end of a neighbour. It has

- `trigger`: the end of the source node at which the loss starts,
- `handler`: the end of the target node that then loses features,
- `index_mapping`: functions that turn indices of the source into indices of the target, as after torch.cat.

xprune only reads the graph. It never prunes through it, because torch-pruning guesses at reshapes and attentions.
Modules that are known already become placeholders before the graph is built, see `placeholders`.
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
from xprune.modules.forward import try_forward
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
"""Operations that join or split features, and the ends of the model. Features that meet them are no hidden layer."""


class CannotTraceError(ModelError):
    """Raised for a model whose forward runs but cannot be traced. Such a model has no dependency graph."""


class _LinearPruner(tp.function.LinearPruner):
    """A pruner for linear layers of other classes than nn.Linear. It reads the sizes from the weight."""

    def get_in_channels(self, layer: Any) -> int:
        """Returns the number of features that the layer reads."""
        return int(layer.weight.shape[1])

    def get_out_channels(self, layer: Any) -> int:
        """Returns the number of features that the layer writes."""
        return int(layer.weight.shape[0])


_LINEAR = _LinearPruner()


class _Graph(Graph):
    """The graph of torch-pruning, with the shapes and autograd nodes of all modules, and one guess corrected.

    The guess: on torch versions whose autograd nodes do not hold shapes, one flag (`_2d_4d`) says for the whole model
    whether a reshape flattens maps or only moves tokens. A wrong flag makes lists of indices explode. torch-pruning
    takes the model for one of tokens if an nn.Linear has an output of three axes. Here, any linear layer and any
    placeholder counts, and any number of axes above two.

    Attributes:
        shapes: For each module, the shapes of the first tensor that it takes and of the first that it returns.
        output_nodes: For each module, the autograd node of the first tensor that it returns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: dict[nn.Module, tuple[list[int], list[int]]] = {}
        self.output_nodes: dict[nn.Module, Any] = {}
        super().__init__()
        for module in model.modules():
            module.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Notes shapes and autograd node of a module, after its forward. A forward hook."""
        given, returned = tensors_in((args, kwargs)), tensors_in(output)
        if given and returned:
            self.shapes[module] = list(given[0].shape), list(returned[0].shape)
            self.output_nodes[module] = returned[0].grad_fn
        if is_linear(module) or isinstance(module, Placeholder):
            self.has_tokens = self.has_tokens or returned[0].dim() > 2


def trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> tuple[nn.Module, Any]:
    """Builds the dependency graph of a model.

    Args:
        model: The model. It is not changed.
        example_inputs: What the model is called with.
        known: For the path of each module that becomes a placeholder, its site.

    Returns:
        A copy of the model with placeholders, and the graph of this copy.

    Raises:
        CannotTraceError: The forward runs but cannot be traced.
        ModelError: The forward fails.
    """
    # The graph needs shapes only. On the meta device, tensors have shapes and no values, so the forward costs nothing.
    try:
        return _trace(model, example_inputs, known, "meta")
    except Exception:
        # The forward looks at values, or it fails on any device. `try_forward` raises a ModelError in the second case.
        try_forward(model, example_inputs)
        return _trace(model, example_inputs, known, None)


def _trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site], device: str | None) -> tuple[Any, Any]:
    """Returns a copy of the model with placeholders, and its graph. `device` None is the device of the model."""
    # torch-pruning follows gradients, so frozen weights would be missing from the graph.
    copy = shared_copy(model, requires_grad=True, device=device)
    inputs = map_tensors(example_inputs, lambda tensor: tensor.detach().to(device))
    # A tuple or dict, as torch-pruning documents. It may unpack a bare tensor along its first axis.
    as_given = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)
    try:
        put_placeholders(copy, inputs, known)
        with torch.enable_grad():
            # torch-pruning looks pruners up by the exact class of a module.
            pruners = {type(m): _LINEAR for m in copy.modules() if is_linear(m) and not isinstance(m, nn.Linear)}
            pruners = {Placeholder: PlaceholderPruner(), JoiningPlaceholder: JoiningPlaceholderPruner(), **pruners}
            graph = _Graph(copy)
            try:
                graph.build_dependency(
                    copy,
                    as_given,
                    # The call of torch-pruning has a bare `except`, which would swallow Ctrl-C.
                    forward_fn=call,
                    customized_pruners=pruners,
                    output_transform=_traceable,
                    verbose=False,
                )
            except (ZeroDivisionError, TypeError):
                # The nodes are there, but torch-pruning failed at the indices across a reshape. That is enough: those
                # who follow the graph compare widths and prove what they find.
                if not getattr(graph, "module2node", None):
                    raise
    except Exception as error:
        raise CannotTraceError(
            f"the model's forward cannot be traced on the example inputs: {type(error).__name__}: {error}. "
            "Check that the outputs of model(example_inputs) depend on the weights through autograd: without detach(), "
            "torch.no_grad() or control flow that depends on values. Modules that adapters know need no trace."
        ) from error
    return copy, graph


def _traceable(output: Any) -> list[Tensor]:
    """Returns the tensors of the model's output that lead back to its layers, or raises ValueError if there is none."""
    found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
    if not found:
        raise ValueError("its output holds no tensor with a gradient")
    return found


def reached(graph: Any, consumer: nn.Module, handler: Any, probe: int) -> Iterator[Any]:
    """Follows one feature from the input of a layer to everything that loses it, too.

    torch-pruning also has a walk, `get_pruning_group`. A reshape that it guesses wrongly multiplies the indices at each
    step, and the walk may never end. Here, a single index is followed. Each dependency has to turn it into the same
    single index, otherwise the walk stops.

    Args:
        graph: The dependency graph.
        consumer: The layer at which the walk starts.
        handler: The end of that layer: `prune_in_channels` of its pruner.
        probe: The index of the feature.

    Yields:
        Each dependency that the feature reaches, once. None as the last item if the feature meets something at which a
        hidden layer ends, such as torch.cat, an attention or the output of the model.
    """
    stack, seen = [(graph.module2node[consumer], handler)], {(graph.module2node[consumer], handler)}
    while stack:
        node, handler = stack.pop()
        for dep in node.dependencies:
            if not dep.is_triggered_by(handler) or (dep.target, dep.handler) in seen:
                continue
            idxs = as_index(probe)
            for mapping in dep.index_mapping:
                idxs = mapping(idxs) if mapping is not None else idxs
            plain = [index.idx for index in idxs] == [probe] and dep.target.type not in _ENDS
            if not plain or (_is_operation(dep.target) and ends(dep.target.grad_fn)):
                yield None
                return
            seen.add((dep.target, dep.handler))
            stack.append((dep.target, dep.handler))
            yield dep


def unknown_operation(node: Any, features: int) -> str:
    """Returns the name of an operation that may mix features, or "" if the node is known to keep them apart.

    Args:
        node: A node of the graph.
        features: The number of features that pass through it.
    """
    if not _is_operation(node) or keeps_apart(node.grad_fn, features):
        return ""
    # A linear layer on inputs of three axes runs as reshape, product, reshape. The graph has the layer at the last
    # reshape, and the product in front of it as a separate node. That product is the layer itself and does not count.
    # If the node of a layer is a product, it is the whole layer. Another product in front of it does count.
    inside = name_of(node.grad_fn) in PRODUCTS and all(
        is_linear(user.module) and name_of(user.grad_fn) not in PRODUCTS for user in node.outputs
    )
    return "" if inside else name_of(node.grad_fn)


def _is_operation(node: Any) -> bool:
    """Returns True for a node without a layer. torch-pruning takes each operation it does not know for elementwise."""
    return bool(node.type == tp.ops.OPTYPE.ELEMENTWISE)
