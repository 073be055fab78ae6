"""Loop: gradient steps that stop on a bad loss and go on after a kill. Every learner of the package runs one."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xprune.core.task import Task
from xprune.errors import DataError, TrainingError
from xprune.modules.copies import tensors
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
        digest = hashlib.sha256()
        for name, tensor in tensors(self.module).items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.double().sum().item():.6e}".encode())
        return digest.hexdigest()[:16]


class Loop:
    """Passes over a loader, with a step for each batch.

    what     names the loop in the progress bar and in errors
    steps    steps to take; the loader is read as often as they need, and the last pass may end early
    seed     each pass draws from seed and its number alone
    """

    def __init__(
        self, runner: Accelerator, task: Task, loader: Iterable[Any], what: str, steps: int, seed: int = 0
    ) -> None:
        self.runner, self.task, self.what, self.steps, self.seed = runner, task, what, steps, seed
        self.per_epoch = length(loader, what)
        self.given, self.loader = loader, prepared(runner, loader)
        self.epoch = self.step = 0
        self.folder: Path | None = None
        self.parts: Mapping[str, Stateful] = {}
        self.fingerprint: Mapping[str, Any] = {}

    def keep(self, folder: Path | None, parts: Mapping[str, Stateful], **fingerprint: Any) -> None:
        """Keeps the state of the parts in the folder after each pass, and goes on from what is there.

        Raises TrainingError where what is there belongs to a run with another fingerprint.
        """
        if folder is None:
            return
        warn_unless_ordered(self.given)
        self.folder, self.parts = folder, parts
        self.fingerprint = {**fingerprint, "seed": self.seed, "steps": self.steps, "per_epoch": self.per_epoch}
        state = checkpoint.read(folder, self.fingerprint)
        if state is not None:
            self.epoch, self.step = state["epoch"], state["step"]
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])

    def run(self, step: Callable[[Any, Any], None]) -> None:
        """Takes the steps that are left."""
        epochs = -(-self.steps // self.per_epoch)
        for epoch in range(self.epoch, epochs):
            torch.manual_seed(self.seed * 100_003 + epoch + 7919 * self.runner.process_index)
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(epoch)
            left = self.steps - self.step
            what = f"{self.what}, epoch {epoch + 1}/{epochs}"
            for inputs, targets in batches(self.runner, self.loader, self.task, what, min(left, self.per_epoch)):
                step(inputs, targets)
                self.step += 1
            self.epoch = epoch + 1
            if self.folder is not None and self.runner.is_main_process:
                checkpoint.write(self.folder, self._state(), self.fingerprint)
        if self.folder is not None and self.runner.is_main_process:
            checkpoint.clear(self.folder)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss; TrainingError where it is not finite on any process."""
        finite = torch.isfinite(reduced(self.runner, loss.detach().float()))  # every process stops, not one alone
        if not bool(finite):
            kept = f"the last good checkpoint is of epoch {self.epoch} in {self.folder}"
            if not self.folder or not self.epoch:
                kept = "there is no checkpoint"
            raise TrainingError(
                f"{self.what}: the loss is {loss.item()} at step {self.step} of {self.steps} "
                f"(epoch {self.epoch + 1}); {kept}. Lower lr, clip gradients, or look at the batch for NaN."
            )
        self.runner.backward(loss)

    def _state(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"epoch": self.epoch, "step": self.step, "parts": parts}


def length(loader: Any, what: str) -> int:
    """Batches of the loader; DataError naming `what` where it has no length."""
    if not hasattr(loader, "__len__"):
        raise DataError(f"{what} needs a loader with a length, for its schedule; give a DataLoader or a list.")
    return len(loader)
