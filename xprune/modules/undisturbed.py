"""Random numbers and settings of torch: how they are set for a while, and put back as the caller had them."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of every global source of random numbers.

    Attributes:
        python: State of the module `random`.
        numpy: State of numpy's global generator.
        torch: State of torch's CPU generator.
        devices: State of the accelerators' generators. None if there is no accelerator, or if it was not asked for.

    Example:
        >>> before = RandomState.taken(devices=False)
        >>> first = torch.rand(1)
        >>> before.put_back()
        >>> bool(first == torch.rand(1))
        True
    """

    python: Any
    numpy: Any
    torch: Tensor
    devices: Any

    @staticmethod
    def taken(devices: bool = True) -> "RandomState":
        """Returns the present state.

        Args:
            devices: Take the state of the accelerators too. This starts an accelerator that was not used yet.
        """
        module = _devices() if devices else None
        found = None
        if module is not None:
            found = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else module.get_rng_state()
        return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), found)

    def put_back(self) -> None:
        """Sets every source of random numbers to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        module = _devices()
        if self.devices is not None and module is not None:
            every = hasattr(module, "set_rng_state_all")
            (module.set_rng_state_all if every else module.set_rng_state)(self.devices)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds every global source of random numbers for a block. Afterwards their states are as before.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(2)
        >>> with seeded(3):
        ...     print(torch.equal(first, torch.rand(2)))
        True
    """
    before = RandomState.taken()
    seed_all(seed)
    try:
        yield
    finally:
        before.put_back()


def seed_all(seed: int) -> None:
    """Seeds Python, numpy, torch and the accelerators. Nothing is put back: see `seeded`."""
    random.seed(seed)
    # numpy takes seeds of 32 bits only.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Runs a block with the settings that torch starts with, and puts the caller's settings back afterwards.

    It is a context manager and a decorator. Inside the block gradients are on, inference mode is off, and new tensors
    are float32 on the CPU. Afterwards the caller's settings and all random states are back, also after an exception.
    """
    # An accelerator that nothing has used is not started for this: no random number was drawn from it.
    before, dtype = RandomState.taken(devices=_started()), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(before.put_back)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@cache
def _devices() -> Any:
    """Returns the module of the accelerators, such as `torch.cuda`. None without an accelerator."""
    return torch.get_device_module() if torch.accelerator.is_available() else None


def _started() -> bool:
    """Returns True if something has used the accelerators in this process."""
    module = _devices()
    return module is not None and bool(getattr(module, "is_initialized", lambda: True)())
