"""The private names of Accelerate that this package uses. A test fails if a new version of Accelerate changes them.

The names come from the source of accelerate 1.15.0. Accelerate keeps its settings in dictionaries that all
`Accelerator` objects of a process share. With public names only, one can neither start a second `Accelerator` with
other settings nor restore the settings of the first one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

READ_FROM = "1.15.0"
"""The version of accelerate whose source these names were read from."""


def forget() -> None:
    """Deletes Accelerate's settings of precision and accumulation, so that the next `Accelerator` can have others.

    The process group stays as it is.
    """
    _shared(AcceleratorState).clear()
    _shared(GradientState).clear()


@contextmanager
def kept() -> Iterator[None]:
    """Restores the caller's settings of Accelerate at the end of a `with` block, also after an exception.

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
    """The contents of a shared dictionary, and of the lists in it, which can be restored later.

    `GradientState` keeps a list of the loaders that are being read. So the contents of lists have to be restored too.

    Args:
        shared: The dictionary.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.shared, self.items = shared, dict(shared)
        self.lists = [(value, list(value)) for value in shared.values() if isinstance(value, list)]

    def put_back(self) -> None:
        """Restores the contents that the dictionary and its lists had when the snapshot was taken."""
        self.shared.clear()
        self.shared.update(self.items)
        for each, contents in self.lists:
            each[:] = contents


def _shared(kind: Any) -> dict[str, Any]:
    """Returns the dictionary that all instances of a class of Accelerate share. It holds their settings."""
    found: dict[str, Any] = kind._shared_state
    return found
