"""Runtime: devices, processes, loaders and progress, all of it Accelerate's and rich's."""

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
    """What every public function that trains or measures runs in. Also a decorator.

    The caller's Accelerate, random states and torch settings are afterwards as they were, whatever happens.
    """
    with undisturbed(), accelerate_state.kept():
        yield


def accelerator(mixed_precision: str | None = None, *, even_batches: bool = False, unused: bool = False) -> Accelerator:
    """An Accelerator for one stage: batches are global (split over the processes) and shuffled by a seed.

    Call it inside `stage()`, which puts the caller's own back.

    Args:
        mixed_precision: "no", "fp16" or "bf16". None: what `accelerate launch` was told.
        even_batches: Complete the last batch from the first, so that every process takes every step. Sums over
            samples want False.
        unused: Some weights get no gradient, which several processes have to look for.
    """
    accelerate_state.forget()  # stages may differ in precision
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, even_batches=even_batches)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=unused)
    return Accelerator(mixed_precision=mixed_precision, dataloader_config=loading, kwargs_handlers=[parallel])


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    with accelerate_state.kept():
        return accelerator().is_main_process


def check_loader(loader: Any) -> None:
    """Raises DataError for what cannot be read several times. Reads no batch: `batches` tells of an empty loader."""
    if not isinstance(loader, Iterable):
        raise DataError(
            f"the loader is a {type(loader).__name__}; give an iterable of batches, e.g. a torch DataLoader."
        )
    if isinstance(loader, Iterator):
        raise DataError(
            "the loader is an iterator, which can be read only once; give a DataLoader or a list of batches."
        )


def first_batch(loader: Any, task: Task) -> tuple[Any, Any]:
    """Reads the loader's first batch, the same at every call where the loader draws from torch.

    The random states, the loader's own generators included, are afterwards as they were.

    Args:
        loader: Batches.
        task: How to read one.

    Returns:
        Its inputs and targets.

    Raises:
        DataError: The loader is empty or can be read only once, or its first batch does not fit the task.
    """
    return _unpacked(_first(loader), task)


def task_and_first_batch(loader: Any, task: Task, model: nn.Module) -> tuple[Task, tuple[Any, Any]]:
    """Reads the loader's first batch, and tells the task by it along which axis the samples lie.

    Args:
        loader: Batches.
        task: How to read one. It is not changed.
        model: What the batches are for. It is not changed.

    Returns:
        The task, or a copy that knows the axis (see `with_batch_axis`), and the inputs and targets that it reads.

    Raises:
        DataError: As `first_batch`.
    """
    raw = _first(loader)
    batch = _unpacked(raw, task)
    told = with_batch_axis(task, model, *batch)
    return told, batch if told is task else _unpacked(raw, told)


def _first(loader: Any) -> Any:
    """The first batch as the loader gives it."""
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
    inputs, targets = task.unpack(batch)
    if task.size(targets) == 0:
        raise DataError("the loader's first batch has no samples.")
    return inputs, targets


_EMPTY = "the loader is empty: it gave no batch. Check the dataset, and drop_last against its length."


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw from, where they have their own."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {
        id(each): each for owner in owners if isinstance(each := getattr(owner, "generator", None), torch.Generator)
    }
    return list(found.values())


def prepared(runner: Accelerator, loader: Iterable[Any]) -> Iterable[Any]:
    """The loader as the processes share it. Raises DataError for several processes and no DataLoader."""
    if isinstance(loader, DataLoader):
        prepared_loader: Iterable[Any] = runner.prepare_data_loader(_own(loader))
        return prepared_loader
    if runner.num_processes > 1:
        raise DataError(
            f"{runner.num_processes} processes need a torch DataLoader to share, got a {type(loader).__name__}."
        )
    return loader


def _own(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy of the loader with samplers of its own: Accelerate puts seeded ones into what it is given.

    The copy has no generator: the order is seeded by epoch, and workers are seeded by the global state.
    """
    if isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):  # the caller's Accelerate has prepared it
        return loader
    made, where = copy.copy(loader), "batch_sampler" if loader.batch_sampler is not None else "sampler"
    outer = _own_sampler(getattr(loader, where))
    if hasattr(outer, "sampler"):
        outer.sampler = _own_sampler(outer.sampler)
    vars(made).update({where: outer, "generator": None})  # a DataLoader refuses to be changed by setattr
    return made


def _own_sampler(sampler: Any) -> Any:
    """A copy of a sampler, with a generator of its own where it has one."""
    made = copy.copy(sampler)
    if isinstance(getattr(made, "generator", None), torch.Generator):
        made.generator = None if isinstance(made, RandomSampler) else made.generator.clone_state()
    return made


def batches(
    runner: Accelerator, loader: Iterable[Any], task: Task, what: str, limit: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """(inputs, targets) on the runner's device, with a progress bar; at most `limit` batches.

    Raises DataError where there is no batch, or the first one has no samples.
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
    if empty and runner.num_processes == 1:  # of several processes, one may get nothing of a small batch
        raise DataError(f"{what}: {_EMPTY}")


def reduced(runner: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    total: torch.Tensor = runner.reduce(value, reduction="sum") if runner.num_processes > 1 else value
    return total


def warn_unless_ordered(loader: Any) -> None:
    """Accelerate seeds random samplers by epoch and sequential ones need no seed; of others nothing is known."""
    if isinstance(loader, list):
        return
    sampler = getattr(loader, "sampler", None)
    plain = isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
    if plain and isinstance(sampler, (RandomSampler, SequentialSampler)):
        return
    warnings.warn(
        f"the order of a {type(loader).__name__} with a {type(sampler).__name__} is not known to be seeded: "
        "a run that is killed and resumed may see other batches and end elsewhere.",
        stacklevel=6,
    )
