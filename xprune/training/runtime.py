"""Prepares devices, processes and loaders with Accelerate, and shows progress with rich.

Learners, criteria and `evaluate` read their batches by it. So batches are split, seeded and checked in one way.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, send_to_device
from rich import get_console
from rich.progress import track
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from xprune.core.task import Task, with_batch_axis
from xprune.errors import DataError
from xprune.modules.undisturbed import seeded, undisturbed
from xprune.training import accelerate_state


@contextmanager
def stage() -> Iterator[None]:
    """Restores the caller's Accelerate, random states and torch settings at the end of a block.

    It does so after an exception too. Each public function that trains or measures runs in a stage. Use it as a context
    manager or as a decorator.
    """
    with undisturbed(), accelerate_state.kept():
        yield


def accelerator(mixed_precision: str | None = None, *, even_batches: bool = False, unused: bool = False) -> Accelerator:
    """Creates an Accelerator for one stage. Batches are split over the processes, and samplers get a seed.

    Call it inside `stage()`, which puts the caller's Accelerator back.

    Args:
        mixed_precision: "no", "fp16" or "bf16". None for the choice of `accelerate launch`.
        even_batches: True to complete the last batch with samples of the first, so that every process takes every step.
            False for sums over samples, which must count each sample once.
        unused: True if some weights get no gradient. With several processes, DistributedDataParallel then looks for
            them at each step.
    """
    # Accelerate keeps the settings of the first Accelerator of a process. Stages may differ in precision.
    accelerate_state.forget()
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, even_batches=even_batches)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=unused)
    return Accelerator(mixed_precision=mixed_precision, dataloader_config=loading, kwargs_handlers=[parallel])


def is_main_process() -> bool:
    """Returns True if this process is the one that writes files and prints, else False."""
    with accelerate_state.kept():
        return accelerator().is_main_process


def check_loader(loader: Any) -> None:
    """Checks that a loader can be read several times. Reads no batch, so an empty loader is only found in `batches`.

    Raises:
        DataError: The loader is an iterator, or not iterable.
    """
    if not isinstance(loader, Iterable):
        raise DataError(
            f"the loader is a {type(loader).__name__}. Give an iterable of batches, e.g. a torch DataLoader."
        )
    if isinstance(loader, Iterator):
        raise DataError(
            "the loader is an iterator, which can be read only once. Give a DataLoader or a list of batches."
        )


def first_batch(loader: Any, task: Task) -> tuple[Any, Any]:
    """Reads the first batch of a loader.

    It is the same batch at every call, also if the loader shuffles by torch's random numbers. All random states and the
    loader's own generators are put back.

    Args:
        loader: Batches.
        task: How to read a batch.

    Returns:
        The inputs and the targets of the batch.

    Raises:
        DataError: The loader is empty, can be read only once, or its first batch does not fit the task.
    """
    return _unpacked(_first(loader), task)


def task_and_first_batch(loader: Any, task: Task, model: nn.Module) -> tuple[Task, tuple[Any, Any]]:
    """Reads the first batch of a loader, and finds the axis of the samples with it.

    Args:
        loader: Batches.
        task: How to read a batch. It is not changed.
        model: The model that the batches are for. It is not changed.

    Returns:
        (task, (inputs, targets)). The task is the one given, or a copy with the axis that was found, see
        `with_batch_axis`. It has read the inputs and targets.

    Raises:
        DataError: The loader is empty, can be read only once, or its first batch does not fit the task.
    """
    raw = _first(loader)
    batch = _unpacked(raw, task)
    with_axis = with_batch_axis(task, model, *batch)
    # A task that knows another axis may read the batch in another way.
    return with_axis, batch if with_axis is task else _unpacked(raw, with_axis)


def _first(loader: Any) -> Any:
    """Returns the first batch as the loader gives it, with all random numbers from a fixed seed."""
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
    """Returns the inputs and targets of a batch. Raises DataError if it has no samples."""
    inputs, targets = task.unpack(batch)
    if task.size(targets) == 0:
        raise DataError("the loader's first batch has no samples.")
    return inputs, targets


_EMPTY = "the loader is empty: it gave no batch. Check the dataset, and drop_last against its length."


def _generators(loader: Any) -> list[torch.Generator]:
    """Returns the generators that a DataLoader and its samplers hold. Those without one draw from the global state."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {
        id(each): each for owner in owners if isinstance(each := getattr(owner, "generator", None), torch.Generator)
    }
    return list(found.values())


