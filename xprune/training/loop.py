"""The training loop of every learner: gradient steps that stop at a bad loss, and that a killed run can resume."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xprune.core.task import Task
from xprune.errors import DataError, TrainingError
from xprune.modules.copies import tensors
from xprune.modules.digest import values_digest
from xprune.modules.undisturbed import seed_all, seeded
from xprune.training import checkpoint
from xprune.training.runtime import batches, prepared, reduced, warn_unless_ordered


class Stateful(Protocol):
    """An object whose state a checkpoint can keep: an optimizer, a schedule, `Weights`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state: dicts, lists, tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Continues from a state."""
        ...


class Weights:
    """All parameters and buffers of a module as a state, also buffers that its own state_dict leaves out.

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
        """Copies values into the tensors of the module, which optimizers may hold."""
        for name, tensor in tensors(self.module).items():
            tensor.copy_(state[name])

    def digest(self) -> str:
        """Returns a short name for the values, by which a checkpoint knows the model that it belongs to."""
        return values_digest(self.module)


KEPT_EVERY = 300.0
"""Seconds after which the state is kept again, also within an epoch. A killed run loses at most this time."""


class Loop:
    """Epochs over a loader, with one gradient step for each batch.

    Random numbers come from two streams. Reading batches draws from a stream that is seeded at the start of each epoch.
    Each step draws from a stream that is seeded for this step. So a step of a resumed run draws the same numbers as the
    step of a run that was never killed, and a checkpoint needs no random state.

    Args:
        runner: The Accelerator that splits batches over the processes.
        task: How to read a batch.
        loader: Batches, with a length.
        what: The name of the loop in the progress bar and in errors.
        steps: The number of steps to take. Epochs are repeated until then, and the last one may end early.
        seed: The seed of both streams. The numbers of epoch, step and process are mixed in.

    Attributes:
        step: The number of steps taken.
        epoch: The number of epochs completed.

    Raises:
        DataError: The loader has no length or no batch.

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
        self.per_epoch = length(loader, what)
        self.given, self.loader = loader, prepared(runner, loader)
        self.epoch = self.step = self.seen = 0  # seen: batches of the current epoch
        self.folder: Path | None = None
        self.parts: Mapping[str, Stateful] = {}
        self.fingerprint: Mapping[str, Any] = {}
        self.kept_step: int | None = None
        self._kept_at = time.monotonic()

    def keep(self, folder: Path | None, parts: Mapping[str, Stateful], **fingerprint: Any) -> None:
        """Keeps the state in a folder from now on, and continues from the checkpoint that is there.

        The state is kept after each epoch, and after a step if `KEPT_EVERY` seconds have passed since the last time.

        Args:
            folder: The folder. None to keep nothing.
            parts: All that a step changes, by name, such as the model and the optimizer.
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
        """Takes all steps that are left, and removes the checkpoint at the end.

        Args:
            step: Makes one gradient step from the inputs and targets of a batch. It calls `backward`.
        """
        epochs = -(-self.steps // self.per_epoch)  # rounded up
        self._kept_at = time.monotonic()
        for epoch in range(self.epoch, epochs):
            seed_all(self._seed("reading", epoch))
            if hasattr(self.loader, "set_epoch"):  # Accelerate's seeded samplers shuffle by the epoch
                self.loader.set_epoch(epoch)
            seen, steps_left = self.seen, self.steps - self.step
            what, most = f"{self.what}, epoch {epoch + 1}/{epochs}", min(steps_left + seen, self.per_epoch)
            stream = batches(self.runner, self.loader, self.task, what, most)
            # Batches that a killed run has seen are read and skipped, so that reading draws the same random numbers.
            for inputs, targets in islice(stream, seen, None):
                with seeded(self._seed("step", self.step)):
                    step(inputs, targets)
                self.step, self.seen = self.step + 1, self.seen + 1
                if self.seen < most and time.monotonic() - self._kept_at >= KEPT_EVERY:
                    self._keep()
            self.epoch, self.seen = epoch + 1, 0
            if self.epoch < epochs:
                self._keep()
        if self.folder is not None and self.runner.is_main_process:
            checkpoint.clear(self.folder)

    def _keep(self) -> None:
        """Writes a checkpoint from the main process, if there is a folder for it."""
        if self.folder is not None and self.runner.is_main_process:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            state = {"epoch": self.epoch, "step": self.step, "seen": self.seen, "parts": parts}
            checkpoint.write(self.folder, state, self.fingerprint)
        self.kept_step, self._kept_at = self.step, time.monotonic()

    def _seed(self, stream: str, number: int) -> int:
        """Returns the seed of a stream of random numbers. It differs between runs, epochs or steps, and processes.

        Args:
            stream: The name of the stream: "reading" or "step".
            number: The number of the epoch or of the step.
        """
        text = f"{stream} {self.seed} {number} {self.runner.process_index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of a loss.

        Raises:
            TrainingError: The loss is not finite on one of the processes. The message names the step and the last
                checkpoint.
        """
        # The sum over all processes: if one loss is NaN, all processes stop, and none waits for the others.
        finite = torch.isfinite(reduced(self.runner, loss.detach().float()))
        if not bool(finite):
            kept = f"the last good checkpoint is of step {self.kept_step} in {self.folder}"
            if self.folder is None or self.kept_step is None:
                kept = "there is no checkpoint"
            raise TrainingError(
                f"{self.what}: the loss is {loss.item()} at step {self.step} of {self.steps} "
                f"(epoch {self.epoch + 1}); {kept}. Lower lr, clip gradients, or look at the batch for NaN."
            )
        self.runner.backward(loss)


def length(loader: Any, what: str) -> int:
    """Returns the number of batches of a loader.

    Args:
        loader: The loader.
        what: The name of the training, for the error.

    Raises:
        DataError: The loader has no length, or its length is 0.
    """
    try:
        batches = len(loader)
    except TypeError as error:  # a DataLoader over an IterableDataset has `__len__`, but it raises this error
        raise DataError(
            f"{what} needs a loader with a length, for its schedule. Give a DataLoader over a map-style dataset, or a "
            "list of batches."
        ) from error
    if batches == 0:
        raise DataError(f"{what}: the loader is empty: its length is 0. Check the dataset, and drop_last against it.")
    return batches
