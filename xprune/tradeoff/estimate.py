"""Says how long the work for a frontier takes: an estimate before, and the rest during the work."""

import time
from itertools import islice

import torch
from rich import get_console

from xprune.modules.copies import shared_copy
from xprune.pipeline import Run
from xprune.training.runtime import accelerator, batches, is_main_process, known_length, prepared

_BATCHES = 3
"""The number of held-out batches that are timed. The first one is not measured, as it allocates memory."""


def say(line: str) -> None:
    """Prints a line on the terminal, if this is the main process."""
    if is_main_process():
        get_console().print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Returns a time as a short text.

    Example:
        >>> duration(4.2), duration(130), duration(7300)
        ('4 s', '2 min 10 s', '2 h 1 min')
    """
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@torch.no_grad()
def seconds_of_measuring(run: Run) -> float | None:
    """Estimates how long the dense model takes for all held-out batches, from the first few.

    Returns:
        The time in seconds. None if the number of batches is not known.
    """
    total = known_length(run.data)
    if total is None:
        return None
    runner = accelerator()
    model = shared_copy(run.model).to(runner.device)
    ends = [time.perf_counter()]
    stream = batches(runner, prepared(runner, run.data), run.task, "timing", _BATCHES)
    for inputs, _ in islice(stream, _BATCHES):
        run.task.forward(model, inputs)
        if runner.device.type != "cpu":
            torch.accelerator.synchronize(runner.device)
        ends.append(time.perf_counter())
    steps = len(ends) - 1
    # With one batch, its own time is all that is known.
    each = (ends[-1] - ends[1]) / (steps - 1) if steps > 1 else ends[1] - ends[0]
    return each * total


def announce(scoring: float | None, each: float | None, models: int) -> None:
    """Prints how long the work will take.

    Args:
        scoring: The estimated time of the scoring, in seconds. None if it is not known.
        each: The estimated time for measuring one model, in seconds. None if it is not known.
        models: The number of models to measure.
    """
    parts = [f"scoring {duration(scoring)}" if scoring is not None else "scoring: not known"]
    measuring = None if each is None else each * models
    of = f"{models} models"
    parts.append(f"{of}: not known" if measuring is None else f"{of} {duration(measuring)}")
    known = [part for part in (scoring, measuring) if part is not None]
    total = f"about {duration(sum(known))}" if len(known) == 2 else "not known in full"
    say(f"Estimated time: {total} ({', '.join(parts)}).")


class Progress:
    """Prints a line for each model that is done, with the time that the rest will take.

    Args:
        models: The number of models to measure.

    Example:
        >>> progress = Progress(2)
        >>> progress.done("50 %: accuracy 91.2")  # doctest: +ELLIPSIS
        1 of 2: 50 %: accuracy 91.2 (... left)
        >>> progress.done("30 %: accuracy 80.1")
        2 of 2: 30 %: accuracy 80.1
    """

    def __init__(self, models: int) -> None:
        self._models, self._done, self._before = models, 0, 0
        self._start = time.perf_counter()

    def restart(self) -> None:
        """Starts the clock again, after work that is not that of a model."""
        self._start, self._before = time.perf_counter(), self._done

    def done(self, what: str, rest_known: bool = True) -> None:
        """Prints that a model is done.

        Args:
            what: The text to print.
            rest_known: False if the other models will take another time than this one. The time that is left is then
                not printed.
        """
        self._done += 1
        left = (self._models - self._done) * rest_known
        rest = (time.perf_counter() - self._start) / (self._done - self._before) * left
        say(f"{self._done} of {self._models}: {what}" + (f" ({duration(rest)} left)" if left else ""))
