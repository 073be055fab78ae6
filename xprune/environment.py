"""The version of xprune, and functions that describe the hardware and the versions of packages.

Results contain these descriptions, because measured values depend on them.
"""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__version__ = "0.2.0.dev0"
"""The version of xprune. The package metadata, the documentation and saved results all read it from here."""

# The packages whose version can change a measured value.
PACKAGES = ("torch", "timm", "torch-pruning", "accelerate", "captum", "numpy")


def hardware() -> dict[str, Any]:
    """Returns a description of the hardware of this computer.

    Returns:
        A dict. "cpu": the name of the processor. "cores": the number of cores. "threads": the number of threads that
        torch uses. "memory_gib": the memory in GiB, if the system says it. "gpu": the name of the GPU, if CUDA has one.
    """
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    # Windows has no `os.sysconf`, and some other systems do not know these two names.
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Returns the versions that can change a measured value, by name: of xprune, of Python and of `PACKAGES`.

    Example:
        >>> list(versions())[:3]
        ['xprune', 'python', 'torch']
    """
    packages = {package: version(package) for package in PACKAGES}
    return {"xprune": __version__, "python": platform.python_version(), **packages}


def _cpu() -> str:
    """Returns the name of the processor. Returns its architecture, such as "x86_64", if the name is not known."""
    # This file exists only on Linux.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
