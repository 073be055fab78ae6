"""Tensors that act as a smaller tensor without taking memory: `Sliced` picks entries each time an operation reads it.

With them a smaller model runs, and is proved, before anything is cut. `apply(..., in_place=True)` uses it.
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
    """A tensor with the entries of `source` that stay after some cuts. It takes no memory.

    Args:
        source: The whole tensor. It is referred to, not copied.
        picks: (axis, indices that stay, int64) of each cut, in the order of the cuts.

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
        """Makes a tensor that has the shape, the dtype and the device of the smaller one, but no storage."""
        shape = list(source.shape)
        for axis, index in picks:
            shape[axis] = len(index)
        wrapper: Sliced = make_wrapper(cls, shape, dtype=source.dtype, device=source.device)
        wrapper.source, wrapper.picks = source, tuple(picks)
        return wrapper

    def whole(self) -> Tensor:
        """Returns the smaller tensor as an ordinary one, which takes memory."""
        result = self.source.detach()
        for axis, index in self.picks:
            result = result.index_select(axis, index)
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shows both shapes. The values are not computed for it."""
        return f"Sliced({tuple(self.shape)} of {tuple(self.source.shape)})"

    # As for a parameter: functions of torch go straight to their operations, where `__torch_dispatch__` sees them.
    __torch_function__ = nn.Parameter.__torch_function__

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation on the ordinary tensors in place of the `Sliced` ones."""
        # nn.Parameter detaches its data. The parameter has to be Sliced too, so this one operation keeps the type.
        if func is torch.ops.aten.detach.default:
            return Sliced(args[0].source, args[0].picks)
        return func(*map_leaves(args, _whole), **map_leaves(kwargs or {}, _whole))


def _whole(value: Any) -> Any:
    """Returns the ordinary tensor of a `Sliced` one, and anything else as it is."""
    return value.whole() if isinstance(value, Sliced) else value


def _nothing() -> None:
    """Does nothing, where a callback is optional."""


def slice_of(old: Tensor, axis: int, index: Tensor) -> Tensor:
    """Returns a `Sliced` tensor with the given indices along an axis.

    Args:
        old: The tensor, which may be `Sliced` already: then the cuts add up.
        axis: The axis.
        index: The indices that stay, int64.
    """
    picks = old.picks if isinstance(old, Sliced) else ()
    source = old.source if isinstance(old, Sliced) else old.detach()
    return Sliced(source, (*picks, (axis, index)))


def fill(model: nn.Module, starts: Callable[[], None] = _nothing) -> nn.Module:
    """Replaces every `Sliced` tensor of a model by an ordinary one, the largest first. Tied tensors stay tied.

    Each source is released as soon as its smaller tensor is made. If nothing else refers to the sources, this needs
    memory for one tensor only. So memory can run out at the first tensor only, when nothing has been replaced yet.
    Later tensors are smaller and fit into the released memory. If the user interrupts (Ctrl-C), KeyboardInterrupt is
    raised after all tensors are replaced.

    Args:
        model: The model, which is changed.
        starts: A function that is called after the first tensor is made and before its source is released.

    Returns:
        The same model.
    """
    # For each Sliced tensor, the modules that hold it and its names there: several for a tied tensor.
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    sizes: dict[int, int] = {}  # id of each Sliced tensor -> its number of entries
    for module in model.modules():
        for name, tensor in tensors_of(module):
            if isinstance(tensor, Sliced):
                places.setdefault(id(tensor), []).append((module, name))
                sizes[id(tensor)] = tensor.numel()
    # Ascending by size: the loop takes the last, which is the largest.
    waiting = [places[key] for key in sorted(places, key=sizes.__getitem__)]
    interrupted: KeyboardInterrupt | None = None
    while waiting:
        try:
            _fill_in(waiting[-1], starts)
            # Only now: after an interrupt the same tensor is tried again.
            waiting.pop()
            starts = _nothing
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted
    return model


def _fill_in(places: Sequence[tuple[nn.Module, str]], starts: Callable[[], None]) -> None:
    """Makes one ordinary tensor and puts it in all its places.

    Args:
        places: (module, name in it) of each place that holds the Sliced tensor.
        starts: A function that is called between both steps.
    """
    module, name = places[0]
    new = old = tensor_at(module, name)
    # It is an ordinary tensor already if an interrupt came after it was put there.
    if isinstance(old, Sliced):
        new = old.whole()
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    starts()
    for module, name in places:
        setattr(module, name, new)
