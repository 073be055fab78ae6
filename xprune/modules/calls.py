"""Calls a model with inputs of any form, and lists, changes or picks the tensors inside such inputs.

Inputs are a tensor, a tuple of arguments, or a mapping of keyword arguments. A list is ONE argument that holds a tensor
for each sample, as the image list of a detection model. Tuples, lists and mappings may be nested.
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
    """The arguments that a model was called with. `Task.rows` gets them.

    Attributes:
        args: The positional arguments.
        kwargs: The keyword arguments, by name.

    Example:
        >>> given = Given((torch.zeros(2, 3),), {"mask": None})
        >>> len(given.args), list(given.kwargs)
        (1, ['mask'])
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """Calls the model and returns its output.

    Args:
        model: The model.
        inputs: The inputs. A mapping is passed as keyword arguments, and a tuple as positional arguments. Anything else
            is passed as one argument.

    Example:
        >>> call(nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3))).shape
        torch.Size([1, 4])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def takes(function: Callable[..., Any], arguments: int) -> bool:
    """Returns True if a function accepts this number of positional arguments, else False.

    For example, it finds out whether a method of a task was written for an older release with fewer arguments.
    """
    try:
        # `bind` checks only the number of the values, so any values will do.
        signature(function).bind(*range(arguments))
    except TypeError:
        return False
    return True


def logits(outputs: Any) -> Any:
    """Returns the entry or attribute `logits` of a model's outputs. Returns the outputs if they have no logits."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


@contextmanager
def slow_path() -> Iterator[None]:
    """Turns off the fast path of nn.TransformerEncoder inside a `with` block, so that hooks on its layers work.

    The fast path packs padded batches into nested tensors, and layers with hooks cannot compute with nested tensors.
    After the block, the setting is as before.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def tensors_in(value: Any) -> list[Tensor]:
    """Returns a list of all tensors in a value, in their order.

    The value may consist of nested tuples, lists and mappings. Anything else in it is skipped.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of a value in which `change` was applied to every tensor.

    Lists, tuples and named tuples keep their type. Mappings become plain dicts. Anything that is not a tensor stays as
    it is.
    """
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a copy of a value in which `change` was applied to everything that is not a list, tuple or mapping.

    Lists, tuples and named tuples keep their type. Mappings become plain dicts.

    Args:
        value: The value, such as the arguments of a call.
        change: A function. It is called with one such part of the value, and returns what replaces the part.

    Example:
        >>> map_leaves([1, (2, {"a": 3})], lambda leaf: 10 * leaf)
        [10, (20, {'a': 30})]
    """
    if isinstance(value, Mapping):
        return {name: map_leaves(item, change) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _same_container(value, [map_leaves(item, change) for item in value])
    return change(value)


def pick_samples(inputs: Any, index: Sequence[int] | Tensor, samples: int, axis: int = 0) -> Any:
    """Returns the inputs of some of the samples of a batch.

    Some entries do not contain a part for each sample: numbers, 0-dim tensors, or a mask (tokens, tokens) that all
    samples share. They are not changed.

    Args:
        inputs: The inputs of a batch.
        index: The indices of the wanted samples, in the wanted order. An index may occur several times.
        samples: The number of samples in the batch. If a list has this many entries, each entry is the part of one
            sample.
        axis: The sample axis of the tensors. A tensor whose length along this axis is not `samples` is not changed.

    Returns:
        Inputs of the same form, with len(index) samples.

    Example:
        >>> batch = {"x": torch.zeros(4, 8), "mask": torch.zeros(5, 5)}
        >>> {name: tuple(t.shape) for name, t in pick_samples(batch, [0, 3], samples=4).items()}
        {'x': (2, 8), 'mask': (5, 5)}
    """
    if isinstance(inputs, Tensor):
        if inputs.dim() <= axis or inputs.shape[axis] != samples:
            return inputs
        return inputs.index_select(axis, torch.as_tensor(index, device=inputs.device))
    if isinstance(inputs, list) and len(inputs) == samples:
        return _same_container(inputs, [inputs[i] for i in index])
    if isinstance(inputs, Mapping):
        return {name: pick_samples(item, index, samples, axis) for name, item in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return _same_container(inputs, [pick_samples(item, index, samples, axis) for item in inputs])
    return inputs


def first_rows(inputs: Any, rows: int, samples: int | None = None, axis: int = 0) -> Any:
    """Returns the inputs of the first `rows` samples of a batch, or of all samples if there are fewer.

    Args:
        inputs: The inputs of a batch.
        rows: The number of samples wanted.
        samples: The number of samples in the batch. None means that it is read from the first tensor that has the axis,
            or from the first list.
        axis: The sample axis of the tensors. See `pick_samples`.
    """
    if samples is None:
        samples = next(iter(lengths(inputs, axis)), 0)
    return pick_samples(inputs, range(min(rows, samples)), samples, axis)


def lengths(inputs: Any, axis: int = 0) -> list[int]:
    """Returns the length of each tensor along an axis and the length of each list, in the order of the inputs.

    Tensors without this axis are left out. If the axis is the sample axis, the result shows how many samples a batch
    may have.
    """
    if isinstance(inputs, Tensor):
        return [inputs.shape[axis]] if inputs.dim() > axis else []
    entries = [len(inputs)] if isinstance(inputs, list) else []
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(values, (tuple, list)):
        return entries
    return entries + [n for item in values for n in lengths(item, axis)]


def _same_container(value: Any, items: list[Any]) -> Any:
    """Returns a container of the type of `value` with these items. `value` is a list, a tuple or a named tuple."""
    # The constructor of a named tuple expects one argument for each field, not a list.
    return value._make(items) if hasattr(value, "_make") else type(value)(items)
