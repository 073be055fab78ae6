"""Collects the checks of several steps, so that a training loop rarely waits for the device."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from xprune.core.late_check import LateCheck
from xprune.core.task import Task
from xprune.errors import TrainingError

READ_EVERY = 20
"""The number of steps after which the checks of these steps are read, on an accelerator.

On the CPU, numbers are there as soon as they are computed. So the checks are read after each step.
"""


def read_every(device: torch.device) -> int:
    """Returns the number of steps after which checks are read on a device, see `READ_EVERY`."""
    return 1 if device.type == "cpu" else READ_EVERY


@dataclass(frozen=True)
class _Waiting:
    """A check that was not read yet, and the number of its step."""

    step: int
    check: LateCheck


class Checks:
    """The checks of the steps since the last reading.

    Args:
        runner: The Accelerator.
        what: The name of the loop in errors.
        steps: The number of steps of the whole loop, for errors.

    Example:
        >>> from xprune.errors import DataError
        >>> from xprune.training.runtime import accelerator, stage
        >>> with stage():
        ...     checks = Checks(accelerator(), "counting", steps=9)
        ...     checks.add(3, LateCheck(torch.tensor([0.5]), lambda numbers: None))
        ...     checks.add(4, LateCheck(torch.tensor([7.0]), lambda numbers: DataError("seven is not allowed.")))
        ...     checks.read()
        Traceback (most recent call last):
        ...
        xprune.errors.DataError: counting, step 4 of 9: seven is not allowed.
    """

    def __init__(self, runner: Accelerator, what: str, steps: int) -> None:
        self.runner, self.what, self.steps = runner, what, steps
        self._waiting: list[_Waiting] = []

    def add(self, step: int, check: LateCheck) -> None:
        """Adds a check of a step. It is read by the next call of `read`."""
        self._waiting.append(_Waiting(step, check))

    def add_task(self, step: int, task: Task, outputs: Any, targets: Any) -> None:
        """Adds the check of a task for a batch, see `Task.check`.

        The check of a task that does not implement `Task.late_check` itself is made at once.

        Raises:
            DataError: The batch does not fit the task, and its check was made at once.
        """
        # The method is not looked up in base classes. A subclass may have a loss that breaks on wrong labels before the
        # check is read.
        if "late_check" not in vars(type(task)):
            task.check(outputs, targets)
            return
        check = task.late_check(outputs, targets)
        if check is not None:
            self.add(step, check)

    def read(self) -> None:
        """Reads all checks that were added since the last reading.

        With several processes, all of them have to call this method at the same step, and all of them raise an error
        together.

        Raises:
            Exception: The error of the first step at which something was wrong. Its message names the step.
            TrainingError: Something was wrong only on another process.
        """
        waiting, self._waiting = self._waiting, []
        step, error = self._first_error(waiting)
        if self.runner.num_processes > 1:
            steps = self.runner.gather(torch.tensor([step], device=self.runner.device)).tolist()
            if max(steps) >= 0 and error is None:
                error = TrainingError(
                    f"{self.what}, step {min(s for s in steps if s >= 0)} of {self.steps}: another process has stopped "
                    "here. Its error says why."
                )
        if error is not None:
            raise error

    def _first_error(self, waiting: list[_Waiting]) -> tuple[int, Exception | None]:
        """Returns the first step at which something was wrong on this process, and its error. Else (-1, None)."""
        values = _read_together([each.check.numbers for each in waiting])
        for each, numbers in zip(waiting, values, strict=True):
            error = each.check.judge(numbers)
            if error is not None:
                return each.step, type(error)(f"{self.what}, step {each.step} of {self.steps}: {error}")
        return -1, None


def _read_together(tensors: list[Tensor]) -> list[list[float]]:
    """Returns the numbers of many small tensors. All tensors of one dtype on one device are read in one go."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    found: list[list[float]] = [[] for _ in tensors]
    for kind in kinds:
        places = [place for place, tensor in enumerate(tensors) if (tensor.dtype, tensor.device) == kind]
        numbers = iter(torch.cat([tensors[place].flatten() for place in places]).tolist())
        for place in places:
            found[place] = [next(numbers) for _ in range(tensors[place].numel())]
    return found
