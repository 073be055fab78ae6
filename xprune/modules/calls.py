"""Calls a model with inputs of any form, and lists, changes or picks the tensors inside such inputs.

Inputs are a tensor, a tuple of arguments, or a mapping of keyword arguments. A list is ONE argument that holds a tensor
for each sample, as the image list of a detection model. Tuples, lists, mappings and dataclasses may be nested. Anything
else in them, such as None, numbers and strings, is passed on as it is.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
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
            is passed as one argument. A named tuple is one argument too, if the forward of the model does not take as
            many arguments as it has fields.

    Example:
        >>> call(nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3))).shape
        torch.Size([1, 4])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    unpacked = isinstance(inputs, tuple) and not (hasattr(inputs, "_make") and not takes(model.forward, len(inputs)))
    return model(*inputs) if unpacked else model(inputs)


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

    The value may consist of nested tuples, lists, mappings and dataclasses. Anything else in it is skipped.
    """
    return _tensors_in(value, ())


def _tensors_in(value: Any, inside: tuple[int, ...]) -> list[Tensor]:
    """Returns all tensors in a value. `inside` has the ids of the dataclasses around it, which may be circular."""
    if isinstance(value, Tensor):
        return [value]
    # The checks below take long, and most values are plain ones.
    if value is None or isinstance(value, (bool, int, float, str)):
        return []
    if _is_record(value):
        if id(value) in inside:
            return []
        inside = (*inside, id(value))
    return [tensor for item in _items(value) or () for tensor in _tensors_in(item, inside)]


def _is_record(value: Any) -> bool:
    """Returns True for an instance of a dataclass that is neither a mapping nor a module, else False."""
    plain = is_dataclass(value) and not isinstance(value, (type, nn.Module))
    return plain and not isinstance(value, (Mapping, tuple, list))


def _field(value: Any, name: str) -> Any:
    """Returns what a dataclass holds in a field, or None. Some configs raise an error if a field is read directly."""
    held = getattr(value, "__dict__", None)
    return held.get(name) if held is not None else getattr(value, name, None)