def prepared(runner: Accelerator, loader: Iterable[Any]) -> Iterable[Any]:
    """Returns a loader that gives each process its part of each batch. With one process, any iterable does.

    Args:
        runner: The Accelerator.
        loader: Batches. It is not changed.

    Raises:
        DataError: There are several processes, and the loader is not a DataLoader.
    """
    if isinstance(loader, DataLoader):
        prepared_loader: Iterable[Any] = runner.prepare_data_loader(_with_copied_samplers(loader))
        return prepared_loader
    if runner.num_processes > 1:
        raise DataError(
            f"{runner.num_processes} processes need a torch DataLoader to share, but the loader is a "
            f"{type(loader).__name__}."
        )
    return loader


def _with_copied_samplers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a shallow copy of a loader, with copies of its samplers.

    Accelerate puts seeded samplers into the loader that it prepares, which would change the caller's loader. The copy
    has no generator: the order is seeded by the epoch, and workers are seeded by the global random state.
    """
    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):  # the caller's Accelerate has prepared it
        return loader
    copied, where = copy.copy(loader), "batch_sampler" if loader.batch_sampler is not None else "sampler"
    outer = _copied_sampler(getattr(loader, where))
    if hasattr(outer, "sampler"):  # a batch sampler draws from a sampler inside
        outer.sampler = _copied_sampler(outer.sampler)
    vars(copied).update({where: outer, "generator": None})  # DataLoader.__setattr__ refuses to change samplers
    return copied


def _copied_sampler(sampler: Any) -> Any:
    """Returns a copy of a sampler. A RandomSampler loses its generator, any other sampler gets a copy of it."""
    copied = copy.copy(sampler)
    if isinstance(getattr(copied, "generator", None), torch.Generator):
        copied.generator = None if isinstance(copied, RandomSampler) else copied.generator.clone_state()
    return copied


def batches(
    runner: Accelerator, loader: Iterable[Any], task: Task, what: str, limit: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Yields the inputs and targets of each batch, and shows a progress bar in a terminal.

    Args:
        runner: The Accelerator, to whose device batches are moved.
        loader: Batches, see `prepared`.
        task: How to read a batch.
        what: The text of the progress bar, also for errors.
        limit: The largest number of batches to read. None for all.

    Raises:
        DataError: There is no batch, or the first one has no samples.
    """
    total = len(loader) if isinstance(loader, Sized) else None
    stream: Iterable[Any] = islice(loader, limit)
    if runner.is_main_process:
        total = total if limit is None or total is None else min(total, limit)
        stream = track(stream, description=what, total=total, transient=True, disable=not get_console().is_terminal)
    empty = True
    for batch in stream:
        inputs, targets = task.unpack(send_to_device(batch, runner.device))
        if empty and task.size(targets) == 0:
            raise DataError(f"{what}: the loader's first batch has no samples.")
        empty = False
        yield inputs, targets
    # With several processes, a small batch may not be enough for all of them.
    if empty and runner.num_processes == 1:
        raise DataError(f"{what}: {_EMPTY}")


def reduced(runner: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor over all processes."""
    total: torch.Tensor = runner.reduce(value, reduction="sum") if runner.num_processes > 1 else value
    return total


def warn_unless_ordered(loader: Any) -> None:
    """Warns if a resumed run may see other batches than before, since the order of the loader may not be seeded.

    Lists and sequential samplers always have the same order. Accelerate seeds random samplers by the epoch. Nothing is
    known of other samplers.
    """
    if isinstance(loader, list):
        return
    sampler = getattr(loader, "sampler", None)
    plain = isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
    if plain and isinstance(sampler, (RandomSampler, SequentialSampler)):
        return
    warnings.warn(
        f"the order of a {type(loader).__name__} with a {type(sampler).__name__} is not known to be seeded. "
        "A run that is killed and resumed may see other batches and end with other weights.",
        stacklevel=6,
    )
