"""Finds hidden neurons of MLPs in the dependency graph.

For each linear layer and 1x1 convolution, the last feature of its input is followed backwards through the graph. The
feature has to come from layers that produce the same number of features, and only through operations that do not mix
features. If so, these layers form an MLP, and the features between them are its neurons.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch_pruning as tp
from torch import nn

from xprune.core.site import Cut, Site
from xprune.discovery.dependency_graph import reached, trace, unknown_operation
from xprune.discovery.placeholders import Placeholder
from xprune.discovery.places import caller_of, common
from xprune.modules.norms import BATCH_NORMS, is_feature_norm
from xprune.modules.paths import input_axis, is_linear
from xprune.modules.removed import Removed

_MOVES = ("View", "UnsafeView", "Reshape", "Permute", "Transpose", "Clone", "Alias", "Squeeze", "Unsqueeze")
"""Beginnings of the names of autograd nodes that move numbers in a tensor without changing the numbers."""


def neuron_sites(model: nn.Module, example_inputs: Any, known: Mapping[str, Site]) -> tuple[list[Site], dict[str, str]]:
    """Finds the hidden layers of a model outside of known modules.

    A hidden layer is a set of features that linear layers or convolutions produce, and that one linear layer or 1x1
    convolution consumes. Between them there may be elementwise operations, depthwise convolutions and norm layers.
    Squeeze layers may consume the same features too. They read the mean of each feature over the feature map.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        known: Path of a module -> its site. The graph does not look inside these modules.

    Returns:
        (sites, reasons): a list of sites, and a dict of reasons by paths of layers. It has each layer that reads a
        hidden layer which cannot be a site.

    Raises:
        ModelError: The forward fails, or it cannot be traced.
    """
    copy, graph = trace(model, example_inputs, known)
    paths = {module: path for path, module in copy.named_modules()}
    sites, left = list[Site](), dict[str, str]()
    for module, path in paths.items():
        if (is_linear(module) or isinstance(module, nn.Conv2d)) and module in graph.module2node:
            found = _hidden_layer(graph, module, path, paths)
            if isinstance(found, str):
                left[path] = found
            elif found is not None and not any(found.consumers[0] in site.consumers for site in sites):
                sites.append(found)
    return sites, left


def _hidden_layer(graph: Any, consumer: Any, path: str, paths: Mapping[nn.Module, str]) -> Site | str | None:
    """Returns the site whose units are the input features of a layer, if these features are a hidden layer.

    Args:
        graph: The dependency graph.
        consumer: The layer.
        path: The path of the layer.
        paths: The path of each module of the model that the graph was built from.

    Returns:
        The site. Or a reason, if the features would be a hidden layer, but pass an unknown operation or span the whole
        model. Or None if the features are not a hidden layer.
    """
    if isinstance(consumer, nn.Conv2d) and (consumer.groups != 1 or set(consumer.kernel_size) != {1}):
        return None
    prune_in = graph.get_pruner_of_module(consumer).prune_in_channels
    size = consumer.weight.shape[1]
    axis = input_axis(consumer)
    # The last feature is followed, because operations that shift indices shift at least the last one.
    cuts, norms, probe, consumers = {f"{path}.weight": Cut(f"{path}.weight", 1)}, set[str](), size - 1, [path]
    has_producer, unknown = False, dict[str, None]()
    for dep in reached(graph, consumer, prune_in, probe):
        module = dep.target.module if dep else None
        if module is None:
            return None
        if module not in paths:
            # torch-pruning makes a module for each operation. Such a module does not belong to the model.
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
            if not depthwise and _reads_all(graph, module, dep.handler, size):
                consumers.append(paths[module])
                cuts[f"{paths[module]}.weight"] = Cut(f"{paths[module]}.weight", 1)
                continue
            writes = dep.handler == graph.get_pruner_of_module(module).prune_out_channels
            # Another layer reads the features, or a producer has groups or another number of features. So this is not a
            # hidden layer as xprune supports it.
            if not depthwise and (not writes or module.weight.shape[0] != size or getattr(module, "groups", 1) != 1):
                return None
            has_producer = has_producer or not depthwise
        elif isinstance(module, BATCH_NORMS):
            # Each channel has separate statistics, which are cut together with the channel. Gates need no special
            # treatment.
            pass
        elif is_feature_norm(module) and norms <= {paths[module]}:
            # The mean and variance are over all neurons, so gates have to know this norm layer. Only one is supported.
            norms.add(paths[module])
        elif any(True for _ in module.parameters()):
            return None
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        cuts |= {f"{paths[module]}.{name}": Cut(f"{paths[module]}.{name}", 0) for name, tensor in held if tensor.dim()}
    if not has_producer:
        # No layer produces these features. For example, a norm layer reads them from the inputs of the model.
        return None
    members = {cut.tensor.rpartition(".")[0] for cut in cuts.values()}
    if not _common_parent(members) and any(caller_of(graph.model, member.rpartition(".")[0]) for member in members):
        # Such layers may be the first and the last layer of the model, with the residual stream between them.
        return (
            "it reads a hidden layer that spans the whole model: only the model itself contains all of its layers. "
            "xprune looks at hidden layers inside one module. To prune this one, put its layers, and no others, into a "
            "module such as nn.Sequential."
        )
    order = {paths[module]: place for place, module in enumerate(graph.shapes) if module in paths}
    producers = {cut.tensor.rpartition(".")[0] for cut in cuts.values()} - {*consumers}
    readers = [other for other in consumers if not _is_squeezed(graph, graph.model.get_submodule(other), consumer)]
    if len(readers) > 1 and max(order[p] for p in producers if p in order) > min(order[p] for p in readers):
        # A layer adds to these features after another one has read them. So they are a residual stream.
        return None
    site = _assemble(graph, consumer, path, axis, tuple(cuts.values()), tuple(norms), tuple(consumers))
    if site is None or not unknown:
        return site
    return (
        f"its hidden neurons pass through {' and '.join(unknown)}, which may mix neurons, so no cut is known to be "
        "exact. Only operations that treat each neuron separately may lie between the layers."
    )


def _is_squeeze(graph: Any, module: nn.Linear | nn.Conv2d, handler: Any, consumer: nn.Module) -> bool:
    """Returns True for a squeeze layer: a convolution that reads the mean of each feature over the feature map.

    The layer has to read feature maps of size 1x1, while the consumer reads larger ones with the same channels.
    """
    if handler != tp.prune_conv_in_channels or not isinstance(consumer, nn.Conv2d) or module.groups != 1:
        return False
    squeezed, whole = (graph.shapes.get(layer, ([], []))[0][2:] for layer in (module, consumer))
    return bool(squeezed == [1, 1] and whole != [1, 1] and module.weight.shape[1] == consumer.weight.shape[1])


def _is_squeezed(graph: Any, module: Any, consumer: nn.Module) -> bool:
    """Returns True for a convolution that was accepted as a squeeze layer beside the consumer."""
    return module is not consumer and _is_squeeze(graph, module, tp.prune_conv_in_channels, consumer)


def _reads_all(graph: Any, module: Any, handler: Any, size: int) -> bool:
    """Returns True if a layer reads the features, and nothing else, so that it is one more consumer."""
    reads = handler == graph.get_pruner_of_module(module).prune_in_channels
    one_to_one = is_linear(module) or set(module.kernel_size) == {1}
    return bool(reads and one_to_one and module.weight.shape[1] == size and getattr(module, "groups", 1) == 1)


def _assemble(
    graph: Any,
    consumer: Any,
    path: str,
    axis: int,
    cuts: tuple[Cut, ...],
    norms: tuple[str, ...],
    consumers: tuple[str, ...],
) -> Site | None:
    """Makes the site from its parts.

    The innermost module around all layers may hold no other parameters and return the output of the consumer. Then the
    site is named after this module, and the module can be replaced after it has lost all its neurons. Otherwise the
    site is named after the consumer, and a plan has to keep at least one neuron.

    Args:
        graph: The dependency graph.
        consumer: The consumer.
        path: The path of the consumer.
        axis: The feature axis of the consumer's input.
        cuts: The cuts of the site.
        norms: The paths of the norm layers over the neurons.
        consumers: The paths of all consumers.

    Returns:
        The site, or None if one of the tensors belongs to a placeholder or to a module without units.
    """
    model: Any = graph.model
    members = {cut.tensor.rpartition(".")[0] for cut in cuts}
    if any(isinstance(model.get_submodule(member), (Placeholder, Removed)) for member in members):
        return None
    owner = _common_parent(members)
    parameters = {f"{owner}.{name}" for name, _ in model.get_submodule(owner).named_parameters()}
    # After all neurons are removed, only the bias of the consumer remains of the module.
    # The model itself cannot be replaced, and a bias is one output only.
    replaceable = bool(owner) and len(consumers) == 1
    replaceable = replaceable and parameters <= {cut.tensor for cut in cuts} | {f"{path}.bias"}
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
    """Returns True if the module `owner` returns as many tokens, or as large a feature map, as it reads. Else False.

    The layer at `path` has to return the same number of tokens too. Then the bias of this layer, repeated at each
    position of the module's input, has the shape of the module's output.
    """
    of_module, of_layer = (
        [list(shape) for shape in graph.shapes.get(graph.model.get_submodule(p), ())] for p in (owner, path)
    )
    # Three shapes: of the module's input, of its output, and of the layer's output. A module that returns no tensor has
    # no shapes.
    shapes = [*of_module, *of_layer[1:]]
    if len(shapes) < 3 or min(len(shape) for shape in shapes) < 2:
        return False
    # The number of features may differ.
    for shape in shapes:
        del shape[axis]
    return all(shape == shapes[0] for shape in shapes)


def _returns_output_of(graph: Any, owner: str, consumer: nn.Module) -> bool:
    """Returns True if the module `owner` returns the output of the consumer, possibly reshaped. Else False.

    If there is a gate or a norm layer after the consumer, the bias of the consumer cannot replace the module.
    """
    node, wanted = graph.output_nodes.get(graph.model.get_submodule(owner)), graph.output_nodes.get(consumer)
    while node is not None and node is not wanted and type(node).__name__.startswith(_MOVES):
        node = node.next_functions[0][0]
    return node is not None and node is wanted


def _common_parent(paths: set[str]) -> str:
    """Returns the path of the innermost module that contains all these paths, or "" if only the model does."""
    return reduce(common, (path.rpartition(".")[0] for path in paths))
