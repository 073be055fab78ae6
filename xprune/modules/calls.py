"""Calls: how a model is called with inputs of any form, and what is done to every tensor in them.

Inputs are a tensor, a tuple of arguments, or a mapping of keyword arguments. A list is ONE argument that holds a tensor
for each sample, as detection models take their images. Tuples, lists and mappings may hold each other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Given:
    """What a model was called with.

    Attributes:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output: a mapping becomes keyword arguments, a tuple arguments, anything else one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def takes(function: Callable[..., Any], arguments: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        signature(function).bind(*range(arguments))
    except TypeError:
        return False
    return True


def logits(outputs: Any) -> Any:
    """What a model's outputs have as `logits`, by key or attribute; outputs that have none as they are."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


@contextmanager
def slow_path() -> Iterator[None]:
    """Without the inference path of nn.TransformerEncoder, which packs padded batches and fails where hooks are."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in tuples, lists and mappings that hold each other, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value with `change` applied to every tensor. Lists, tuples and named tuples stay what they are.

    Mappings become plain dicts.
    """
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same value with `change` applied to everything that is no list, tuple or mapping. See `map_tensors`."""
    if isinstance(value, Mapping):
        return {name: map_leaves(item, change) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, [map_leaves(item, change) for item in value])
    return change(value)


def pick_samples(inputs: Any, index: Sequence[int] | Tensor, samples: int, axis: int = 0) -> Any:
    """Some of the samples of a batch.

    What holds no entry for each sample goes along whole: numbers, 0-dim tensors, a mask (tokens, tokens) that all
    samples share.

    Args:
        inputs: What a model is called with.
        index: Which samples, in which order.
        samples: The number of samples in the batch. A list of so many entries holds one for each sample.
        axis: The axis of the samples in tensors.

    Returns:
        Inputs of the same form, with len(index) samples.
    """
    if isinstance(inputs, Tensor):
        if inputs.dim() <= axis or inputs.shape[axis] != samples:
            return inputs
        return inputs.index_select(axis, torch.as_tensor(index, device=inputs.device))
    if isinstance(inputs, list) and len(inputs) == samples:
        return _like(inputs, [inputs[i] for i in index])
    if isinstance(inputs, Mapping):
        return {name: pick_samples(item, index, samples, axis) for name, item in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return _like(inputs, [pick_samples(item, index, samples, axis) for item in inputs])
    return inputs


def first_rows(inputs: Any, rows: int, samples: int | None = None, axis: int = 0) -> Any:
    """The first samples of a batch, at most `rows`, see `pick_samples`.

    Args:
        inputs: What a model is called with.
        rows: How many samples are wanted.
        samples: The number of samples in the batch; None: the first entry that has the axis tells it.
        axis: The axis of the samples in tensors.
    """
    if samples is None:
        samples = next(iter(lengths(inputs, axis)), 0)
    return pick_samples(inputs, range(min(rows, samples)), samples, axis)


def lengths(inputs: Any, axis: int = 0) -> list[int]:
    """How long each tensor is along the axis, and how many entries each list has, in order."""
    if isinstance(inputs, Tensor):
        return [inputs.shape[axis]] if inputs.dim() > axis else []
    own = [len(inputs)] if isinstance(inputs, list) else []
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    return own + [n for item in values for n in lengths(item, axis)] if isinstance(values, (tuple, list)) else []


def _like(value: Any, items: list[Any]) -> Any:
    """The items in a container of the type of `value`, a tuple or a list."""
    return value._make(items) if hasattr(value, "_make") else type(value)(items)  # a named tuple takes no list
