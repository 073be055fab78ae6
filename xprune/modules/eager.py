"""Runs the parts of a model without torch.compile and without reentrant checkpointing inside a block.

A compiled part does not notice that hooks were added to its layers, or compiles again for each copy of the model.
Reentrant checkpointing runs a part without gradients first. It needs an input with a gradient, and it does not work
with `torch.autograd.grad`. xprune's gates are hooks, and its criteria need gradients of the gates.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch.utils import checkpoint

from xprune.modules.torch_private import compiler_is_loaded


@contextmanager
def eager() -> Iterator[None]:
    """Runs compiled parts as ordinary Python, and checkpointed parts in the way that allows hooks and all gradients.

    The results are the same, apart from rounding. Checkpointing still saves memory. After the block, everything is as
    before. Blocks may be nested.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> x = torch.ones(1, 2)  # without a gradient, as a batch of images
        >>> with eager():
        ...     output = checkpoint.checkpoint(layer, x, use_reentrant=True)
        >>> output.requires_grad
        True
    """
    _enter()
    try:
        yield
    finally:
        _leave()


@contextmanager
def compiled() -> Iterator[None]:
    """Runs compiled parts as compiled again, inside a block of `eager`. It is used to measure times."""
    with torch.compiler.set_stance("default") if compiler_is_loaded() else nullcontext():
        yield


_LOCK = Lock()
_BLOCKS: list[ExitStack] = []
"""One entry for each block of any thread that is running now. The first entry restores the settings of torch.

The settings belong to the whole process. If each block restored what it has found, blocks of two threads that overlap
would restore the settings in the wrong order.
"""
_REENTRANT = checkpoint.CheckpointFunction


def _enter() -> None:
    """Begins a block. The first block changes the settings of torch."""
    with _LOCK:
        stack = ExitStack()
        if not _BLOCKS:
            if compiler_is_loaded():
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # torch looks this class up at each call. Models import the function `checkpoint` by its name, so the
            # function cannot be replaced.
            vars(checkpoint)["CheckpointFunction"] = _NotReentrant
            stack.callback(vars(checkpoint).update, CheckpointFunction=_REENTRANT)
        _BLOCKS.append(stack)


def _leave() -> None:
    """Ends a block. The last block restores the settings of torch."""
    with _LOCK:
        # The newest entry is removed, whichever block it belongs to. So the first entry is the last one to be removed.
        _BLOCKS.pop().close()


class _NotReentrant:
    """Replaces `torch.utils.checkpoint.CheckpointFunction`, which implements reentrant checkpointing."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Calls the function with checkpointing that is not reentrant."""
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