def _items(value: Any) -> list[Any] | None:
    """Returns the parts of a mapping, tuple, list or dataclass. Returns None if the value is none of these."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if _is_record(value):
        return [_field(value, field.name) for field in fields(value)]
    return None


def _with_items(value: Any, items: Sequence[Any]) -> Any:
    """Returns a copy of a mapping, tuple, list or dataclass with other parts, in the order of `_items`."""
    if isinstance(value, Mapping):
        return _same_mapping(value, dict(zip(value, items, strict=True)))
    if isinstance(value, (tuple, list)):
        return _same_container(value, list(items))
    copied = copy.copy(value)
    for field, item in zip(fields(value), items, strict=True):
        # The dataclass may be frozen, and then refuses plain assignment.
        object.__setattr__(copied, field.name, item)
    return copied


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of a value in which `change` was applied to every tensor.

    Containers keep their type, see `map_leaves`. Anything that is not a tensor stays as it is.
    """
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a copy of a value in which `change` was applied to everything that is not a container.

    Containers are lists, tuples, mappings, and dataclasses with tensors. They keep their type. A mapping that cannot be
    changed becomes a plain dict.

    Args:
        value: The value, such as the arguments of a call.
        change: A function. It is called with one such part of the value, and returns what replaces the part.

    Example:
        >>> map_leaves([1, (2, {"a": 3})], lambda leaf: 10 * leaf)
        [10, (20, {'a': 30})]
    """
    # A dataclass without tensors, such as a config, is passed on as it is.
    if _is_record(value) and not tensors_in(value):
        return change(value)
    items = _items(value)
    return change(value) if items is None else _with_items(value, [map_leaves(item, change) for item in items])


def pick_samples(
    inputs: Any, index: Sequence[int] | Tensor, samples: int, axis: int = 0, shared: Collection[int] = ()
) -> Any:
    """Returns the inputs of some of the samples of a batch.

    Some entries do not contain a part for each sample: numbers, 0-dim tensors, or a mask (tokens, tokens) that all
    samples share. They are not changed.

    Args:
        inputs: The inputs of a batch.
        index: The indices of the wanted samples, in the wanted order. An index may occur several times.
        samples: The number of samples in the batch. If a list has this many entries, each entry is the part of one
            sample.
        axis: The sample axis of the tensors. A tensor whose length along this axis is not `samples` is not changed.
        shared: The ids of tensors that all samples share, although they have this length along the axis. They are not
            changed. An example is a mask (tokens, tokens) if there are as many tokens as samples.

    Returns:
        Inputs of the same form, with len(index) samples.

    Example:
        >>> batch = {"x": torch.zeros(4, 8), "mask": torch.zeros(5, 5)}
        >>> {name: tuple(t.shape) for name, t in pick_samples(batch, [0, 3], samples=4).items()}
        {'x': (2, 8), 'mask': (5, 5)}
    """
    if isinstance(inputs, Tensor):
        if inputs.dim() <= axis or inputs.shape[axis] != samples or id(inputs) in shared:
            return inputs
        return inputs.index_select(axis, torch.as_tensor(index, device=inputs.device))
    if isinstance(inputs, list) and len(inputs) == samples:
        return _same_container(inputs, [inputs[i] for i in index])
    if _is_record(inputs) and not tensors_in(inputs):
        return inputs
    items = _items(inputs)
    if items is None:
        return inputs
    return _with_items(inputs, [pick_samples(item, index, samples, axis, shared) for item in items])


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
    # A dataclass without tensors may be circular, and holds no samples.
    if _is_record(inputs) and not tensors_in(inputs):
        return []
    entries = [len(inputs)] if isinstance(inputs, list) else []
    return entries + [n for item in _items(inputs) or () for n in lengths(item, axis)]


def shareable(inputs: Any, samples: int, axis: int = 0) -> list[frozenset[int]]:
    """Lists which tensors of a batch all samples may share, although their length along the axis is that of the batch.

    The shapes do not tell a mask (tokens, tokens) from a mask (samples, tokens) if there are as many tokens as samples.
    The caller tries what the model accepts.

    Args:
        inputs: The inputs of a batch.
        samples: The number of samples in the batch.
        axis: The sample axis of the tensors.

    Returns:
        Sets of ids of tensors, for the argument `shared` of `pick_samples`. The most likely set comes first. The main
        tensor is in none of them: the first one with features, or else the first one. The list is empty if no tensor
        can be shared.

    Example:
        >>> len(shareable((torch.zeros(4, 4, 8), torch.zeros(4, 4)), samples=4))
        1
        >>> shareable((torch.zeros(4, 5, 8), torch.zeros(5, 5)), samples=4)
        []
    """
    fitting = [t for t in tensors_in(inputs) if t.dim() > axis and t.shape[axis] == samples]
    main = next((t for t in fitting if t.dim() > 2), fitting[0] if fitting else None)
    fitting = [t for t in fitting if t is not main]
    square = [id(t) for t in fitting if t.dim() == 2 and t.shape[0] == t.shape[1]]
    flat = [id(t) for t in fitting if t.dim() == 1]
    sets = (frozenset(square), frozenset(square + flat), frozenset(id(t) for t in fitting))
    return [each for each in dict.fromkeys(sets) if each]


def _same_mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Returns a mapping of the type of `value` with these items. If that is not possible, returns a plain dict."""
    if type(value) is dict:
        return items
    try:
        # The outputs of Hugging Face models keep their entries as attributes too, and their constructors differ.
        copied: Any = copy.copy(value)
        for name, item in items.items():
            copied[name] = item
    except Exception:
        return items
    return copied


def _same_container(value: Any, items: list[Any]) -> Any:
    """Returns a container of the type of `value` with these items. `value` is a list, a tuple or a named tuple."""
    # The constructor of a named tuple expects one argument for each field, not a list.
    return value._make(items) if hasattr(value, "_make") else type(value)(items)
