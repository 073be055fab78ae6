"""Prepares devices, processes and loaders with Accelerate, reads batches, and shows progress bars.

Training, criteria and `evaluate` all read their batches here. So batches are split, seeded and checked in one way.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    send_to_device,
)
from rich import get_console
from rich.progress import track
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from xprune.core.task import Task, with_batch_axis
from xprune.errors import DataError, TrainingError, XPruneError
from xprune.modules.calls import map_tensors, tensors_in
from xprune.modules.undisturbed import seeded, undisturbed
from xprune.training import accelerate_state

Made = TypeVar("Made")


@contextmanager
def stage() -> Iterator[None]:
    """Restores the caller's settings of Accelerate, random states and torch settings at the end of a block.

    It does so after an exception too. Use it as a context manager or as a decorator. Each public function that trains
    or measures a model is decorated with it.
    """
    with undisturbed(), accelerate_state.kept():
        yield


def accelerator(mixed_precision: str | None = None, *, even_batches: bool = False, unused: bool = False) -> Accelerator:
    """Creates an Accelerator. With it, each batch is split over the processes, and the order of samples is seeded.

    Call it inside `stage()`, which restores the caller's settings of Accelerate.

    Args:
        mixed_precision: "no", "fp16" or "bf16". If None, the setting of `accelerate launch` is used.
        even_batches: If True, samples of the first batch are added to the last batch where this is needed for an even
            split, so that every process takes every step. Use False for sums over samples, which must count each sample
            once.
        unused: True if some weights get no gradient. With several processes, DistributedDataParallel then looks for
            such weights in each step.

    Raises:
        TrainingError: The precision is not possible on this device.
    """
    # Accelerate would keep the settings of the first Accelerator in the process. But the precision may differ from
    # function to function.
    plugin = accelerate_state.callers_plugin()
    accelerate_state.forget()
    _refuse_version_1(plugin)
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, even_batches=even_batches)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=unused)
    try:
        runner = Accelerator(
            mixed_precision=mixed_precision,
            dataloader_config=loading,
            kwargs_handlers=[parallel],
            fsdp_plugin=plugin,
        )
    # Accelerate refuses float16 on the CPU, and bfloat16 on GPUs that cannot compute with it.
    except ValueError as error:
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION") if mixed_precision is None else mixed_precision
        raise TrainingError(
            f"mixed_precision={wanted!r} is not possible on this device: {error} Give mixed_precision='no', which "
            "computes in float32, or run on another device."
        ) from error
    accelerate_state.shard_on_cpu(runner, plugin)
    _check_sharding(runner)
    return runner


def _refuse_version_1(plugin: Any) -> None:
    """Raises TrainingError if several processes were started with version 1 of FSDP.

    Args:
        plugin: The FSDP plugin that the caller has given, or None. The environment then has the settings.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    version = int(os.environ.get("FSDP_VERSION", "1")) if plugin is None else plugin.fsdp_version
    if asked and version == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise _unsupported("version 1 of FSDP")


def _check_sharding(runner: Accelerator) -> None:
    """Raises TrainingError if `accelerate launch` asks for a way of sharding that xprune does not support."""
    kind, plugin = runner.distributed_type, getattr(runner.state, "fsdp_plugin", None)
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise _unsupported(kind.value)
    if runner.is_fsdp2 and plugin is not None:
        # Each process holds the weights of the model that it was given. So they need not be sent to it.
        plugin.cpu_ram_efficient_loading = False


def _unsupported(name: str) -> TrainingError:
    """Returns the error for a way of sharding that xprune does not support."""
    return TrainingError(
        f"xprune does not work with {name}. Use version 2 of FSDP (accelerate launch --use_fsdp --fsdp_version 2), or "
        "processes that each hold the whole model (accelerate launch --multi_gpu)."
    )


def is_main_process() -> bool:
    """Returns True if this process is the one that writes files and prints, else False."""
    with accelerate_state.kept():
        return accelerator().is_main_process


def check_loader(loader: Any) -> None:
    """Checks that a loader can be read several times.

    It reads no batch. So an empty loader is found later, in `batches`.

    Raises:
        DataError: The loader is an iterator, or it is not iterable.
    """
    if not isinstance(loader, Iterable):
        raise DataError(
            f"the loader is a {type(loader).__name__}. Give an iterable of batches, for example a torch DataLoader."
        )
    if isinstance(loader, Iterator):
        raise DataError(
            "the loader is an iterator, which can be read only once. Give a DataLoader or a list of batches."
        )


