"""The training loop: it takes gradient steps, stops if the loss is not finite, and can resume a killed run.

Fine-tuning, the criterion `xpruner` and the selection `learned` use it.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xprune.core.late_check import LateCheck
from xprune.core.task import Task
from xprune.errors import DataError, TrainingError
from xprune.modules.copies import tensors
from xprune.modules.digest import values_digest
from xprune.modules.undisturbed import seed_all, seeded
from xprune.training import checkpoint
from xprune.training.checks import Checks, read_every
from xprune.training.runtime import batches, known_length, prepared, warn_unless_ordered


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


KEPT_EVERY = 300.0
"""The time in seconds after which the next checkpoint is written, also within an epoch.

A killed run loses at most the work of about this time.
"""


class Loop:
    """Epochs over a loader, with one step for each batch.

    Random numbers are seeded in two ways. For reading batches, they are seeded at the start of each epoch. For a step,
    they are seeded before each step. So a resumed run uses the same random numbers in a step as a run that was never
    killed, and a checkpoint needs no random state.

    Whether losses are finite and batches fit the task is checked for each step. On an accelerator, the results of these
    checks are read every `READ_EVERY` steps, at the end of an epoch, and before a checkpoint is written, because the
    reading waits for the device. So an error may come some steps late. It still names the step that caused it, and no
    weights from after this step are ever handed out or written.

    Args:
        runner: The Accelerator that splits batches over the processes.
        task: The task, which says how a batch is read.
        loader: The batches. If the loader has no length, an epoch ends when it yields no more batches.
        what: The name of the loop in the progress bar and in errors.
        steps: The number of steps to take. There are as many epochs as this needs, and the last epoch may end early.
        seed: The seed of all random numbers. It is combined with the number of the epoch or step, and of the process.

    Attributes:
        step: The number of steps taken.
        epoch: The number of epochs completed.

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
        self, runner: Accelerator, task: Task, loader: Iterable[Any], what: str, steps: int, seed: int = 0
    ) -> None:
        self.runner, self.task, self.what, self.steps, self.seed = runner, task, what, steps, seed
        self.per_epoch = None if known_length(loader) is None else length(loader, what)
        self.given, self.loader = loader, prepared(runner, loader)
        # `seen` is the number of batches of the current epoch for which a step was taken.
        self.epoch = self.step = self.seen = 0
        self.folder: Path | None = None
        self.parts: Mapping[str, Stateful] = {}
        self.fingerprint: Mapping[str, Any] = {}
        self.kept_step: int | None = None
        self.checks, self.read_every = Checks(runner, what, steps), read_every(runner.device)
        self._kept_at = time.monotonic()

    def keep(self, folder: Path | None, parts: Mapping[str, Stateful], **fingerprint: Any) -> None:
        """Makes `run` write checkpoints to a folder. If the folder holds a checkpoint of the run, continues from it.

        A checkpoint is written after each epoch, and after a step if the last checkpoint is more than `KEPT_EVERY`
        seconds old.

        Args:
            folder: The folder. If None, nothing is written.
            parts: All objects that a step changes, by name, such as the model and the optimizer.
            fingerprint: Plain values that identify the run. A checkpoint with other values is refused.

        Raises:
            TrainingError: The checkpoint is damaged or belongs to another run.
        """
        if folder is None:
            return
        warn_unless_ordered(self.given)
        self.folder, self.parts = folder, parts
        self.fingerprint = {**fingerprint, "seed": self.seed, "steps": self.steps, "per_epoch": self.per_epoch}
        state = checkpoint.read(folder, self.fingerprint)
        if state is not None:
            self.epoch, self.step, self.seen = state["epoch"], state["step"], state["seen"]
            self.kept_step = self.step
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])

    def run(self, step: Callable[[Any, Any], None]) -> None:
        """Takes all remaining steps, and removes the checkpoint at the end.

        Args:
            step: A function of (inputs, targets) that makes one step with a batch. It calls `backward` if it needs
                gradients.
        """
        # The number of epochs, rounded up. It is not known for a loader without a length.
        epochs = -(-self.steps // self.per_epoch) if self.per_epoch else None
        self._kept_at = time.monotonic()
        while self.step < self.steps:
            epoch, before = self.epoch, self.step
            seed_all(self._seed("reading", epoch))
            # Accelerate's samplers shuffle with a seed that depends on the epoch.
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(epoch)
            seen, most = self.seen, self.steps - self.step + self.seen
            most = most if self.per_epoch is None else min(most, self.per_epoch)
            what = f"{self.what}, epoch {epoch + 1}" + (f"/{max(epochs, epoch + 1)}" if epochs else "")
            stream = batches(self.runner, self.loader, self.task, what, most)
            # Batches for which the killed run has taken a step are read and skipped, so that reading uses the same
            # random numbers.
            for inputs, targets in islice(stream, seen, None):
                with seeded(self._seed("step", self.step)):
                    step(inputs, targets)
                self.step, self.seen = self.step + 1, self.seen + 1
                # All processes read at the same steps. Only then may a checkpoint be written.
                if self.step % self.read_every:
                    continue
                self.checks.read()
                if self.seen < most and time.monotonic() - self._kept_at >= KEPT_EVERY:
                    self._keep()
            self.checks.read()
            self.epoch, self.seen = epoch + 1, 0
            if self.step == before and not seen:
                raise DataError(f"{what}: the loader gave no batch, after {self.step} of {self.steps} steps.")
            if self.step < self.steps:
                self._keep()
        if self.folder is not None and self.runner.is_main_process:
            checkpoint.clear(self.folder)

    def _keep(self) -> None:
        """Writes a checkpoint from the main process, if `keep` was given a folder."""
        if self.folder is not None and self.runner.is_main_process:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            state = {"epoch": self.epoch, "step": self.step, "seen": self.seen, "parts": parts}
            checkpoint.write(self.folder, state, self.fingerprint)
        self.kept_step, self._kept_at = self.step, time.monotonic()

    def _seed(self, stream: str, number: int) -> int:
        """Returns a seed. It differs between reading and steps, between epochs or steps, and between processes.

        Args:
            stream: What the seed is for: "reading" or "step".
            number: The number of the epoch, or of the step.
        """
        text = f"{stream} {self.seed} {number} {self.runner.process_index}"
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
            kept = f"the last good checkpoint is of step {self.kept_step} in {self.folder}"
            if self.folder is None or self.kept_step is None:
                kept = "there is no checkpoint"
            return TrainingError(
                f"the loss is {losses[0]} (epoch {epoch}); {kept}. Lower lr, clip gradients, or look for NaN in the "
                "batch."
            )

        self.checks.add(self.step, LateCheck(loss.detach().float().reshape(1), judge))
        # Where nothing is queued, the error comes before the gradients of this loss are computed.
        if self.read_every == 1:
            self.checks.read()
        self.runner.backward(loss)


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
