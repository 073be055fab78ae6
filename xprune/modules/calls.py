"""Calls: a model called with nested inputs: a tensor, a tuple, a list or a mapping of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call(model: nn.Module, inputs: Any) -> Any:
    """model(inputs) for a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


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
    """Every tensor in a nest of tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with `change` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change) for name, item in value.items()}
    return tuple(map_tensors(item, change) for item in value) if isinstance(value, (tuple, list)) else value


def to_float(tensor: Tensor) -> Tensor:
    """float32 where the tensor is a floating-point one, itself otherwise."""
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def first_rows(inputs: Any, rows: int) -> Any:
    """The first rows of every tensor in the inputs."""
    return map_tensors(inputs, lambda tensor: tensor[:rows])
