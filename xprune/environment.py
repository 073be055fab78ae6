"""The version of xprune, and what figures were measured on: hardware and versions, for every record."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__version__ = "0.2.0.dev0"
"""The one place that holds the version. The package, its wheel, the site and saved results read it from here."""

PACKAGES = ("torch", "timm", "torch-pruning", "accelerate", "captum", "numpy")


def hardware() -> dict[str, Any]:
    """Processor, cores, threads, memory, GPU."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions that can change a figure.

    Returns:
        Name -> version, of xprune itself, of Python and of the packages that compute.
    """
    packages = {package: version(package) for package in PACKAGES}
    return {"xprune": __version__, "python": platform.python_version(), **packages}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
