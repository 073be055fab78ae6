"""Tensors that behave like a smaller tensor without using memory for it.

A `Sliced` tensor refers to the whole tensor and picks the kept entries each time an operation reads it. So a pruned
model can run, and can be proved, before anything is cut. `apply(..., in_place=True)` uses this.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xprune.modules.calls import map_leaves
from xprune.modules.copies import tensors_of
from xprune.modules.paths import tensor_at
from xprune.modules.torch_private import make_wrapper


class Sliced(Tensor):
    """A tensor that contains only the entries of `source` that stay after some cuts. It uses no memory for them.

    Args:
        source: The whole tensor. It is not copied.
        picks: A tuple (axis, indices) for each cut, in the order of the cuts. The indices are int64 and say which
            entries along the axis stay.

    Example:
        >>> small = slice_of(torch.arange(6.0).view(2, 3), 1, torch.tensor([0, 2]))
        >>> small
        Sliced((2, 2) of (2, 3))
        >>> small + 1
        tensor([[1., 3.],
                [4., 6.]])
    """

    source: Tensor
    picks: tuple[tuple[int, Tensor], ...]

    @staticmethod
    def __new__(cls, source: Tensor, picks: Sequence[tuple[int, Tensor]]) -> "Sliced":
        """Creates a tensor object with the shape, dtype and device of the smaller tensor, but without storage."""
        shape = list(source.shape)
        for axis, index in picks:
            shape[axis] = len(index)
        wrapper: Sliced = make_wrapper(cls, shape, dtype=source.dtype, device=source.device)
        wrapper.source, wrapper.picks = source, tuple(picks)
        return wrapper

    def whole(self) -> Tensor:
        """Returns the kept entries as an ordinary tensor, which uses memory."""
        result = self.source.detach()
        for axis, index in self.picks:
            result = result.index_select(axis, index)
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Returns a text with both shapes. The values are not shown, because they would have to be computed."""
        return f"Sliced({tuple(self.shape)} of {tuple(self.source.shape)})"

    # No function of torch is handled here, as in nn.Parameter. Each function calls its operations, and
    # `__torch_dispatch__` handles these.
    __torch_function__ = nn.Parameter.__torch_function__

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation on ordinary tensors, which are made from the `Sliced` arguments."""
        # nn.Parameter calls `detach` on its data. The parameter has to be Sliced too, so only this operation returns a
        # Sliced tensor.
        if func is torch.ops.aten.detach.default:
            return Sliced(args[0].source, args[0].picks)
        return func(*map_leaves(args, _whole), **map_leaves(kwargs or {}, _whole))


def _whole(value: Any) -> Any:
    """Returns an ordinary tensor for a `Sliced` tensor. Any other value is returned unchanged."""
    return value.whole() if isinstance(value, Sliced) else value


def _nothing() -> None:
    """Does nothing. It is the default of arguments that are functions."""


def slice_of(old: Tensor, axis: int, index: Tensor) -> Tensor:
    """Returns a `Sliced` tensor with the entries at some indices along an axis.

    Args:
        old: The tensor. If it is `Sliced` already, the new cut is added to its cuts.
        axis: The axis.
        index: The indices of the entries that stay, int64.
    """
    picks = old.picks if isinstance(old, Sliced) else ()
    source = old.source if isinstance(old, Sliced) else old.detach()
    return Sliced(source, (*picks, (axis, index)))


def fill(model: nn.Module, starts: Callable[[], None] = _nothing) -> nn.Module:
    """Replaces every `Sliced` tensor of a model by an ordinary tensor, the largest one first. Tied tensors stay tied.

    The memory of a source is freed as soon as its smaller tensor exists, provided that nothing else refers to the
    source. So memory is needed for only one more tensor, and it can only run out at the first and largest one. Nothing
    has been replaced then. All later tensors fit into the memory that was freed.

    If the user presses Ctrl-C, the function replaces all remaining tensors before it raises KeyboardInterrupt. So the
    model is never left half replaced.

    Args:
        model: The model. It is changed.
        starts: A function. It is called once, after the first ordinary tensor exists and before its source is freed.
            From then on, memory cannot run out.

    Returns:
        `model`.
    """
    # For each Sliced tensor, all places that hold it: a module, and the name in the module. A tied tensor has several
    # places.
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    # The number of entries of each Sliced tensor, by the id of the tensor.
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, tensor in tensors_of(module):
            if isinstance(tensor, Sliced):
                places.setdefault(id(tensor), []).append((module, name))
                sizes[id(tensor)] = tensor.numel()
    # The list is sorted by size in ascending order, because the loop takes the last entry.
    waiting = [places[key] for key in sorted(places, key=sizes.__getitem__)]
    interrupted: KeyboardInterrupt | None = None
    while waiting:
        try:
            _fill_in(waiting[-1], starts)
            # The entry is removed only after success. After an interrupt, the loop tries the same tensor again.
            waiting.pop()
            starts = _nothing
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted
    return model


def _fill_in(places: Sequence[tuple[nn.Module, str]], starts: Callable[[], None]) -> None:
    """Makes one ordinary tensor and stores it in all places of its `Sliced` tensor.

    Args:
        places: A tuple (module, name in the module) for each place that holds the Sliced tensor.
        starts: A function that is called after the tensor exists and before it is stored.
    """
    module, name = places[0]
    new = old = tensor_at(module, name)
    # If an interrupt came after the tensor was stored, `old` is the ordinary tensor already.
    if isinstance(old, Sliced):
        new = old.whole()
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    starts()
    for module, name in places:
        setattr(module, name, new)
