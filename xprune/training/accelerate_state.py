"""The private names of Accelerate that this package uses. Read from accelerate 1.15.0; a test fails when they move.

Accelerate keeps its settings in dictionaries that every `Accelerator` of the process shares. Its public names can
neither start a second one with other settings nor put the first one's back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

READ_FROM = "1.15.0"
"""The version of accelerate whose source these names were read from."""


def forget() -> None:
    """Lets the next `Accelerator` have its own precision and accumulation. The processes stay as they are."""
    _shared(AcceleratorState).clear()
    _shared(GradientState).clear()


@contextmanager
def kept() -> Iterator[None]:
    """Puts the caller's Accelerate back at the end of the block, also after an exception.

    Without an Accelerate of the caller's, the next one starts as if the block had not been, but for a process group
    that the block has opened: it stays open, and Accelerate keeps what it knows of it.
    """
    before = {kind: _Copy(_shared(kind)) for kind in (AcceleratorState, GradientState)}
    fresh = not _shared(PartialState)
    try:
        yield
    finally:
        for copy in before.values():
            copy.put_back()
        if fresh and not torch.distributed.is_initialized():
            _shared(PartialState).clear()


class _Copy:
    """What a dictionary held, with what its lists held: `GradientState` notes in one which loaders are being read."""

    def __init__(self, shared: dict[str, Any]) -> None:
        self.shared, self.items = shared, dict(shared)
        self.lists = [(value, list(value)) for value in shared.values() if isinstance(value, list)]

    def put_back(self) -> None:
        """Makes the dictionary hold it again."""
        self.shared.clear()
        self.shared.update(self.items)
        for each, held in self.lists:
            each[:] = held


def _shared(kind: Any) -> dict[str, Any]:
    """The dictionary that all instances of a class of Accelerate's share."""
    found: dict[str, Any] = kind._shared_state
    return found
