"""A check of a batch whose numbers are still on the device, so that they can be read later and all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LateCheck:
    """A test of a few numbers that a device has computed, or will have computed when they are read.

    To read a number, Python waits until the device has done all its work. A loop over many batches therefore collects
    the checks of several batches, and reads their numbers together.

    Args:
        numbers: The numbers, (numbers,).
        judge: A function of the numbers, as plain numbers of Python. It returns the error if something is wrong, else
            None.

    Example:
        >>> import torch
        >>> from xprune.errors import DataError
        >>> def judge(numbers):
        ...     return DataError(f"{numbers[0]} is too large.") if numbers[0] > 5 else None
        >>> LateCheck(torch.tensor([3]), judge).now()
        >>> LateCheck(torch.tensor([7]), judge).now()
        Traceback (most recent call last):
        ...
        xprune.errors.DataError: 7 is too large.
    """

    numbers: Tensor
    judge: Callable[[Sequence[float]], Exception | None]

    def now(self) -> None:
        """Reads the numbers at once. Raises the error that `judge` returns, if any."""
        error = self.judge(self.numbers.tolist())
        if error is not None:
            raise error
