"""Counts how often loaders are read and functions are called."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader


class Counted:
    """The batches of a loader, with a count of how often they are read.

    Attributes:
        batches: The batches.
        started: How often the first batch was read.
        whole: How often all batches were read.
    """

    def __init__(self, given: DataLoader[Any]) -> None:
        self.batches = list(given)
        self.started = self.whole = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.started += 1
        yield from self.batches[:-1]
        # Only a whole pass gets here. Whoever needs one example reads the first batch and stops.
        self.whole += 1
        yield self.batches[-1]

    @property
    def thrown_away(self) -> int:
        """Returns how often only a part of the batches was read."""
        return self.started - self.whole


def count_calls(monkeypatch: pytest.MonkeyPatch, *functions: Callable[..., Any]) -> Counter[str]:
    """Counts the calls of functions, and returns the counts by name.

    A function is replaced in every module of xprune that has imported it, since each has its own name for it.
    """
    calls: Counter[str] = Counter()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return counted

    for function in functions:
        counted = counting(function)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "xprune":
                for attribute, value in list(vars(module).items()):
                    if value is function:
                        monkeypatch.setattr(module, attribute, counted)
    return calls
