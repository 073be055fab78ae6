"""Measures the time of several functions in turn, so that all of them meet the same disturbances."""

import gc
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch

from xprune.core.times import Times

_BLOCK = 2e-3
"""A block of calls takes at least this time, in seconds. The clock and the start of a block then do not matter."""

_WARM_UP = 2
"""The number of calls before the measurement. The first calls allocate memory and choose kernels."""


def interleaved(
    functions: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    least_rounds: int = 5,
    most_rounds: int = 200,
) -> Times:
    """Measures the times of functions in rounds. Each round calls each function.

    Every second round has the opposite order, so a computer that grows slower or faster favours none of them. A short
    function is called several times in a round.

    Args:
        functions: The functions. They take no arguments.
        device: The device that the functions work on. The clock waits until it has finished.
        seconds: Rounds are repeated for this time, in seconds.
        least_rounds: The smallest number of rounds, however long they take.
        most_rounds: The largest number of rounds.

    Returns:
        The times of one call of each function, in each round.

    Example:
        >>> times = interleaved([lambda: sum(range(9000)), lambda: sum(range(90))], torch.device("cpu"), seconds=0.05)
        >>> times.relative(1) < 1
        True
    """
    # A collection of garbage in the middle of a block would count as its time.
    collects = gc.isenabled()
    gc.disable()
    try:
        for function in functions:
            for _ in range(_WARM_UP):
                function()
        calls = [_calls(function, device) for function in functions]
        rounds: list[tuple[float, ...]] = []
        start = time.perf_counter()
        for number in count():
            done = number >= least_rounds and time.perf_counter() - start >= seconds
            if done or number >= most_rounds:
                break
            order = range(len(functions)) if number % 2 == 0 else range(len(functions) - 1, -1, -1)
            found = {index: _timed(functions[index], calls[index], device) for index in order}
            rounds.append(tuple(found[index] * 1e3 for index in range(len(functions))))
            gc.collect(0)
    finally:
        if collects:
            gc.enable()
    return Times(tuple(rounds))


def _calls(function: Callable[[], object], device: torch.device) -> int:
    """Returns how many calls of a function make a block, so that the block takes at least `_BLOCK` seconds."""
    once = min(_timed(function, 1, device) for _ in range(2))
    return max(1, round(_BLOCK / max(once, 1e-7)))


def _timed(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Returns the mean time of some calls of a function, in seconds."""
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait_for(device)
    return (time.perf_counter() - start) / calls


def _wait_for(device: torch.device) -> None:
    """Waits until an accelerator has finished its work. The CPU has always finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