def known_length(loader: Any) -> int | None:
    """Returns the number of batches of a loader, or None if it is not known, as for a stream of data."""
    try:
        return len(loader)
    # A DataLoader over an IterableDataset has `__len__`, but calling it raises this error.
    except (TypeError, NotImplementedError):
        return None


def first_batch(loader: Any, task: Task) -> tuple[Any, Any]:
    """Reads the first batch of a loader.

    Each call returns the same batch, also if the loader shuffles by torch's random numbers. All random states, and the
    states of the loader's own generators, are restored afterwards.

    Args:
        loader: The batches.
        task: The task, which says how a batch is read.

    Returns:
        (inputs, targets) of the batch.

    Raises:
        DataError: The loader is empty, can be read only once, or its first batch does not fit the task.
    """
    return _unpacked(_first(loader), task)


def task_and_first_batch(loader: Any, task: Task, model: nn.Module) -> tuple[Task, tuple[Any, Any]]:
    """Reads the first batch of a loader, and finds the axis of its inputs along which samples lie.

    Args:
        loader: The batches.
        task: The task, which says how a batch is read. It is not changed.
        model: The model that the batches are for. It is not changed.

    Returns:
        (task, (inputs, targets)). If another sample axis was found than that of the given task, the task is a copy with
        this axis, see `with_batch_axis`. Otherwise it is the given task. The inputs and targets are as the returned
        task reads them.

    Raises:
        DataError: The loader is empty, can be read only once, or its first batch does not fit the task.
    """
    raw = _first(loader)
    batch = _unpacked(raw, task)
    with_axis = with_batch_axis(task, model, *batch)
    # A task with another sample axis may read the batch in another way.
    return with_axis, batch if with_axis is task else _unpacked(raw, with_axis)


def _first(loader: Any) -> Any:
    """Returns the first batch as the loader yields it. All random numbers come from a fixed seed."""
    check_loader(loader)
    before = [(generator, generator.get_state()) for generator in _generators(loader)]
    with seeded(0):
        for generator, _ in before:
            generator.manual_seed(0)
        try:
            batch = next(iter(loader), None)
        finally:
            for generator, state in before:
                generator.set_state(state)
    if batch is None:
        raise DataError(_EMPTY)
    return batch


def _unpacked(batch: Any, task: Task) -> tuple[Any, Any]:
    """Returns (inputs, targets) of a batch. Raises DataError if the batch has no samples."""
    inputs, targets = task.unpack(batch)
    if task.size(targets) == 0:
        raise DataError("the loader's first batch has no samples.")
    return inputs, targets


_EMPTY = "the loader is empty: it gave no batch. Check the dataset and drop_last."


def _generators(loader: Any) -> list[torch.Generator]:
    """Returns the random generators that a DataLoader and its samplers hold.

    A sampler without a generator uses torch's global random state.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {
        id(each): each for owner in owners if isinstance(each := getattr(owner, "generator", None), torch.Generator)
    }
    return list(found.values())


def prepared(runner: Accelerator, loader: Iterable[Any]) -> Iterable[Any]:
    """Returns a loader from which each process reads its part of each batch.

    Args:
        runner: The Accelerator.
        loader: The batches. It is not changed. With one process, it may be any iterable, and is returned as it is if it
            is not a DataLoader.

    Raises:
        DataError: There are several processes, and the loader is not a DataLoader, or has no batch size.
    """
    if isinstance(loader, DataLoader):
        copied = _with_copied_samplers(loader)
        if _batch_size(loader) is not None:
            prepared_loader: Iterable[Any] = runner.prepare_data_loader(copied)
            return prepared_loader
        # Accelerate cannot split such batches, but one process reads them whole.
        if runner.num_processes == 1:
            return copied
        raise DataError(
            f"{runner.num_processes} processes cannot share a DataLoader without a batch size. Give "
            "DataLoader(batch_size=...), or use one process."
        )
    if runner.num_processes > 1:
        raise DataError(
            f"{runner.num_processes} processes can only share a torch DataLoader, but the loader is a "
            f"{type(loader).__name__}. Give a DataLoader, or use one process."
        )
    return loader


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Returns the batch size of a DataLoader. None if its data set or its batch sampler makes batches of any size."""
    sizes = (loader.batch_size, getattr(loader.batch_sampler, "batch_size", None))
    return next((size for size in sizes if isinstance(size, int)), None)


