"""How a model is called with inputs of any form, and how the tensors inside such inputs are listed, changed and picked.

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
    """The arguments of one call of a model. `Task.rows` gets them.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.

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
        inputs: A mapping is unpacked to keyword arguments, a tuple to positional arguments. Anything else is one
            argument.

    Example:
        >>> call(nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3))).shape
        torch.Size([1, 4])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def takes(function: Callable[..., Any], arguments: int) -> bool:
    """Returns True if a function can be called with this number of positional arguments."""
    try:
        # The values do not matter: binding looks at their number only.
        signature(function).bind(*range(arguments))
    except TypeError:
        return False
    return True


def logits(outputs: Any) -> Any:
    """Returns the logits of a model's outputs: the key or attribute `logits`, or the outputs if there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


@contextmanager
def slow_path() -> Iterator[None]:
    """Turns off the fast path of nn.TransformerEncoder for a while, so that hooks work.

    The fast path packs padded batches into nested tensors. Layers with hooks cannot compute with these.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def tensors_in(value: Any) -> list[Tensor]:
    """Returns every tensor in a value, in order. Looks into tuples, lists and mappings that hold each other."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns the same value with `change` applied to every tensor in it.

    Lists, tuples and named tuples keep their type. Mappings become plain dicts. Everything else stays as it is.
    """
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns the same value with `change` applied to everything in it that is not a list, tuple or mapping.

    Lists, tuples and named tuples keep their type. Mappings become plain dicts.

    Args:
        value: The value, such as the arguments of a call.
        change: A function that takes one leaf and returns what takes its place.

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
    """Returns some of the samples of a batch.

    Entries that hold nothing for each sample stay whole: numbers, 0-dim tensors, and a mask (tokens, tokens) that all
    samples share.

    Args:
        inputs: Inputs of a model.
        index: Indices of the samples, in the order wanted. An index may occur several times.
        samples: Number of samples in the batch. A list with this many entries holds one for each sample.
        axis: Sample axis of the tensors. A tensor with another length along it stays whole.

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
    """Returns the first samples of a batch, at most `rows` of them. See `pick_samples`.

    Args:
        inputs: Inputs of a model.
        rows: Number of samples wanted.
        samples: Number of samples in the batch. None: read from the first tensor that has the axis, or the first list.
        axis: Sample axis of the tensors.
    """
    if samples is None:
        samples = next(iter(lengths(inputs, axis)), 0)
    return pick_samples(inputs, range(min(rows, samples)), samples, axis)


def lengths(inputs: Any, axis: int = 0) -> list[int]:
    """Returns the length of each tensor along the axis and the number of entries of each list, in order.

    Tensors without the axis are skipped.
    """
    if isinstance(inputs, Tensor):
        return [inputs.shape[axis]] if inputs.dim() > axis else []
    entries = [len(inputs)] if isinstance(inputs, list) else []
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(values, (tuple, list)):
        return entries
    return entries + [n for item in values for n in lengths(item, axis)]


def _same_container(value: Any, items: list[Any]) -> Any:
    """Returns the items in a container of the type of `value`, which is a list, a tuple or a named tuple."""
    # The constructor of a named tuple takes one argument for each field, not a list.
    return value._make(items) if hasattr(value, "_make") else type(value)(items)
