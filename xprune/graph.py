"""The dependency graph: MLP neurons of any model, found by torch-pruning (DepGraph, Fang et al., CVPR 2023).

Modules that an adapter knows are stood in for, so that the graph stays small and never has to see through an attention.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning._helpers import _HybridIndex

from xprune.errors import ModelError
from xprune.gates import over_features
from xprune.nest import call, map_tensors, slow_path, tensors_in
from xprune.site import Cut, Site
from xprune.standin import StandIn, StandInPruner, stand_in
from xprune.structure import Removed, alias, is_linear

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

_MIXING = ("Softmax", "Bmm", "ScaledDotProduct", "Mean", "Sum", "Var", "LinalgVectorNorm", "Cumsum")
"""Autograd nodes that mix features or tokens, which torch-pruning takes for elementwise operations."""


_MOVES = ("View", "UnsafeView", "Reshape", "Permute", "Transpose", "Clone", "Alias", "Squeeze", "Unsqueeze")
"""Autograd nodes that move features and change none."""


class _LinearPruner(tp.function.LinearPruner):
    """Lets the graph see linear layers that are not torch's."""

    def get_in_channels(self, layer: Any) -> int:
        """Features that it reads."""
        return int(layer.weight.shape[1])

    def get_out_channels(self, layer: Any) -> int:
        """Features that it writes."""
        return int(layer.weight.shape[0])


_LINEAR = _LinearPruner()


class _Graph(tp.DependencyGraph):
    """torch-pruning's graph, which guesses from one flag whether a reshape flattens maps or only moves tokens.

    On torch versions whose autograd nodes do not tell sizes; a wrong guess makes index lists explode. It looks at
    linear layers with outputs of three axes; here stand-ins count too, and any number of axes above two.

    shapes   of the first tensor that each module takes and gives
    made     the autograd node of that tensor
    """

    def __init__(self, model: nn.Module) -> None:
        self._tokens = False
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
        if is_linear(module) or isinstance(module, StandIn):
            self._tokens = self._tokens or made[0].dim() > 2

    @property
    def _2d_4d(self) -> bool:
        return not self._tokens

    @_2d_4d.setter
    def _2d_4d(self, _: bool) -> None:
        pass


