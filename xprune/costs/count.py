"""Counts: what one model costs of each resource. MACs by torch's FlopCounterMode."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xprune.core.resource import Resource, measured_resources
from xprune.errors import ModelError, PluginError, XPruneError
from xprune.modules.calls import call, map_tensors, tensors_in
from xprune.modules.copies import alias, reference_device, unwrap
from xprune.modules.forward import try_forward
from xprune.modules.samples import find_samples, samples_of
from xprune.modules.undisturbed import undisturbed


@undisturbed()
def count_macs(model: nn.Module, example_inputs: Any, *, batch_axis: int | None = None) -> int:
    """Multiply-accumulates of one sample: FlopCounterMode over the real forward / 2, attention products included.

    A sample is an image, a sentence; for a graph, a node. Message passing costs one for each feature of each edge that
    is summed up, or two operations, as a matrix product with the adjacency would.

    Args:
        model: The model. It is not changed.
        example_inputs: What it is called with.
        batch_axis: Axis of the samples in the inputs. None: found by taking a sample away.

    Raises:
        ModelError: Where the forward fails, or where the axis of the samples cannot be told.
    """
    model = unwrap(model)
    samples = number_of_samples(model, example_inputs, batch_axis)
    try:
        return round(macs_by_module(alias(model, requires_grad=True), example_inputs, samples)[""])
    except XPruneError:
        raise
    except Exception as problem:
        try_forward(model, example_inputs)
        raise ModelError(
            f"MACs cannot be counted: the forward fails where gradients are on: {type(problem).__name__}: {problem}."
        ) from problem


def number_of_samples(model: nn.Module, example_inputs: Any, batch_axis: int | None) -> int:
    """Samples in the example inputs; ModelError where they cannot be counted."""
    if not any(tensor.dim() for tensor in tensors_in(example_inputs)):
        raise ModelError("the example inputs hold no tensor with rows: MACs per sample cannot be counted.")
    if batch_axis is None:
        found = find_samples(model, example_inputs)
        if found is None:
            try_forward(model, example_inputs)  # if that is why
            raise ModelError(
                f"the axis of the samples in the inputs of {type(model).__name__} cannot be told, so that MACs per "
                "sample cannot be counted: give batch_axis=, 0 where samples come first, 1 where tokens do."
            )
        return found.count
    samples = samples_of(example_inputs, batch_axis)
    if not samples:
        raise ModelError(f"batch_axis={batch_axis}: no tensor of the example inputs has samples along that axis.")
    return samples


def count_params(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@undisturbed()
def count_resources(
    model: nn.Module, example_inputs: Any, resources: Iterable[str] = (), *, batch_axis: int | None = None
) -> dict[str, float]:
    """What a model costs.

    Args:
        model: The model. It is not changed.
        example_inputs: What it is called with.
        resources: Names of resources to measure beside those that every run measures.
        batch_axis: Axis of the samples in the inputs. None: found by taking a sample away.

    Returns:
        Name of a resource -> its cost, a whole number where it is a count.

    Raises:
        ModelError: Where the forward fails, or where the axis of the samples cannot be told.
    """
    model = unwrap(model)
    samples, found = number_of_samples(model, example_inputs, batch_axis), {}
    for resource in measured_resources(tuple(resources)):
        copy = alias(model, requires_grad=True)
        try:
            cost = by_module(resource, copy, example_inputs, samples)[""]
        except XPruneError:
            raise
        except Exception as problem:
            try_forward(model, example_inputs)
            raise ModelError(
                f"{resource.label} cannot be counted: the forward fails where gradients are on: "
                f"{type(problem).__name__}: {problem}."
            ) from problem
        found[resource.name] = cost if resource.unit else round(cost)
    return found


def by_module(resource: Resource, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
    """What a resource gives; PluginError where it has no number for the whole model."""
    counted = resource.by_module(model, example_inputs, samples)
    if not math.isfinite(counted.get("", math.nan)):
        raise PluginError(
            f"the resource {resource.name!r} gave {counted.get('')!r} for the whole model: by_module has to give a "
            "finite number under the path ''."
        )
    return counted


def macs_by_module(model: nn.Module, example_inputs: Any, samples: int) -> dict[str, float]:
    """MACs of one of so many samples by module path; "" is the model. The model is consumed."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    device = reference_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = map_tensors(example_inputs, lambda t: t.to(device, dtype if t.is_floating_point() else None))
    summed = {operation: _summed for operation in (torch.ops.aten.scatter_add_, torch.ops.aten.scatter_add)}
    counter = FlopCounterMode(display=False, custom_mapping=summed)
    # Without gradients nn.TransformerEncoder takes a path that counts as 0; torch <= 2.11 does not count the fused
    # attention of CPUs.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, inputs)
    counts = {"": sum(counter.get_flop_counts().get("Global", {}).values()) / 2 / samples}
    for name, ops in counter.get_flop_counts().items():
        counts.setdefault(name.partition(".")[2], sum(ops.values()) / 2 / samples)
    return counts


def _summed(_into: Any, _dim: Any, _index: Any, source: Sequence[int], **_: Any) -> int:
    """FLOPs of messages of this shape, each weighted and added to its node."""
    return 2 * math.prod(source)
