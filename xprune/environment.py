"""The version of xprune, and the hardware and versions that figures were measured with. Every record holds them."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__version__ = "0.2.0.dev0"
"""The version of xprune. The package, its wheel, the documentation and saved results all read it from here."""

# Packages whose version can change a measured figure.
PACKAGES = ("torch", "timm", "torch-pruning", "accelerate", "captum", "numpy")


def hardware() -> dict[str, Any]:
    """Returns "cpu" (its name), "cores", "threads" (of torch), "memory_gib", and "gpu" (its name) if there is one."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    # Windows has no sysconf, and some systems do not know these two names.
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Returns the versions that can change a figure: of xprune, of Python and of `PACKAGES`, by name.

    Example:
        >>> list(versions())[:3]
        ['xprune', 'python', 'torch']
    """
    packages = {package: version(package) for package in PACKAGES}
    return {"xprune": __version__, "python": platform.python_version(), **packages}


def _cpu() -> str:
    """Returns the name of the processor, or its architecture where the system does not say the name."""
    # Linux only.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
