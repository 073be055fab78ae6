"""The training loop: it takes gradient steps, stops if the loss is not finite, and can resume a killed run.

Fine-tuning, the criterion `xpruner` and the selection `learned` use it.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xprune.core.checkpoint import Checkpoint
from xprune.core.late_check import LateCheck
from xprune.core.task import Task
from xprune.errors import DataError, TrainingError
from xprune.modules.copies import tensors
from xprune.modules.digest import values_digest
from xprune.modules.undisturbed import seed_all, seeded
from xprune.training import checkpoint
from xprune.training.checks import Checks, read_every
from xprune.training.reading import Reading
from xprune.training.runtime import batches, known_length, reduced, warn_unless_ordered


class Stateful(Protocol):
    """Any object whose state a checkpoint can keep, such as an optimizer, a schedule or `Weights`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state: dicts, lists, tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restores a state that `state_dict` returned."""
        ...


class Weights:
    """The state of a module for a checkpoint: all its parameters and buffers.

    Unlike the state_dict of the module, it also has the buffers that are not persistent.

    Args:
        module: The module.

    Example:
        >>> sorted(Weights(nn.Linear(4, 2)).state_dict())
        ['bias', 'weight']
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        """Returns name -> tensor. The tensors are those of the module, not copies."""
        return dict(tensors(self.module))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies the values of a state into the tensors of the module.

        The tensors stay the same objects, since an optimizer may refer to them.
        """
        for name, tensor in tensors(self.module).items():
            tensor.copy_(state[name])

    def digest(self) -> str:
        """Returns a hash of all values.

        A checkpoint keeps it, so that a run with another model cannot continue from it.
        """
        return values_digest(self.module)


class Loop:
    """Epochs over a loader, with an update for each batch, or for each few batches.

    Random numbers are seeded in two ways. For reading, they are seeded for each epoch and for each batch, see
    `Reading`. For an update, they are seeded before each update. So a resumed run uses the same random numbers as a run
    that was never killed, and a checkpoint needs no random state.

    Whether losses are finite and batches fit the task is checked for each step. On an accelerator, the results of these
    checks are read every `READ_EVERY` steps, at the end of an epoch, and before a checkpoint is written, because the
    reading waits for the device. So an error may come some steps late. It still names the step that caused it, and no
    weights from after this step are ever handed out or written.

    Args:
        runner: The Accelerator that splits batches over the processes.
        task: The task, which says how a batch is read.
        loader: The batches. If the loader has no length, an epoch ends when it yields no more batches.
        what: The name of the loop in the progress bar and in errors.
        steps: The number of updates. There are as many epochs as this needs, and the last epoch may end early.
        seed: The seed of all random numbers. It is combined with the number of the epoch, batch or update, and of the
            process.
        accumulate: The number of batches whose gradients are added up for one update. The last update of an epoch has
            the batches that are left.

    Attributes:
        step: The number of updates made.
        epoch: The number of epochs completed.
        first: True while `run` calls its function with the first batch of an update. Old gradients are deleted then.
        last: True while `run` calls its function with the last batch of an update. The weights are changed then.

    Raises:
        DataError: The loader has no batch.

    Example:
        >>> from xprune import Classification
        >>> from xprune.training.runtime import accelerator, stage
        >>> loader = [(torch.randn(8, 4), torch.arange(8) % 2)]
        >>> with stage():
        ...     loop = Loop(accelerator(), Classification(), loader, "counting", steps=3)
        ...     loop.run(lambda inputs, targets: None)
        >>> loop.step, loop.epoch
        (3, 3)
    """

    def __init__(
        self,
        runner: Accelerator,
        task: Task,
        loader: Iterable[Any],
        what: str,
        steps: int,
        seed: int = 0,
        accumulate: int = 1,
    ) -> None:
        self.runner, self.task, self.what, self.steps, self.seed = runner, task, what, steps, seed
        self.accumulate = accumulate
        self.per_epoch = None if known_length(loader) is None else length(loader, what)
        self.given = loader
        self.reading = Reading(runner, loader, lambda epoch, batch: self._seed("reading", epoch, batch))
        # `seen` is the number of batches of the current epoch for which an update was made.
        self.epoch = self.step = self.seen = 0
        self.first = self.last = True
        self.checkpoint: Checkpoint | None = None
        self.parts: Mapping[str, Stateful] = {}
        self.fingerprint: Mapping[str, Any] = {}
        self.kept_step: int | None = None
        self._weight: Tensor | None = None
        self.checks, self.read_every = Checks(runner, what, steps), read_every(runner.device)
        self._kept_at = time.monotonic()

    def keep(self, where: Checkpoint | Path | None, parts: Mapping[str, Stateful], **fingerprint: Any) -> None:
        """Makes `run` write checkpoints to a folder. If the folder holds a checkpoint of the run, continues from it.

        Args:
            where: The folder, and how often a checkpoint is written. If None, nothing is written.
            parts: All objects that an update changes, by name, such as the model and the optimizer.
            fingerprint: Plain values that identify the run. A checkpoint with other values is refused.

        Raises:
            TrainingError: The checkpoint is damaged or belongs to another run.
        """
        kept = Checkpoint.of(where)
        if kept is None:
            return
        warn_unless_ordered(self.given)
        self.checkpoint, self.parts = kept, parts
        self.fingerprint = {**fingerprint, "seed": self.seed, "steps": self.steps, "per_epoch": self.per_epoch}
        state = checkpoint.read(kept.path, self.fingerprint)
        if state is not None:
            self.epoch, self.step, self.seen = state["epoch"], state["step"], state["seen"]
            self.kept_step = self.step
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])

    def run(self, step: Callable[[Any, Any], None], model: nn.Module | None = None) -> None:
        """Makes all remaining updates, and removes the checkpoint at the end.

        Args:
            step: A function of (inputs, targets) that computes the gradients of one batch with `backward`, and changes
                the weights if `last` is True.
            model: The model as Accelerate has prepared it. With several processes, its gradients are then exchanged
                only once for each update. None means that they are exchanged for each batch.
        """
        # The number of epochs, rounded up. It is not known for a loader without a length.
        epochs = -(-self.steps // updates_of(self.per_epoch, self.accumulate)) if self.per_epoch else None
        self._kept_at = time.monotonic()
        while self.step < self.steps:
            epoch, before, seen = self.epoch, self.step, self.seen
            seed_all(self._seed("reading", epoch))
            loader, skip = self.reading.epoch(epoch, seen)
            # The number of batches to use in this epoch, without those for which an update was made already.
            most = (self.steps - self.step) * self.accumulate
            most = most if self.per_epoch is None else min(most, self.per_epoch - seen)
            what = f"{self.what}, epoch {epoch + 1}" + (f"/{max(epochs, epoch + 1)}" if epochs else "")
            stream = batches(self.runner, loader, self.task, what, skip + most, done=seen - skip)
            stream = islice(stream, skip, None)
            while group := list(islice(stream, self.accumulate)):
                self._update(group, step, model)
                self.step, self.seen = self.step + 1, self.seen + len(group)
                # All processes read at the same updates. Only then may a checkpoint be written.
                if self.step % self.read_every and not self._counted_due():
                    continue
                self.checks.read()
                if self.step < self.steps and self._is_due():
                    self._keep()
            self.checks.read()
            self.epoch, self.seen = epoch + 1, 0
            if self.step == before and not seen:
                raise DataError(f"{what}: the loader gave no batch, after {self.step} of {self.steps} steps.")
        if self.checkpoint is not None and self.runner.is_main_process:
            checkpoint.clear(self.checkpoint.path)

    def _update(
        self, group: Sequence[tuple[Any, Any]], step: Callable[[Any, Any], None], model: nn.Module | None
    ) -> None:
        """Calls a function with each batch of one update."""
        weights = self._weights([targets for _, targets in group])
        with seeded(self._seed("step", self.step)):
            for index, ((inputs, targets), self._weight) in enumerate(zip(group, weights, strict=True)):
                self.first, self.last = index == 0, index == len(group) - 1
                alone = not self.last and model is not None
                with self.runner.no_sync(model) if alone else nullcontext():
                    step(inputs, targets)

    def _weights(self, targets: Sequence[Any]) -> Sequence[Tensor | None]:
        """Returns the factor of the loss of each batch of an update. None means 1.

        A loss is the mean over the samples of a batch that count. With these factors, the gradients of an update are
        those of the mean over all its samples, also if some batches or some processes have fewer samples.
        """
        if len(targets) == 1 and self.runner.num_processes == 1:
            return [None]
        counts = torch.tensor([float(self.task.counted(each)) for each in targets], device=self.runner.device)
        # Accelerate takes the mean of the gradients of all processes, and not their sum.
        factors = counts * self.runner.num_processes / reduced(self.runner, counts.sum())
        return list(factors)

    def _counted_due(self) -> bool:
        """Returns True if a checkpoint has to be written after this number of updates. All processes agree."""
        steps = None if self.checkpoint is None else self.checkpoint.steps
        return steps is not None and self.step % steps == 0

    def _is_due(self) -> bool:
        """Returns True if a checkpoint has to be written now, else False."""
        if self.checkpoint is None:
            return False
        minutes = self.checkpoint.minutes
        if self._counted_due():
            return True
        if minutes is None:
            return False
        return time.monotonic() - self._kept_at >= 60 * minutes

    def _keep(self) -> None:
        """Writes a checkpoint from the main process."""
        if self.checkpoint is not None and self.runner.is_main_process:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            # After the last batch of an epoch, a resumed run has to begin with the next epoch.
            ended = self.seen == self.per_epoch
            epoch, seen = (self.epoch + 1, 0) if ended else (self.epoch, self.seen)
            state = {"epoch": epoch, "step": self.step, "seen": seen, "parts": parts}
            checkpoint.write(self.checkpoint.path, state, self.fingerprint)
        self.kept_step, self._kept_at = self.step, time.monotonic()

    def _seed(self, stream: str, *numbers: int) -> int:
        """Returns a seed. It differs between reading and updates, between the numbers, and between processes.

        Args:
            stream: What the seed is for: "reading" or "step".
            numbers: The number of the epoch, and of the batch in it. Or the number of the update.
        """
        text = f"{stream} {self.seed} {' '.join(map(str, numbers))} {self.runner.process_index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    def check(self, outputs: Any, targets: Any) -> None:
        """Checks that a batch fits the task, see `Task.check`. The result may be read some steps later.

        Raises:
            DataError: The batch does not fit, and the check was made at once.
        """
        self.checks.add_task(self.step, self.task, outputs, targets)

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of a loss with respect to the weights, and checks that the loss is finite.

        The check may be read some steps later. It then raises TrainingError, whose message names the step and the last
        checkpoint.
        """
        epoch = self.epoch + 1

        def judge(losses: Sequence[float]) -> Exception | None:
            if math.isfinite(losses[0]):
                return None
            kept = f"the last good checkpoint is of step {self.kept_step} in {self.checkpoint and self.checkpoint.path}"
            if self.checkpoint is None or self.kept_step is None:
                kept = "there is no checkpoint"
            return TrainingError(
                f"the loss is {losses[0]} (epoch {epoch}); {kept}. Lower lr, clip gradients, or look for NaN in the "
                "batch."
            )

        self.checks.add(self.step, LateCheck(loss.detach().float().reshape(1), judge))
        # Where nothing is queued, the error comes before the gradients of this loss are computed.
        if self.read_every == 1:
            self.checks.read()
        self.runner.backward(loss if self._weight is None else loss * self._weight)


def updates_of(batches: int, accumulate: int) -> int:
    """Returns the number of updates in an epoch. The last one may have fewer batches than the others.

    Args:
        batches: The number of batches in the epoch.
        accumulate: The number of batches for one update.
    """
    return -(-batches // accumulate)


def length(loader: Any, what: str) -> int:
    """Returns the number of batches of a loader. A number of epochs says how many steps to take only if it is known.

    Args:
        loader: The loader.
        what: The name of the training, for the error.

    Raises:
        DataError: The loader has no length, or its length is 0.
    """
    batches = known_length(loader)
    if batches is None:
        raise DataError(
            f"{what} needs a loader with a length, or the number of steps, for its schedule of the learning rate. Give "
            "Finetune(steps=...), the number of batches to train on, or a loader with a length, such as a DataLoader "
            "over a map-style dataset or a list of batches."
        )
    if batches == 0:
        raise DataError(f"{what}: the loader is empty: its length is 0. Check the dataset and drop_last.")
    return batches
