"""The private names of Accelerate that this package uses, read from accelerate 1.15.0. A test fails when they move.

Accelerate keeps its settings in dictionaries that every `Accelerator` of the process shares. Its public names can
neither start a second `Accelerator` with other settings nor bring back the settings of the first one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

READ_FROM = "1.15.0"
"""The version of accelerate whose source these names were read from."""


def forget() -> None:
    """Lets the next `Accelerator` have other settings of precision and accumulation. The processes stay as they are."""
    _shared(AcceleratorState).clear()
    _shared(GradientState).clear()


@contextmanager
def kept() -> Iterator[None]:
    """Puts the caller's Accelerate back at the end of a `with` block, also after an exception.

    If the caller has no `Accelerator` yet, the next one starts as if there had been no block. There is one exception: a
    process group that the block opens stays open, and Accelerate still knows it.
    """
    before = {kind: _Snapshot(_shared(kind)) for kind in (AcceleratorState, GradientState)}
    fresh = not _shared(PartialState)
    try:
        yield
    finally:
        for snapshot in before.values():
            snapshot.put_back()
        if fresh and not torch.distributed.is_initialized():
            _shared(PartialState).clear()


class _Snapshot:
    """The contents of a dictionary and of the lists in it, to put back later.

    `GradientState` notes in a list which loaders are being read. So lists have to be put back too.

    Args:
        shared: The dictionary.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.shared, self.items = shared, dict(shared)
        self.lists = [(value, list(value)) for value in shared.values() if isinstance(value, list)]

    def put_back(self) -> None:
        """Gives the dictionary and its lists their old contents."""
        self.shared.clear()
        self.shared.update(self.items)
        for each, contents in self.lists:
            each[:] = contents


def _shared(kind: Any) -> dict[str, Any]:
    """Returns the dictionary that all instances of a class of Accelerate share."""
    found: dict[str, Any] = kind._shared_state
    return found
