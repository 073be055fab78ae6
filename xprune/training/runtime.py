"""Runtime: devices, processes, seeds, loaders and progress, all of it Accelerate's and rich's."""

import warnings
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, send_to_device
from rich import get_console
from rich.progress import track
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from xprune.core.task import Task
from xprune.errors import DataError
from xprune.modules.seeds import seeded as seeded


def accelerator(mixed_precision: str | None = None, *, even_batches: bool = False, unused: bool = False) -> Accelerator:
    """An Accelerator for one stage: batches are global (split over the processes) and shuffled by a seed.

    mixed_precision   "no", "fp16", "bf16"; None: what `accelerate launch` was told
    even_batches      complete the last batch from the first, so that every process takes every step; sums over
                      samples want False
    unused            some weights get no gradient, which several processes have to look for
    """
    AcceleratorState._reset_state(
        reset_partial_state=False
    )  # stages may differ in precision; processes stay as they are
    GradientState._reset_state()
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, even_batches=even_batches)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=unused)
    return Accelerator(mixed_precision=mixed_precision, dataloader_config=loading, kwargs_handlers=[parallel])


def check_loader(loader: Any, task: Task) -> Any:
    """The first batch's inputs, see `first_batch`."""
    return first_batch(loader, task)[0]


def first_batch(loader: Any, task: Task) -> tuple[Any, Any]:
    """The first batch's inputs and targets, after a look at the loader.

    Raises DataError where it is empty, can be read only once, or its batches do not fit the task.
    """
    if not isinstance(loader, Iterable):
        raise DataError(
            f"the loader is a {type(loader).__name__}; give an iterable of batches, e.g. a torch DataLoader."
        )
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws from the global state
        stream = iter(loader)
        once, batch = stream is loader, None if stream is loader else next(stream, None)
    if once:
        raise DataError(
            "the loader is an iterator, which can be read only once; give a DataLoader or a list of batches."
        )
    if batch is None:
        raise DataError("the loader is empty: it gave no batch. Check the dataset, and drop_last against its length.")
    inputs, targets = task.unpack(batch)
    if task.size(targets) == 0:
        raise DataError("the loader's first batch has no samples.")
    return inputs, targets


def prepared(runner: Accelerator, loader: Iterable[Any]) -> Iterable[Any]:
    """The loader as the processes share it. Raises DataError for several processes and no DataLoader."""
    if isinstance(loader, DataLoader):
        prepared_loader: Iterable[Any] = runner.prepare_data_loader(loader)
        return prepared_loader
    if runner.num_processes > 1:
        raise DataError(
            f"{runner.num_processes} processes need a torch DataLoader to share, got a {type(loader).__name__}."
        )
    return loader


def batches(
    runner: Accelerator, loader: Iterable[Any], task: Task, what: str, limit: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """(inputs, targets) on the runner's device, with a progress bar; at most `limit` batches."""
    total = len(loader) if isinstance(loader, Sized) else None
    stream: Iterable[Any] = islice(loader, limit)
    if runner.is_main_process:
        total = total if limit is None or total is None else min(total, limit)
        stream = track(stream, description=what, total=total, transient=True, disable=not get_console().is_terminal)
    for batch in stream:
        inputs, targets = task.unpack(send_to_device(batch, runner.device))
        yield inputs, targets


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
        stacklevel=4,
    )