def neuron_sites(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> list[Site]:
    """Sites of hidden neurons between two layers, outside the modules of the `known` sites (path -> site).

    A hidden layer is one whose features are written by linear layers or convolutions, go through nothing but
    elementwise operations, depthwise convolutions and norms, and are read by one linear layer or 1x1 convolution, and
    by squeezes beside it. Raises ModelError where the forward fails.
    """
    try:  # shapes are all that the graph looks at: the meta device gives them without the work
        copy, graph = _trace(model, example_inputs, known, "meta")
    except Exception:  # a forward that looks at values, or one that fails
        try_forward(model, example_inputs)
        copy, graph = _trace(model, example_inputs, known, None)
    paths = {module: path for path, module in copy.named_modules()}
    sites = []
    for module, path in paths.items():
        if (is_linear(module) or isinstance(module, nn.Conv2d)) and module in graph.module2node:
            sites.append(_hidden(graph, module, path, paths))
    return [site for site in sites if site is not None]


def try_forward(model: nn.Module, example_inputs: Any) -> None:
    """ModelError where the model's forward fails on the example inputs."""
    try:
        with torch.no_grad(), slow_path():
            call(alias(model), example_inputs)
    except Exception as error:
        raise ModelError(
            f"the model's forward fails on the example inputs: {type(error).__name__}: {error}. "
            "Give inputs as the model takes them: a tensor, a tuple of arguments, or a dict of keyword arguments."
        ) from error


def _trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site], device: str | None) -> tuple[Any, Any]:
    """(a copy of the model with stand-ins, its graph)."""
    copy = alias(model, requires_grad=True, device=device)
    inputs = map_tensors(example_inputs, lambda tensor: tensor.detach().to(device))
    as_given = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)  # a bare tensor would be unpacked by rows
    try:
        stand_in(copy, inputs, known)
        with torch.enable_grad():
            pruners = {type(m): _LINEAR for m in copy.modules() if is_linear(m) and not isinstance(m, nn.Linear)}
            pruners = {StandIn: StandInPruner(), **pruners}
            graph = _Graph(copy)
            try:
                graph.build_dependency(
                    copy, as_given, customized_pruners=pruners, output_transform=_traceable, verbose=False
                )
            except (ZeroDivisionError, TypeError):
                if not getattr(graph, "module2node", None):
                    raise
                # traced, but it could not work out all indices across reshapes; `_hidden` compares widths itself
    except Exception as error:
        raise ModelError(
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


def _hidden(graph: Any, reader: Any, path: str, paths: Mapping[nn.Module, str]) -> Site | None:
    """The site of the features that `reader` reads, None where they are no plain hidden layer."""
    if isinstance(reader, nn.Conv2d) and (reader.groups != 1 or set(reader.kernel_size) != {1}):
        return None
    prune_in = graph.get_pruner_of_module(reader).prune_in_channels
    size = reader.weight.shape[1]
    axis = 1 if isinstance(reader, nn.Conv2d) else -1
    cuts, norm, probe, feeds = {f"{path}.weight": Cut(f"{path}.weight", 1)}, "", size - 1, [path]
    for dep in _reached(graph, reader, prune_in, probe):
        module = dep.target.module if dep else None
        if module is None:
            return None
        if module not in paths:
            continue  # elementwise, or the flattening inside a linear layer
        if is_linear(module) or isinstance(module, nn.Conv2d):
            apart = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels == size
            if not apart and _also_reads(graph, module, dep.handler, reader):
                feeds.append(paths[module])
                cuts[f"{paths[module]}.weight"] = Cut(f"{paths[module]}.weight", 1)
                continue
            writes = dep.handler == graph.get_pruner_of_module(module).prune_out_channels
            if not apart and (not writes or module.weight.shape[0] != size or getattr(module, "groups", 1) != 1):
                return None
        elif isinstance(module, _BatchNorm):
            pass  # each channel has statistics of its own, and they are cut with it
        elif over_features(module) and norm in ("", paths[module]):
            norm = paths[module]
        elif any(True for _ in module.parameters()):
            return None
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        cuts |= {f"{paths[module]}.{name}": Cut(f"{paths[module]}.{name}", 0) for name, tensor in held if tensor.dim()}
    return _assemble(graph, reader, path, axis, tuple(cuts.values()), norm, tuple(feeds))


def _also_reads(graph: Any, module: nn.Linear | nn.Conv2d, handler: Any, reader: nn.Module) -> bool:
    """True for a squeeze: a layer that reads the features' means over the map, beside the reader of the map itself."""
    if handler != tp.prune_conv_in_channels or not isinstance(reader, nn.Conv2d) or module.groups != 1:
        return False
    squeezed, whole = (graph.shapes.get(layer, ([], []))[0][2:] for layer in (module, reader))
    return bool(squeezed == [1, 1] and whole != [1, 1] and module.weight.shape[1] == reader.weight.shape[1])


def _reached(graph: Any, reader: nn.Module, handler: Any, probe: int) -> Iterator[Any]:
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
            idxs = [_HybridIndex(idx=probe, root_idx=probe)]
            for mapping in dep.index_mapping:
                idxs = mapping(idxs) if mapping is not None else idxs
            plain = [index.idx for index in idxs] == [probe] and dep.target.type not in _ENDS
            mixes = any(mix in dep.target.name for mix in _MIXING) and not _over_map(dep.target.grad_fn)
            if not plain or mixes:
                yield None
                return
            seen.add((dep.target, dep.handler))
            stack.append((dep.target, dep.handler))
            yield dep


def _over_map(node: Any) -> bool:
    """True for a mean over height and width, which leaves each channel to itself."""
    dims, shape = getattr(node, "_saved_dim", None), getattr(node, "_saved_self_sym_sizes", ())
    if type(node).__name__ != "MeanBackward1" or dims is None or len(shape) != 4:
        return False
    return {dim - 2**64 if dim >= 2**63 else dim for dim in dims} <= {2, 3, -1, -2}


def _assemble(
    graph: Any, reader: Any, path: str, axis: int, cuts: tuple[Cut, ...], norm: str, feeds: tuple[str, ...]
) -> Site | None:
    model = graph.model
    members = {cut.tensor.rpartition(".")[0] for cut in cuts}
    if len(members) < 2 or any(isinstance(model.get_submodule(member), (StandIn, Removed)) for member in members):
        return None
    owner = _common_parent(members)
    if not owner:
        return None  # spans the whole model: the residual stream, or a model that is nothing but two layers
    theirs = {f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters()}
    alone = theirs <= {cut.tensor for cut in cuts} | {f"{path}.bias"}
    alone = alone and _keeps_places(graph, owner, path, axis) and _gives_only(graph, owner, reader)
    return Site(
        name=owner if alone else path,
        kind="neuron",
        size=reader.weight.shape[1],
        width=1,
        layer=path,
        axis=axis,
        cuts=cuts,
        module=owner if alone else "",
        norm=norm,
        feeds=feeds,
    )


def _keeps_places(graph: Any, owner: str, path: str, axis: int) -> bool:
    """True for a module that gives as many tokens, or as large a map, as it takes and as the layer at `path` makes.

    The layer's bias can then stand in for it.
    """
    taken, given = (
        [list(shape) for shape in graph.shapes.get(graph.model.get_submodule(p), ())] for p in (owner, path)
    )
    shapes = [*taken, *given[1:]]
    if len(shapes) < 3 or min(len(shape) for shape in shapes) < 2:
        return False
    for shape in shapes:
        del shape[axis]
    return all(shape == shapes[0] for shape in shapes)


def _gives_only(graph: Any, owner: str, reader: nn.Module) -> bool:
    """True where the module gives what its last layer gives, reshaped at most; a gate or a norm after it would not."""
    node, wanted = graph.made.get(graph.model.get_submodule(owner)), graph.made.get(reader)
    while node is not None and node is not wanted and type(node).__name__.startswith(_MOVES):
        node = node.next_functions[0][0]
    return node is not None and node is wanted


def _common_parent(paths: set[str]) -> str:
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
