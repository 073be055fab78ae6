"""Finds hidden neurons of MLPs in the dependency graph.

For each linear layer and 1x1 convolution, one feature of its input is followed back through the graph. It has to come
from layers that produce as many features, through operations that keep features apart. These layers then form an MLP,
and the features between them are its neurons.
"""

from collections.abc import Mapping
from typing import Any

import torch_pruning as tp
from torch import nn

from xprune.core.site import Cut, Site
from xprune.discovery.dependency_graph import reached, trace, unknown_operation
from xprune.discovery.placeholders import Placeholder
from xprune.modules.norms import BATCH_NORMS, is_feature_norm
from xprune.modules.paths import is_linear
from xprune.modules.removed import Removed

_MOVES = ("View", "UnsafeView", "Reshape", "Permute", "Transpose", "Clone", "Alias", "Squeeze", "Unsqueeze")
"""Beginnings of the names of autograd nodes that move numbers without changing them."""


def neuron_sites(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> tuple[list[Site], dict[str, str]]:
    """Finds the hidden layers of a model outside of known modules.

    A hidden layer is produced by linear layers or convolutions. It passes only elementwise operations, depthwise
    convolutions and norms. One linear layer or 1x1 convolution consumes it. Squeeze layers, which read the means of the
    same features over the map, may consume it beside that layer.

    Args:
        model: The model. It is not changed.
        example_inputs: What the model is called with.
        known: For the path of each module that is not looked into, its site.

    Returns:
        The sites, and the reasons for layers that read a hidden layer which is no site, by the path of the layer.

    Raises:
        ModelError: The forward fails, or cannot be traced.
    """
    copy, graph = trace(model, example_inputs, known)
    paths = {module: path for path, module in copy.named_modules()}
    sites, left = list[Site](), dict[str, str]()
    for module, path in paths.items():
        if (is_linear(module) or isinstance(module, nn.Conv2d)) and module in graph.module2node:
            found = _hidden_layer(graph, module, path, paths)
            if isinstance(found, str):
                left[path] = found
            elif found is not None:
                sites.append(found)
    return sites, left


def _hidden_layer(graph: Any, consumer: Any, path: str, paths: Mapping[nn.Module, str]) -> Site | str | None:
    """Returns the site of the features that a layer reads.

    Args:
        graph: The dependency graph.
        consumer: The layer.
        path: Its path.
        paths: The path of each module of the graph's model.

    Returns:
        The site. Or a reason, if the features would be a hidden layer but pass an unknown operation or span the whole
        model. Or None if they are no hidden layer.
    """
    if isinstance(consumer, nn.Conv2d) and (consumer.groups != 1 or set(consumer.kernel_size) != {1}):
        return None
    prune_in = graph.get_pruner_of_module(consumer).prune_in_channels
    size = consumer.weight.shape[1]
    axis = 1 if isinstance(consumer, nn.Conv2d) else -1
    # The last feature is followed, because operations that shift indices shift at least the last one.
    cuts, norms, probe, consumers = {f"{path}.weight": Cut(f"{path}.weight", 1)}, set[str](), size - 1, [path]
    has_producer, unknown = False, dict[str, None]()
    for dep in reached(graph, consumer, prune_in, probe):
        module = dep.target.module if dep else None
        if module is None:
            return None
        if module not in paths:
            # torch-pruning makes a module for each operation. It is not one of the model.
            unknown |= dict.fromkeys(filter(None, [unknown_operation(dep.target, size)]))
            continue
        if is_linear(module) or isinstance(module, nn.Conv2d):
            depthwise = (
                isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels == size
            )
            if not depthwise and _is_squeeze(graph, module, dep.handler, consumer):
                consumers.append(paths[module])
                cuts[f"{paths[module]}.weight"] = Cut(f"{paths[module]}.weight", 1)
                continue
            writes = dep.handler == graph.get_pruner_of_module(module).prune_out_channels
            # A second layer reads the features, or a producer has groups or another size: no plain hidden layer.
            if not depthwise and (not writes or module.weight.shape[0] != size or getattr(module, "groups", 1) != 1):
                return None
            has_producer = has_producer or not depthwise
        elif isinstance(module, BATCH_NORMS):
            # Each channel has separate statistics, which are cut with it. Gates need nothing special.
            pass
        elif is_feature_norm(module) and norms <= {paths[module]}:
            # The statistics run over all neurons, so gates have to know this norm. One such norm is supported.
            norms.add(paths[module])
        elif any(True for _ in module.parameters()):
            return None
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        cuts |= {f"{paths[module]}.{name}": Cut(f"{paths[module]}.{name}", 0) for name, tensor in held if tensor.dim()}
    if not has_producer:
        # A norm or a depthwise convolution reads the inputs of the model. No layer produces these features.
        return None
    if not _common_parent({cut.tensor.rpartition(".")[0] for cut in cuts.values()}):
        # Layers that are children of the model itself may be its stem and its head, with the residual stream between.
        return (
            "it reads a hidden layer that spans the whole model: the layers have no module in common but the model. "
            "xprune looks at hidden layers inside one module. Put these layers, and no others, into a module such as "
            "nn.Sequential to prune them."
        )
    site = _assemble(graph, consumer, path, axis, tuple(cuts.values()), tuple(norms), tuple(consumers))
    if site is None or not unknown:
        return site
    return (
        f"its hidden neurons pass through {' and '.join(unknown)}, which may mix neurons, so no cut is known to be "
        "exact. Only operations that treat each neuron separately may lie between the layers."
    )


def _is_squeeze(graph: Any, module: nn.Linear | nn.Conv2d, handler: Any, consumer: nn.Module) -> bool:
    """Returns True for a squeeze: a convolution that reads the means of the features over the map.

    The layer has to read a map of 1x1, while the consumer reads the whole map.
    """
    if handler != tp.prune_conv_in_channels or not isinstance(consumer, nn.Conv2d) or module.groups != 1:
        return False
    squeezed, whole = (graph.shapes.get(layer, ([], []))[0][2:] for layer in (module, consumer))
    return bool(squeezed == [1, 1] and whole != [1, 1] and module.weight.shape[1] == consumer.weight.shape[1])


def _assemble(
    graph: Any,
    consumer: Any,
    path: str,
    axis: int,
    cuts: tuple[Cut, ...],
    norms: tuple[str, ...],
    consumers: tuple[str, ...],
) -> Site | None:
    """Puts the site together.

    The innermost module around all layers may hold nothing else and return what the consumer returns. Then the site is
    named after that module, and the module can be replaced once all its neurons are removed. Otherwise the site is
    named after the consumer, and a plan has to keep one neuron.

    Returns:
        The site, or None if one of the tensors belongs to a placeholder or to a module without units.
    """
    model = graph.model
    members = {cut.tensor.rpartition(".")[0] for cut in cuts}
    if any(isinstance(model.get_submodule(member), (Placeholder, Removed)) for member in members):
        return None
    owner = _common_parent(members)
    parameters = {f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters()}
    # The bias of the consumer is what remains of the module.
    replaceable = parameters <= {cut.tensor for cut in cuts} | {f"{path}.bias"}
    replaceable = (
        replaceable and _keeps_positions(graph, owner, path, axis) and _returns_output_of(graph, owner, consumer)
    )
    return Site(
        name=owner if replaceable else path,
        kind="neuron",
        size=consumer.weight.shape[1],
        width=1,
        cuts=cuts,
        module=owner if replaceable else "",
        norms=norms,
        consumers=consumers,
        axes=(axis,) * len(consumers),
    )


def _keeps_positions(graph: Any, owner: str, path: str, axis: int) -> bool:
    """Returns True if a module returns as many tokens, or as large a map, as it takes and as the layer at `path` makes.

    The bias of that layer, repeated at each position of the module's input, then has the shape of the module's output.
    """
    of_module, of_layer = (
        [list(shape) for shape in graph.shapes.get(graph.model.get_submodule(p), ())] for p in (owner, path)
    )
    # Input and output of the module, output of the layer. A module that returns no tensor has no shapes.
    shapes = [*of_module, *of_layer[1:]]
    if len(shapes) < 3 or min(len(shape) for shape in shapes) < 2:
        return False
    # The number of features may differ.
    for shape in shapes:
        del shape[axis]
    return all(shape == shapes[0] for shape in shapes)


def _returns_output_of(graph: Any, owner: str, consumer: nn.Module) -> bool:
    """Returns True if a module returns the output of its last layer, at most reshaped.

    A gate or a norm after the layer would change the bias that replaces the module.
    """
    node, wanted = graph.output_nodes.get(graph.model.get_submodule(owner)), graph.output_nodes.get(consumer)
    while node is not None and node is not wanted and type(node).__name__.startswith(_MOVES):
        node = node.next_functions[0][0]
    return node is not None and node is wanted


def _common_parent(paths: set[str]) -> str:
    """Returns the path of the innermost module around all of these, or "" if that is the model itself."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
