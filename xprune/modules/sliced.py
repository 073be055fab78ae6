"""Sliced: a tensor without some of its slices, which is made anew each time an operation reads it and takes no memory.

It lets a smaller model run, and be proved, before anything is cut.
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
    """What `source` is once only some indices along some of its axes are left.

    Args:
        source: The whole tensor. It is held, not copied.
        picks: (axis, indices that stay) of each cut, the first one first.
    """

    source: Tensor
    picks: tuple[tuple[int, Tensor], ...]

    @staticmethod
    def __new__(cls, source: Tensor, picks: Sequence[tuple[int, Tensor]]) -> "Sliced":
        """A wrapper of the right shape without a storage of its own."""
        shape = list(source.shape)
        for axis, index in picks:
            shape[axis] = len(index)
        made: Sliced = make_wrapper(cls, shape, dtype=source.dtype, device=source.device)
        made.source, made.picks = source, tuple(picks)
        return made

    def whole(self) -> Tensor:
        """The tensor itself, with a storage of its own."""
        made = self.source.detach()
        for axis, index in self.picks:
            made = made.index_select(axis, index)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Its shape and what it is made from."""
        return f"Sliced({tuple(self.shape)} of {tuple(self.source.shape)})"

    # As a parameter has it: operations on the tensor reach __torch_dispatch__ alone.
    __torch_function__ = nn.Parameter.__torch_function__

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation on the tensor itself; a detached one is still Sliced, as a parameter has to be."""
        if func is torch.ops.aten.detach.default:
            return Sliced(args[0].source, args[0].picks)
        return func(*map_leaves(args, _whole), **map_leaves(kwargs or {}, _whole))


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, Sliced) else value


def _nothing() -> None:
    pass


def slice_of(old: Tensor, axis: int, index: Tensor) -> Tensor:
    """The tensor with the indices that stay along an axis, `Sliced`."""
    picks = old.picks if isinstance(old, Sliced) else ()
    source = old.source if isinstance(old, Sliced) else old.detach()
    return Sliced(source, (*picks, (axis, index)))


def fill(model: nn.Module, starts: Callable[[], None] = _nothing) -> nn.Module:
    """Puts real tensors in the place of the model's `Sliced` ones, the largest first; ties survive.

    Each source is let go once it is cut. Where nobody else holds the sources, this needs memory for one tensor: only
    the first, the largest, can run out of it, and the later ones fit into what was let go. An interrupt by the user
    waits until the model is whole.

    Args:
        model: The model, which is changed.
        starts: Called once the first tensor is made and before the first source is let go.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, tensor in tensors_of(module):
            if isinstance(tensor, Sliced):
                places.setdefault(id(tensor), []).append((module, name))
                sizes[id(tensor)] = tensor.numel()
    waiting = [places[key] for key in sorted(places, key=sizes.__getitem__)]
    interrupted: KeyboardInterrupt | None = None
    while waiting:
        try:
            _fill_in(waiting[-1], starts)
            waiting.pop()
            starts = _nothing
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted
    return model


def _fill_in(places: Sequence[tuple[nn.Module, str]], starts: Callable[[], None]) -> None:
    """Makes one tensor and puts it wherever it belongs."""
    module, name = places[0]
    made = old = tensor_at(module, name)
    if isinstance(old, Sliced):  # else an interrupt came after it was put there
        made = old.whole()
        made = nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made
    starts()
    for module, name in places:
        setattr(module, name, made)
