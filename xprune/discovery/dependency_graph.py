"""The dependency graph of any model that can be traced, by torch-pruning (DepGraph, Fang et al., CVPR 2023).

Modules that an adapter knows are stood in for, so that the graph stays small and never has to see through an attention.
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
from xprune.modules.copies import alias
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
"""Operations that join, split or end features: what they touch is no plain hidden layer."""


class CannotTraceError(ModelError):
    """A forward that runs and cannot be traced."""


class _LinearPruner(tp.function.LinearPruner):
    """Lets the graph see linear layers that are not torch's."""

    def get_in_channels(self, layer: Any) -> int:
        """Features that it reads."""
        return int(layer.weight.shape[1])

    def get_out_channels(self, layer: Any) -> int:
        """Features that it writes."""
        return int(layer.weight.shape[0])


_LINEAR = _LinearPruner()


class _Graph(Graph):
    """torch-pruning's graph, which guesses from one flag whether a reshape flattens maps or only moves tokens.

    On torch versions whose autograd nodes do not tell sizes; a wrong guess makes index lists explode. It looks at
    linear layers with outputs of three axes; here placeholders count too, and any number of axes above two.

    shapes   of the first tensor that each module takes and gives
    made     the autograd node of that tensor
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: dict[nn.Module, tuple[list[int], list[int]]] = {}
        self.made: dict[nn.Module, Any] = {}
        super().__init__()
        for module in model.modules():
            module.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, made = tensors_in((args, kwargs)), tensors_in(output)
        if given and made:
            self.shapes[module] = list(given[0].shape), list(made[0].shape)
            self.made[module] = made[0].grad_fn
        if is_linear(module) or isinstance(module, Placeholder):
            self.has_tokens = self.has_tokens or made[0].dim() > 2


def trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> tuple[nn.Module, Any]:
    """(a copy of the model with placeholders for the `known` sites' modules, its graph).

    Raises ModelError where the forward fails, or cannot be traced.
    """
    try:  # shapes are all that the graph looks at: the meta device gives them without the work
        return _trace(model, example_inputs, known, "meta")
    except Exception:  # a forward that looks at values, or one that fails
        try_forward(model, example_inputs)
        return _trace(model, example_inputs, known, None)


def _trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site], device: str | None) -> tuple[Any, Any]:
    """(a copy of the model with placeholders, its graph)."""
    copy = alias(model, requires_grad=True, device=device)
    inputs = map_tensors(example_inputs, lambda tensor: tensor.detach().to(device))
    as_given = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)  # a bare tensor would be unpacked by rows
    try:
        put_placeholders(copy, inputs, known)
        with torch.enable_grad():
            pruners = {type(m): _LINEAR for m in copy.modules() if is_linear(m) and not isinstance(m, nn.Linear)}
            pruners = {Placeholder: PlaceholderPruner(), JoiningPlaceholder: JoiningPlaceholderPruner(), **pruners}
            graph = _Graph(copy)
            try:
                graph.build_dependency(
                    copy,
                    as_given,
                    forward_fn=call,  # its own way of calling swallows Ctrl-C
                    customized_pruners=pruners,
                    output_transform=_traceable,
                    verbose=False,
                )
            except (ZeroDivisionError, TypeError):
                if not getattr(graph, "module2node", None):
                    raise
                # traced, but it could not work out all indices across reshapes; who walks it compares widths
    except Exception as error:
        raise CannotTraceError(
            f"the model's forward cannot be traced on the example inputs: {type(error).__name__}: {error}. "
            "Check that model(example_inputs) runs; data-dependent control flow cannot be traced."
        ) from error
    return copy, graph


def _traceable(output: Any) -> list[Tensor]:
    """The tensors of the model's output that lead back to its layers; ValueError for none."""
    found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
    if not found:
        raise ValueError("its output holds no tensor with a gradient")
    return found


def reached(graph: Any, reader: nn.Module, handler: Any, probe: int) -> Iterator[Any]:
    """What loses the feature `probe` with the reader's input, each once; None, and the end, where it is no feature.

    torch-pruning's own walk (`get_pruning_group`) lets a wrongly guessed reshape multiply the indices at every step
    and may never end. Here one index goes in and one has to come out of each dependency.
    """
    stack, seen = [(graph.module2node[reader], handler)], {(graph.module2node[reader], handler)}
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
    """What the operation at a node of the graph does, where it is not known to keep features apart; "" where it is."""
    if not _is_operation(node) or keeps_apart(node.grad_fn, features):
        return ""
    inside = name_of(node.grad_fn) in PRODUCTS and all(
        is_linear(user.module) and name_of(user.grad_fn) not in PRODUCTS for user in node.outputs
    )
    return "" if inside else name_of(node.grad_fn)  # a linear layer makes its product between two reshapes


def _is_operation(node: Any) -> bool:
    return bool(node.type == tp.ops.OPTYPE.ELEMENTWISE)
