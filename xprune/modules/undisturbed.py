"""Changes the random states and settings of torch inside a block, and restores the caller's values afterwards."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xprune.modules.eager import eager


@dataclass(frozen=True)
class RandomState:
    """The states of all global random number generators: of Python, numpy, torch and the accelerators.

    Attributes:
        python: The state of the module `random`.
        numpy: The state of numpy's global generator.
        torch: The state of torch's CPU generator.
        devices: The state of the accelerators' generators. None if there is no accelerator, or if `taken` was called
            with devices=False.

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
        """Returns the present states of all generators.

        Args:
            devices: If True, the states of the accelerators are included. This initialises an accelerator that was not
                used before. If False, they are left out.
        """
        module = _devices() if devices else None
        found = None
        if module is not None:
            found = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else module.get_rng_state()
        return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), found)

    def put_back(self) -> None:
        """Restores all generators to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        module = _devices()
        if self.devices is not None and module is not None:
            every = hasattr(module, "set_rng_state_all")
            (module.set_rng_state_all if every else module.set_rng_state)(self.devices)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds all global random number generators inside a `with` block. After the block, their states are as before.

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
    """Seeds Python, numpy, torch and the accelerators. Unlike `seeded`, it does not restore the old states."""
    random.seed(seed)
    # numpy accepts only seeds of 32 bits.
    np.random.seed(seed % 2**32)
    if _devices() is None:
        # Without an accelerator, torch.manual_seed needs milliseconds: it keeps a stack trace for each kind of device.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Runs a block or a function with the default settings of torch, and restores the caller's settings afterwards.

    It is a context manager and a decorator. Inside, gradients are on, inference mode is off, and new tensors are
    float32 on the CPU. Compiled and checkpointed parts run as in `eager`. At the end, the caller's settings and all
    random states are restored, even if an exception is raised.
    """
    # If an accelerator was not used before, it is not initialised here. Its random state cannot have been used either.
    before, dtype = RandomState.taken(devices=_started()), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(before.put_back)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(eager())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@cache
def _devices() -> Any:
    """Returns torch's module for the accelerators, such as `torch.cuda`. Returns None if there is no accelerator."""
    return torch.get_device_module() if torch.accelerator.is_available() else None


def _started() -> bool:
    """Returns True if this process has used the accelerators already, else False."""
    module = _devices()
    return module is not None and bool(getattr(module, "is_initialized", lambda: True)())
