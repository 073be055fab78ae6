"""Counts what one model costs of each resource. torch's FlopCounterMode counts the MACs."""

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
from xprune.modules.forward import try_forward
from xprune.modules.samples import find_samples, samples_of
from xprune.modules.undisturbed import undisturbed


@undisturbed()
def count_macs(model: nn.Module, example_inputs: Any, *, batch_axis: int | None = None) -> int:
    """Counts the multiply-accumulates (MACs) of a forward pass of one sample.

    FlopCounterMode counts the operations of matrix products, convolutions and attention products on the real forward.
    One MAC is two of these operations. A sample is an image or a sentence. For a graph it is a node. Message passing
    costs one MAC for each feature of each edge that is summed up, as a matrix product with the adjacency would.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        batch_axis: The axis of the samples in the inputs. None to find it by running the model with one sample less.

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
        try_forward(model, example_inputs)  # raises the error of a forward that fails without gradients too
        raise ModelError(
            f"MACs cannot be counted: the forward fails if gradients are on: {type(problem).__name__}: {problem}."
        ) from problem


def number_of_samples(model: nn.Module, example_inputs: Any, batch_axis: int | None) -> int:
    """Finds the number of samples in the example inputs.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        batch_axis: The axis of the samples in the inputs. None to find it by running the model with one sample less.

    Raises:
        ModelError: No tensor has rows, the axis cannot be found, or no tensor has the axis given.
    """
    if not any(tensor.dim() for tensor in tensors_in(example_inputs)):
        raise ModelError("the example inputs hold no tensor with rows, so MACs per sample cannot be counted.")
    if batch_axis is None:
        found = find_samples(model, example_inputs)
        if found is None:
            try_forward(model, example_inputs)  # a forward that fails is the better explanation
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
    """Counts the parameters of a model. Tied parameters count once.

    Example:
        >>> count_params(nn.Linear(4, 6))
        30
    """
    return sum(parameter.numel() for parameter in model.parameters())


@undisturbed()
def count_resources(
    model: nn.Module, example_inputs: Any, resources: Iterable[str] = (), *, batch_axis: int | None = None
) -> dict[str, float]:
    """Measures what a model costs of each resource.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        resources: Names of resources to measure in addition to those that every run measures.
        batch_axis: The axis of the samples in the inputs. None to find it by running the model with one sample less.

    Returns:
        Name of a resource -> its cost. The cost is a whole number if the resource has no unit, such as ms.

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
            try_forward(model, example_inputs)  # raises the error of a forward that fails without gradients too
            raise ModelError(
                f"{resource.label} cannot be counted: the forward fails if gradients are on: "
                f"{type(problem).__name__}: {problem}."
            ) from problem
        found[resource.name] = cost if resource.unit else round(cost)
    return found


def by_module(resource: Resource, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
    """Measures a model and its modules, and checks what the resource returns.

    Args:
        resource: The resource, which may come from another package.
        model: A copy of the model. Its forward may write into it.
        example_inputs: The inputs that the model is called with.
        samples: The number of samples in the inputs.

    Returns:
        Path of a module -> its cost, "" for the whole model. See `Resource.by_module`.

    Raises:
        PluginError: The resource has no finite number for the whole model.
    """
    counted = resource.by_module(model, example_inputs, samples)
    if not math.isfinite(counted.get("", math.nan)):
        raise PluginError(
            f"the resource {resource.name!r} gave {counted.get('')!r} for the whole model. Its by_module has to give "
            "a finite number under the path ''."
        )
    return counted


def macs_by_module(model: nn.Module, example_inputs: Any, samples: int) -> dict[str, float]:
    """Counts the MACs of a forward pass of one sample.

    Args:
        model: A copy of the model, which may be on the meta device. Its forward may write into it.
        example_inputs: The inputs that the model is called with. They are moved to the model's device and dtype.
        samples: The number of samples in the inputs. Each gets an equal share of the MACs.

    Returns:
        Path of a module -> its MACs with those of all modules inside, "" for the whole model.
    """
    # Imported here, because it imports triton, which takes long.
    from torch.utils.flop_counter import FlopCounterMode

    device = reference_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = map_tensors(example_inputs, lambda t: t.to(device, dtype if t.is_floating_point() else None))
    # PyG sums up messages by these operations, which FlopCounterMode does not count.
    message_sums = (torch.ops.aten.scatter_add_, torch.ops.aten.scatter_add)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(message_sums, _summed_messages))
    # Without gradients nn.TransformerEncoder takes a path that counts as 0. And torch up to 2.11 does not count the
    # fused attention of CPUs.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, inputs)
    counts = {"": sum(counter.get_flop_counts().get("Global", {}).values()) / 2 / samples}
    for name, operations in counter.get_flop_counts().items():
        # Names begin with the class of the model: "ViT.blocks.0".
        counts.setdefault(name.partition(".")[2], sum(operations.values()) / 2 / samples)
    return counts


def _summed_messages(_into: Any, _dim: Any, _index: Any, source: Sequence[int], **_: Any) -> int:
    """Returns the FLOPs of messages of the shape `source`: each is multiplied by a weight and added to its node."""
    return 2 * math.prod(source)
