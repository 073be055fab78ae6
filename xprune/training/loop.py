"""Loop: gradient steps that stop on a bad loss and go on after a kill. Every learner of the package runs one."""

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
    """Whatever has a state: optimizers, schedules, `Weights`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Weights:
    """Every tensor of a module as a state, those included that its own state_dict leaves out."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        """Name -> tensor."""
        return dict(tensors(self.module))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies the values into the tensors that are there."""
        for name, tensor in tensors(self.module).items():
            tensor.copy_(state[name])

    def digest(self) -> str:
        """A short name for the values, so that another model's checkpoint is not taken for this one's."""
        return values_digest(self.module)


KEPT_EVERY = 300.0
"""Seconds after which the state is kept again, in the middle of a pass too: what a kill loses at most."""


class Loop:
    """Passes over a loader, with a step for each batch.

    Random numbers have two streams. Reading draws from one that is seeded at the start of each pass. Each step draws
    from one of its own. So a step draws the same numbers in a run that was killed and resumed as in one that was not,
    and nothing of the random state has to be kept.

    Args:
        runner: The Accelerator that the passes share batches by.
        task: How to read a batch.
        loader: Batches, with a length.
        what: Names the loop in the progress bar and in errors.
        steps: Steps to take. The loader is read as often as they need, and the last pass may end early.
        seed: Seeds both streams, with the number of the pass, of the step and of the process.
    """

    def __init__(
        self, runner: Accelerator, task: Task, loader: Iterable[Any], what: str, steps: int, seed: int = 0
    ) -> None:
        self.runner, self.task, self.what, self.steps, self.seed = runner, task, what, steps, seed
        self.per_epoch = length(loader, what)
        self.given, self.loader = loader, prepared(runner, loader)
        self.epoch = self.step = self.seen = 0
        self.folder: Path | None = None
        self.parts: Mapping[str, Stateful] = {}
        self.fingerprint: Mapping[str, Any] = {}
        self.kept_step: int | None = None
        self._kept_at = time.monotonic()

    def keep(self, folder: Path | None, parts: Mapping[str, Stateful], **fingerprint: Any) -> None:
        """Keeps the state of the parts in the folder, and goes on from what is there.

        The state is kept after each pass, and after a step where `KEPT_EVERY` seconds have gone by since it last was.
        Raises TrainingError where what is there belongs to a run with another fingerprint.
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
        """Takes the steps that are left."""
        epochs = -(-self.steps // self.per_epoch)
        self._kept_at = time.monotonic()
        for epoch in range(self.epoch, epochs):
            seed_all(self._seed("reading", epoch))
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(epoch)
            seen, left = self.seen, self.steps - self.step
            what, most = f"{self.what}, epoch {epoch + 1}/{epochs}", min(left + seen, self.per_epoch)
            stream = batches(self.runner, self.loader, self.task, what, most)
            for inputs, targets in islice(stream, seen, None):  # what was seen before a kill is read, and left
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
        """Writes the state, where there is a folder for it."""
        if self.folder is not None and self.runner.is_main_process:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            state = {"epoch": self.epoch, "step": self.step, "seen": self.seen, "parts": parts}
            checkpoint.write(self.folder, state, self.fingerprint)
        self.kept_step, self._kept_at = self.step, time.monotonic()

    def _seed(self, what: str, number: int) -> int:
        """What a stream of random numbers starts from: another number for each seed, pass or step, and process."""
        text = f"{what} {self.seed} {number} {self.runner.process_index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss; TrainingError where it is not finite on any process."""
        finite = torch.isfinite(reduced(self.runner, loss.detach().float()))  # every process stops, not one alone
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
    """Batches of the loader; DataError naming `what` where it has no length, or none of its batches."""
    try:
        batches = len(loader)
    except TypeError as error:  # no length, or a DataLoader over a stream, which has none either
        raise DataError(
            f"{what} needs a loader with a length, for its schedule; give a DataLoader or a list."
        ) from error
    if batches == 0:
        raise DataError(f"{what}: the loader is empty: its length is 0. Check the dataset, and drop_last against it.")
    return batches
