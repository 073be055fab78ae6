"""Reads the batches of a training epoch by epoch, so that a resumed run can continue in the middle of an epoch.

The batches of a map-style data set are read with random numbers that depend only on the seed, the epoch and the number
of the batch. So a resumed run need not read the batches for which the killed run has taken its steps: Accelerate's
`skip_first_batches` leaves out their indices. Other loaders, such as streams and lists, have to be read from the
beginning of the epoch.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from xprune.modules.undisturbed import RandomState, seed_all
from xprune.training.runtime import prepared

Seed = Callable[[int, int], int]
"""A function of the number of the epoch and the number of the batch in it. It returns the seed for the batch."""


class Reading:
    """The batches of a training, for one epoch at a time.

    Args:
        runner: The Accelerator that splits batches over the processes.
        loader: The batches. It is not changed.
        seed: The seed for reading each batch.

    Attributes:
        loader: The batches as Accelerate prepares them.

    Raises:
        DataError: There are several processes, and they cannot share the loader.

    Example:
        >>> from xprune.training.runtime import accelerator, stage
        >>> loader = DataLoader([0.0, 1.0, 2.0, 3.0], batch_size=2)
        >>> with stage():
        ...     batches, to_skip = Reading(accelerator(), loader, lambda epoch, batch: batch).epoch(0, skip=1)
        ...     [batch.tolist() for batch in batches], to_skip
        ([[2.0, 3.0]], 0)
    """

    def __init__(self, runner: Accelerator, loader: Iterable[Any], seed: Seed) -> None:
        self.loader = prepared(runner, loader)
        self._seeds: _Seeds | None = None
        # `prepared` returns loaders that are not copied as they are. They are the caller's, and must not change.
        if self.loader is not loader:
            self._seeds = _seed_batches(self.loader, seed)

    def epoch(self, number: int, skip: int) -> tuple[Iterable[Any], int]:
        """Returns the batches of an epoch without the first ones.

        Args:
            number: The number of the epoch. Samplers that shuffle use it as a seed.
            skip: The number of batches to skip.

        Returns:
            (batches, number of batches that the caller still has to skip). The second number is 0 if the batches could
            be skipped without reading them, else `skip`.
        """
        # Accelerate's samplers shuffle with a seed that depends on the epoch.
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(number)
        if self._seeds is None:
            return self.loader, skip
        self._seeds.set_epoch(number)
        return (skip_first_batches(self.loader, skip) if skip else self.loader), 0


@dataclass(frozen=True)
class _Batch:
    """The indices of the samples of a batch, and the seed with which the batch is read."""

    seed: int
    indices: Any


class _Seeds(BatchSampler):
    """A batch sampler that adds a seed to each batch of another batch sampler.

    Args:
        batches: The other batch sampler. Its attributes can be read here too, because Accelerate looks for some.
        seed: The seed for each batch.
    """

    def __init__(self, batches: Any, seed: Seed) -> None:
        self.batches, self.seed, self._epoch = batches, seed, 0

    def __iter__(self) -> Iterator[Any]:
        for number, indices in enumerate(self.batches):
            yield _Batch(self.seed(self._epoch, number), indices)

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # it is not set yet while Python unpickles the object
            raise AttributeError(name)
        return getattr(self.batches, name)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, also of the other batch sampler if it knows epochs."""
        self._epoch = epoch
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)


class _Seeded(Dataset[Any]):
    """A data set that reads whole batches, each with the random numbers of its seed.

    The samples are collated here too, because functions such as mixup use random numbers. Reading does not change the
    random state outside. So a sampler that draws indices while batches are read draws the same ones if some batches are
    skipped.

    Args:
        samples: The data set of the caller. Its attributes can be read and set here too, for example in a
            `worker_init_fn`.
        collate: The function that makes a batch from a list of samples.
    """

    def __init__(self, samples: Any, collate: Callable[[Any], Any]) -> None:
        vars(self).update(samples=samples, collate=collate)

    def __getitems__(self, batch: _Batch) -> Any:
        # In a worker, the accelerators must not be used, so their states are not read.
        before = RandomState.taken(devices=False)
        seed_all(batch.seed)
        try:
            # torch's loaders use this method too, if the data set has it.
            many = getattr(self.samples, "__getitems__", None)
            found = many(batch.indices) if many else [self.samples[index] for index in batch.indices]
            return self.collate(found)
        finally:
            before.put_back()

    def __len__(self) -> int:
        return len(self.samples)

    def __getattr__(self, name: str) -> Any:
        if name in ("samples", "collate"):  # they are not set yet while Python unpickles the object
            raise AttributeError(name)
        return getattr(self.samples, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.samples, name, value)

    def __reduce__(self) -> Any:
        return type(self), (self.samples, self.collate)


def _seed_batches(loader: Any, seed: Seed) -> _Seeds | None:
    """Makes a loader read each batch with its own seed. The loader is changed.

    Args:
        loader: A copy of the caller's loader, as `prepared` returns it.
        seed: The seed for each batch.

    Returns:
        The batch sampler that holds the seeds. None if the loader does not read batches by their indices.
    """
    if isinstance(loader, DataLoaderDispatcher) or not isinstance(loader, DataLoader):
        return None
    # Accelerate puts the loader that reads the batches inside another one.
    inner = loader.base_dataloader if isinstance(loader, DataLoaderShard) else loader
    # Without a batch sampler, the data set is asked for one item at a time.
    if isinstance(inner.dataset, IterableDataset) or inner.batch_sampler is None:
        return None
    seeds = _Seeds(inner.batch_sampler, seed)
    dataset = _Seeded(inner.dataset, inner.collate_fn)
    # DataLoader.__setattr__ does not allow a change of the data set or of samplers, so the attributes are set directly.
    vars(inner).update(batch_sampler=seeds, dataset=dataset, collate_fn=_as_it_is)
    return seeds


def _as_it_is(batch: Any) -> Any:
    """Returns a batch that was collated already."""
    return batch
