"""The dependency graph: MLP neurons of any model, found by torch-pruning (DepGraph, Fang et al., CVPR 2023).

Modules that an adapter knows are stood in for, so that the graph stays small and never has to see through an attention.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from xprune.errors import ModelError
from xprune.gates import over_features
from xprune.nest import call, map_tensors, tensors_in
from xprune.site import Cut, Site
from xprune.standin import StandIn, StandInPruner, stand_in
from xprune.structure import Removed, alias

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


class _Graph(tp.DependencyGraph):
    """torch-pruning's graph, which guesses from one flag whether a reshape flattens maps or only moves tokens.

    On torch versions whose autograd nodes do not tell sizes; a wrong guess makes index lists explode. It looks at
    linear layers with outputs of three axes; here stand-ins count too, and any number of axes above two.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tokens = False
        super().__init__()
        for module in model.modules():
            if isinstance(module, (nn.Linear, StandIn)):
                module.register_forward_hook(self._look)

    def _look(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._tokens = self._tokens or tensors_in(output)[0].dim() > 2

    @property
    def _2d_4d(self) -> bool:
        return not self._tokens

    @_2d_4d.setter
    def _2d_4d(self, _: bool) -> None:
        pass


def neuron_sites(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> list[Site]:
    """Sites of hidden neurons between two layers, outside the modules of the `known` sites (path -> site).

    A hidden layer is one whose features are written by linear layers or 1x1 convolutions, go through nothing but
    elementwise operations and norms, and are read by one layer. Raises ModelError where the forward fails.
    """
    copy, graph = trace(model, example_inputs, known)
    paths = {module: path for path, module in copy.named_modules()}
    sites = []
    for module, path in paths.items():
        if (
            isinstance(module, (nn.Linear, nn.Conv2d))
            and not isinstance(module, StandIn)
            and module in graph.module2node
        ):
            sites.append(_hidden(graph, module, path, paths))
    return [site for site in sites if site is not None]


def trace(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> tuple[Any, Any]:
    """(a copy of the model with stand-ins, its graph). Raises ModelError where the forward fails."""
    try:  # shapes are all that the graph looks at: the meta device gives them without the work
        return _trace(model, example_inputs, known, "meta")
    except Exception:  # a forward that looks at values, or one that fails
        _try_forward(model, example_inputs)
        return _trace(model, example_inputs, known, None)


def _try_forward(model: nn.Module, example_inputs: Any) -> None:
    try:
        with torch.no_grad():
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
            pruners = {StandIn: StandInPruner()}
            graph = _Graph(copy).build_dependency(copy, as_given, customized_pruners=pruners, verbose=False)
    except Exception as error:
        raise ModelError(
            f"the model's forward cannot be traced on the example inputs: {type(error).__name__}: {error}. "
            "Check that model(example_inputs) runs; data-dependent control flow cannot be traced."
        ) from error
    return copy, graph


def _hidden(graph: Any, reader: nn.Linear | nn.Conv2d, path: str, paths: Mapping[nn.Module, str]) -> Site | None:
    """The site of the features that `reader` reads, None where they are no plain hidden layer."""
    if isinstance(reader, nn.Conv2d) and (reader.groups != 1 or set(reader.kernel_size) != {1}):
        return None
    prune_in = tp.prune_conv_in_channels if isinstance(reader, nn.Conv2d) else tp.prune_linear_in_channels
    size = reader.weight.shape[1]
    cuts, probe = [Cut(f"{path}.weight", 1)], size - 1
    norms: tuple[str, ...] = ()
    for dep, idxs in graph.get_pruning_group(reader, prune_in, [probe])[1:]:
        module, kind = dep.target.module, dep.target.type
        if kind in _ENDS or [int(i) for i in idxs] != [probe] or any(mix in dep.target.name for mix in _MIXING):
            return None
        if module not in paths:
            continue  # elementwise, or the flattening inside a linear layer
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            writes = dep.handler in (tp.prune_linear_out_channels, tp.prune_conv_out_channels)
            if not writes or module.weight.shape[0] != size or getattr(module, "groups", 1) != 1:
                return None
        elif isinstance(module, _BatchNorm):
            pass  # each channel has statistics of its own, and they are cut with it
        elif over_features(module) and not norms:
            norms = (paths[module],)
        elif any(True for _ in module.parameters()):
            return None
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        cuts += [Cut(f"{paths[module]}.{name}", 0) for name, tensor in held if tensor.dim()]
    return _assemble(graph.model, reader, path, cuts, norms)


def _assemble(
    model: nn.Module, reader: nn.Linear | nn.Conv2d, path: str, cuts: list[Cut], norms: tuple[str, ...]
) -> Site | None:
    members = {cut.tensor.rpartition(".")[0] for cut in cuts}
    if len(members) < 2 or any(isinstance(model.get_submodule(member), (StandIn, Removed)) for member in members):
        return None
    owner = _common_parent(members)
    if not owner:
        return None  # spans the whole model: the residual stream, or a model that is nothing but two layers
    theirs = {f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters()}
    alone = theirs <= {cut.tensor for cut in cuts} | {f"{path}.bias"}
    alone = alone and not any(_resizes(model.get_submodule(member)) for member in members)
    size = reader.weight.shape[1]
    return Site(
        name=owner if alone else path,
        kind="neuron",
        size=size,
        width=1,
        layer=path,
        axis=1 if isinstance(reader, nn.Conv2d) else -1,
        cuts=tuple(cuts),
        module=owner if alone else "",
        norms=norms,
    )


def _resizes(layer: nn.Module) -> bool:
    """True for a convolution whose output is not as high and wide as its input."""
    if not isinstance(layer, nn.Conv2d):
        return False
    padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
    same = layer.padding == "same" or all(2 * p == k - 1 for p, k in zip(padding, layer.kernel_size, strict=True))
    return not same or set(layer.stride) != {1}


def _common_parent(paths: set[str]) -> str:
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