def _with_copied_samplers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a shallow copy of a loader, with copies of its samplers.

    Accelerate changes the samplers of the loader that it prepares, and the caller's loader must not change. The copy
    has no generator: the seed of the order depends on the epoch, and workers are seeded by torch's global random state.
    """
    # The caller has already prepared such a loader with Accelerate.
    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        return loader
    copied, where = copy.copy(loader), "batch_sampler" if loader.batch_sampler is not None else "sampler"
    outer = _copied_sampler(getattr(loader, where))
    # A batch sampler reads its indices from a sampler inside it.
    if hasattr(outer, "sampler"):
        outer.sampler = _copied_sampler(outer.sampler)
    # DataLoader.__setattr__ does not allow a change of samplers, so the attributes are set directly.
    vars(copied).update({where: outer, "generator": None})
    return copied


def _copied_sampler(sampler: Any) -> Any:
    """Returns a copy of a sampler.

    The copy of a RandomSampler has no generator. The copy of any other sampler has a copy of its generator, if it has
    one.
    """
    copied = copy.copy(sampler)
    if isinstance(getattr(copied, "generator", None), torch.Generator):
        copied.generator = None if isinstance(copied, RandomSampler) else copied.generator.clone_state()
    return copied


def batches(
    runner: Accelerator, loader: Iterable[Any], task: Task, what: str, limit: int | None = None, *, done: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Yields the inputs and targets of each batch, and shows a progress bar in a terminal.

    Args:
        runner: The Accelerator. Batches are moved to its device.
        loader: The batches, as `prepared` returns them.
        task: The task, which says how a batch is read.
        what: A text for the progress bar and for errors.
        limit: The largest number of batches to read. If None, all batches are read.
        done: The number of batches that were skipped, and that the loader does not yield. The progress bar counts them.

    Raises:
        DataError: The loader yields no batch, or the first batch has no samples.
    """
    total = known_length(loader)
    stream: Iterable[Any] = islice(loader, limit)
    if runner.is_main_process:
        total = total if limit is None or total is None else min(total, limit)
        stream = track(
            stream,
            description=what,
            total=None if total is None else done + total,
            completed=done,
            transient=True,
            disable=not get_console().is_terminal,
        )
    empty = True
    for batch in stream:
        inputs, targets = task.unpack(_on_device(batch, runner.device))
        if empty and task.size(targets) == 0:
            raise DataError(f"{what}: the loader's first batch has no samples.")
        empty = False
        yield inputs, targets
    # With several processes, a process gets no batch if there are fewer samples than processes.
    if empty and not done and runner.num_processes == 1:
        raise DataError(f"{what}: {_EMPTY}")


def _on_device(batch: Any, device: torch.device) -> Any:
    """Returns a batch with all its tensors on a device."""
    moved = send_to_device(batch, device)
    # Accelerate does not look into dataclasses.
    if all(tensor.device.type == device.type for tensor in tensors_in(moved)):
        return moved
    return map_tensors(moved, lambda tensor: tensor.to(device))


def reduced(runner: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor over all processes."""
    total: torch.Tensor = runner.reduce(value, reduction="sum") if runner.num_processes > 1 else value
    return total


@stage()
def from_main(make: Callable[[], Made]) -> Made:
    """Returns what a function returns in the main process. With several processes, the others wait for it.

    Measured times differ from process to process, and all processes have to make the same plan.

    Raises:
        XPruneError: The error that the function has raised in the main process. All processes raise it.
    """
    runner = accelerator()
    if runner.num_processes == 1:
        return make()
    held: list[Any] = [None]
    if runner.is_main_process:
        try:
            held = [make()]
        except XPruneError as error:
            held = [error]
    broadcast_object_list(held)
    if isinstance(held[0], XPruneError):
        raise held[0]
    made: Made = held[0]
    return made


def warn_unless_ordered(loader: Any) -> None:
    """Warns if a resumed run may read other batches than the run that was killed.

    This happens if the order of the batches is not seeded. The order of lists and sequential samplers never changes.
    Accelerate seeds random samplers. About any other sampler nothing is known, so there is a warning.
    """
    if isinstance(loader, list):
        return
    sampler = getattr(loader, "sampler", None)
    plain = isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
    if plain and isinstance(sampler, (RandomSampler, SequentialSampler)):
        return
    warnings.warn(
        f"the order of a {type(loader).__name__} with a {type(sampler).__name__} is not known to be seeded. "
        "A run that is killed and resumed may read other batches and end with other weights.",
        stacklevel=6,
    )
