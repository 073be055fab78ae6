"""Neurons: the hidden features of MLPs, found in the dependency graph of any model."""

from collections.abc import Mapping
from typing import Any

import torch_pruning as tp
from torch import nn

from xprune.core.site import Cut, Site
from xprune.discovery.dependency_graph import reached, trace, unknown_operation
from xprune.discovery.placeholders import Placeholder
from xprune.modules.norms import BATCH_NORMS, over_features
from xprune.modules.paths import is_linear
from xprune.modules.removed import Removed

_MOVES = ("View", "UnsafeView", "Reshape", "Permute", "Transpose", "Clone", "Alias", "Squeeze", "Unsqueeze")
"""Autograd nodes that move features and change none."""


def neuron_sites(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> tuple[list[Site], dict[str, str]]:
    """Sites of hidden neurons between two layers, outside the modules of the `known` sites (path -> site).

    A hidden layer is one whose features are written by linear layers or convolutions, go through nothing but
    elementwise operations, depthwise convolutions and norms, and are read by one linear layer or 1x1 convolution, and
    by squeezes beside it.

    Returns:
        The sites, and for the path of each layer whose features meet something unknown, what that is.

    Raises:
        ModelError: Where the forward fails, or cannot be traced.
    """
    copy, graph = trace(model, example_inputs, known)
    paths = {module: path for path, module in copy.named_modules()}
    sites, left = list[Site](), dict[str, str]()
    for module, path in paths.items():
        if (is_linear(module) or isinstance(module, nn.Conv2d)) and module in graph.module2node:
            found = _hidden(graph, module, path, paths)
            if isinstance(found, str):
                left[path] = found
            elif found is not None:
                sites.append(found)
    return sites, left


def _hidden(graph: Any, reader: Any, path: str, paths: Mapping[nn.Module, str]) -> Site | str | None:
    """The site of the features that `reader` reads, None where they are no plain hidden layer.

    Or why there is none, where they would be one but for operations that are not known to keep features apart.
    """
    if isinstance(reader, nn.Conv2d) and (reader.groups != 1 or set(reader.kernel_size) != {1}):
        return None
    prune_in = graph.get_pruner_of_module(reader).prune_in_channels
    size = reader.weight.shape[1]
    axis = 1 if isinstance(reader, nn.Conv2d) else -1
    cuts, norms, probe, feeds = {f"{path}.weight": Cut(f"{path}.weight", 1)}, set[str](), size - 1, [path]
    written, unknown = False, dict[str, None]()
    for dep in reached(graph, reader, prune_in, probe):
        module = dep.target.module if dep else None
        if module is None:
            return None
        if module not in paths:  # an operation, or a reshape
            unknown |= dict.fromkeys(filter(None, [unknown_operation(dep.target, size)]))
            continue
        if is_linear(module) or isinstance(module, nn.Conv2d):
            apart = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels == size
            if not apart and _also_reads(graph, module, dep.handler, reader):
                feeds.append(paths[module])
                cuts[f"{paths[module]}.weight"] = Cut(f"{paths[module]}.weight", 1)
                continue
            writes = dep.handler == graph.get_pruner_of_module(module).prune_out_channels
            if not apart and (not writes or module.weight.shape[0] != size or getattr(module, "groups", 1) != 1):
                return None
            written = written or not apart
        elif isinstance(module, BATCH_NORMS):
            pass  # each channel has statistics of its own, and they are cut with it
        elif over_features(module) and norms <= {paths[module]}:
            norms.add(paths[module])
        elif any(True for _ in module.parameters()):
            return None
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        cuts |= {f"{paths[module]}.{name}": Cut(f"{paths[module]}.{name}", 0) for name, tensor in held if tensor.dim()}
    if not written:
        return None  # a norm or a depthwise convolution of the model's inputs: no layer writes these features
    if not _common_parent({cut.tensor.rpartition(".")[0] for cut in cuts.values()}):
        # The layers stand on the model itself, as those do that write and read its residual stream.
        return "the hidden layer that it reads spans the whole model, and only those within one module are looked at"
    site = _assemble(graph, reader, path, axis, tuple(cuts.values()), tuple(norms), tuple(feeds))
    if site is None or not unknown:
        return site
    return f"its hidden neurons pass through {' and '.join(unknown)}, which may mix them: no cut is known to be exact"


def _also_reads(graph: Any, module: nn.Linear | nn.Conv2d, handler: Any, reader: nn.Module) -> bool:
    """True for a squeeze: a layer that reads the features' means over the map, beside the reader of the map itself."""
    if handler != tp.prune_conv_in_channels or not isinstance(reader, nn.Conv2d) or module.groups != 1:
        return False
    squeezed, whole = (graph.shapes.get(layer, ([], []))[0][2:] for layer in (module, reader))
    return bool(squeezed == [1, 1] and whole != [1, 1] and module.weight.shape[1] == reader.weight.shape[1])


def _assemble(
    graph: Any, reader: Any, path: str, axis: int, cuts: tuple[Cut, ...], norms: tuple[str, ...], feeds: tuple[str, ...]
) -> Site | None:
    model = graph.model
    members = {cut.tensor.rpartition(".")[0] for cut in cuts}
    if any(isinstance(model.get_submodule(member), (Placeholder, Removed)) for member in members):
        return None
    owner = _common_parent(members)
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
        norms=norms,
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
