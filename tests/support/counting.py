"""What counts: loaders that count how they are read, and functions whose calls are counted."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader


class Counted:
    """The batches of a loader, which count how often they are read."""

    def __init__(self, given: DataLoader[Any]) -> None:
        self.batches = list(given)
        self.started = self.whole = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.started += 1
        yield from self.batches[:-1]
        self.whole += 1  # a pass asks for the last batch, a look at the first does not
        yield self.batches[-1]

    @property
    def thrown_away(self) -> int:
        """Reads of a first batch alone."""
        return self.started - self.whole


def count_calls(monkeypatch: pytest.MonkeyPatch, *functions: Callable[..., Any]) -> Counter[str]:
    """Counts the calls of functions under every name that a module of the package has them by."""
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
