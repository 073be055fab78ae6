"""Counts the cost of one model in each resource, such as MACs and parameters. MACs need torch's FlopCounterMode."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xprune.core.resource import Resource, measured_resources
from xprune.errors import ModelError, PluginError, XPruneError
from xprune.modules.calls import call, map_tensors, tensors_in
from xprune.modules.copies import reference_device, shared_copy, unwrap
from xprune.modules.forward import error_text, try_forward
from xprune.modules.samples import find_samples, samples_of
from xprune.modules.torch_private import grouped_products
from xprune.modules.undisturbed import undisturbed


@undisturbed()
def count_macs(model: nn.Module, example_inputs: Any, *, batch_axis: int | None = None) -> int:
    """Counts the multiply-accumulates (MACs) of a forward pass of one sample.

    torch's FlopCounterMode counts the operations of matrix products, convolutions and attention products while the
    model runs. One MAC is two of these operations. A sample is an image, or a sequence. For a graph, the MACs are those
    of one node. Message passing costs one MAC for each feature of each edge, as a product with the adjacency matrix
    does.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        batch_axis: The axis of the inputs along which samples lie. If None, it is found by running the model with one
            sample less.

    Returns:
        The number of MACs, rounded to an integer.

    Raises:
        ModelError: The forward fails, or the axis of the samples cannot be found.

    Example:
        >>> count_macs(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))
        36
    """
    model = unwrap(model)
    samples = number_of_samples(model, example_inputs, batch_axis)
    try:
        return round(macs_by_module(shared_copy(model, requires_grad=True), example_inputs, samples)[""])
    except XPruneError:
        raise
    except Exception as problem:
        # If the forward fails without gradients too, this raises its error.
        try_forward(model, example_inputs)
        raise ModelError(
            f"MACs cannot be counted: the forward fails if gradients are on: {error_text(problem)}."
        ) from problem


def number_of_samples(model: nn.Module, example_inputs: Any, batch_axis: int | None) -> int:
    """Returns the number of samples in the example inputs. The MACs are divided by it.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        batch_axis: The axis of the inputs along which samples lie. If None, it is found by running the model with one
            sample less.

    Raises:
        ModelError: The inputs hold no tensor with an axis. Or the axis of the samples cannot be found. Or no tensor has
            the axis `batch_axis`.
    """
    if not any(tensor.dim() for tensor in tensors_in(example_inputs)):
        raise ModelError("the example inputs hold no tensor with an axis, so MACs per sample cannot be counted.")
    if batch_axis is None:
        found = find_samples(model, example_inputs)
        if found is None:
            # If the forward fails on the inputs as they are, this raises the error, which explains more.
            try_forward(model, example_inputs)
            raise ModelError(
                f"the axis of the samples in the inputs of {type(model).__name__} cannot be found, so MACs per sample "
                "cannot be counted: give batch_axis=, 0 if samples come first, 1 if tokens come first."
            )
        return found.count
    samples = samples_of(example_inputs, batch_axis)
    if not samples:
        raise ModelError(f"batch_axis={batch_axis}: no tensor of the example inputs has samples along that axis.")
    return samples


def count_params(model: nn.Module) -> int:
    """Returns the number of parameters of a model. A tied parameter counts once.

    Example:
        >>> count_params(nn.Linear(4, 6))
        30
    """
    return sum(parameter.numel() for parameter in model.parameters())


@undisturbed()
def count_resources(
    model: nn.Module, example_inputs: Any, resources: Iterable[str] = (), *, batch_axis: int | None = None
) -> dict[str, float]:
    """Measures the cost of a model in each resource, such as MACs and parameters.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        resources: The names of further resources to measure. MACs, parameters, and other resources that are always
            measured, need not be named.
        batch_axis: The axis of the inputs along which samples lie. If None, it is found by running the model with one
            sample less.

    Returns:
        A dict: name of a resource -> cost of the model in it. The cost is a float if the resource has a unit of
        measurement, such as ms. Otherwise it is rounded to an integer.

    Raises:
        ModelError: The forward fails, or the axis of the samples cannot be found.
        BudgetError: A resource is unknown.
        PluginError: A resource gives no finite number for the whole model.

    Example:
        >>> count_resources(nn.Linear(4, 6), torch.randn(3, 4))
        {'macs': 24, 'params': 30}
    """
    model = unwrap(model)
    samples, found = number_of_samples(model, example_inputs, batch_axis), {}
    for resource in measured_resources(tuple(resources)):
        copy = shared_copy(model, requires_grad=True)
        try:
            cost = by_module(resource, copy, example_inputs, samples)[""]
        except XPruneError:
            raise
        except Exception as problem:
            # If the forward fails without gradients too, this raises its error.
            try_forward(model, example_inputs)
            raise ModelError(
                f"{resource.label} cannot be counted: the forward fails if gradients are on: {error_text(problem)}."
            ) from problem
        found[resource.name] = cost if resource.unit else round(cost)
    return found


def by_module(resource: Resource, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
    """Measures a model and its modules in one resource, and checks the result for the whole model.

    Args:
        resource: The resource. It may come from another package, so its result is checked.
        model: A copy of the model, since its forward may change it.
        example_inputs: The inputs that the model is called with.
        samples: The number of samples in the inputs.

    Returns:
        A mapping: path of a module -> its cost. The path "" is the whole model. See `Resource.by_module`.

    Raises:
        PluginError: The cost of the whole model is missing or not finite.
    """
    counted = resource.by_module(model, example_inputs, samples)
    if not math.isfinite(counted.get("", math.nan)):
        raise PluginError(
            f"the resource {resource.name!r} gave {counted.get('')!r} for the whole model. Its by_module has to give "
            "a finite number under the path ''."
        )
    return counted


def macs_by_module(model: nn.Module, example_inputs: Any, samples: int) -> dict[str, float]:
    """Counts the MACs of a forward pass of one sample, in the whole model and in each module.

    Args:
        model: A copy of the model, since its forward may change it. It may be on the meta device.
        example_inputs: The inputs that the model is called with. They are moved to the device and dtype of the model.
        samples: The number of samples in the inputs. The MACs of the forward pass are divided by it.

    Returns:
        A dict: path of a module -> its MACs, with those of the modules inside it. The path "" is the whole model.
    """
    # The import is here because it imports triton, which takes long.
    from torch.utils.flop_counter import FlopCounterMode

    device = reference_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = map_tensors(example_inputs, lambda t: t.to(device, dtype if t.is_floating_point() else None))
    # PyTorch Geometric adds up messages with these operations. FlopCounterMode does not count them.
    message_sums = (torch.ops.aten.scatter_add_, torch.ops.aten.scatter_add)
    mapping: dict[Any, Any] = dict.fromkeys(message_sums, _summed_messages)
    # Mixtures of experts use this product, which FlopCounterMode does not count.
    mapping |= dict.fromkeys(grouped_products(), _grouped_product)
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    # Without gradients, nn.TransformerEncoder uses a fast path, in which FlopCounterMode counts nothing. The math
    # backend is needed because FlopCounterMode of torch up to 2.11 does not count the fused attention of CPUs.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, inputs)
    counts = {"": sum(counter.get_flop_counts().get("Global", {}).values()) / 2 / samples}
    for name, operations in counter.get_flop_counts().items():
        # The names begin with the class of the model, as in "ViT.blocks.0". The rest is the path of the module.
        counts.setdefault(name.partition(".")[2], sum(operations.values()) / 2 / samples)
    return counts


def _grouped_product(rows: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
    """Returns the FLOPs of a product of rows with one of several matrices each, for FlopCounterMode.

    Args:
        rows: The shape (rows, inputs).
        weights: The shape (matrices, inputs, outputs).
    """
    return 2 * math.prod(rows) * weights[-1]


def _summed_messages(_into: Any, _dim: Any, _index: Any, source: Sequence[int], **_: Any) -> int:
    """Returns the FLOPs of adding up messages of the shape `source`, for FlopCounterMode.

    Each number of a message counts as one multiplication by the weight of its edge, and one addition.
    """
    return 2 * math.prod(source)
