"""The private names of Accelerate that this package uses. A test fails if a new version of Accelerate changes them.

The names come from the source of accelerate 1.15.0. Accelerate keeps its settings in dictionaries that all
`Accelerator` objects of a process share. With public names only, one can neither start a second `Accelerator` with
other settings nor restore the settings of the first one.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

READ_FROM = "1.15.0"
"""The version of accelerate whose source these names were read from."""


def forget() -> None:
    """Deletes Accelerate's settings of precision and accumulation, so that the next `Accelerator` can have others.

    The process group stays as it is.
    """
    _shared(AcceleratorState).clear()
    _shared(GradientState).clear()
    process = _shared(PartialState)
    if process.get("distributed_type") in _SHARDING:
        process["distributed_type"] = _without_sharding(process)


@contextmanager
def kept() -> Iterator[None]:
    """Restores the caller's settings of Accelerate at the end of a `with` block, also after an exception.

    If the caller has no `Accelerator` yet, the next one starts as if there had been no block. There is one exception: a
    process group that the block opens stays open, and Accelerate still knows it.
    """
    before = {kind: _Snapshot(_shared(kind)) for kind in (AcceleratorState, GradientState)}
    process = _shared(PartialState)
    fresh, kind = not process, process.get("distributed_type")
    try:
        yield
    finally:
        for snapshot in before.values():
            snapshot.put_back()
        if fresh and not torch.distributed.is_initialized():
            process.clear()
        # Accelerate notes there that models are sharded, and then refuses to create another `Accelerator`.
        if kind is not None:
            process["distributed_type"] = kind
        elif process.get("distributed_type") in _SHARDING:
            process["distributed_type"] = _without_sharding(process)


def callers_plugin() -> FullyShardedDataParallelPlugin | None:
    """Returns a copy of the FSDP plugin that the caller has given to an `Accelerator`. Call it before `forget`.

    Returns None if there is none, or if `accelerate launch` gives the settings of FSDP.
    """
    plugin = _shared(AcceleratorState).get("fsdp_plugin")
    return None if plugin is None or "FSDP_VERSION" in os.environ else copy.copy(plugin)


def shard_on_cpu(runner: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Turns FSDP on for processes on the CPU, if the caller asks for it.

    torch can shard models on the CPU, but Accelerate ignores its settings of FSDP there.

    Args:
        runner: An Accelerator that was just created.
        plugin: The plugin that the caller has given, or None.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and runner.distributed_type == DistributedType.MULTI_CPU:
        plugin = plugin or FullyShardedDataParallelPlugin()
        if runner.mixed_precision != "no":
            plugin.set_mixed_precision(runner.mixed_precision)
        runner.state.fsdp_plugin = plugin
        for kind in (AcceleratorState, PartialState):
            _shared(kind)["distributed_type"] = DistributedType.FSDP


_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""What Accelerate calls several processes whose models are sharded."""


def _without_sharding(process: dict[str, Any]) -> DistributedType:
    """Returns what Accelerate calls several processes on these devices if their models are not sharded."""
    device = process["device"].type
    return DistributedType("MULTI_GPU" if device == "cuda" else f"MULTI_{device.upper()}")


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
