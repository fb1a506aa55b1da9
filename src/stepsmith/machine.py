"""What the numbers were measured on, for every record that is kept."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from stepsmith.version import __version__


def machine() -> dict[str, str | int]:
    """Processor, cores, threads and memory; the accelerator where there is one."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(pages / 2**30)
    except (ValueError, OSError, AttributeError):
        pass  # not every system tells
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def peak_memory() -> int:
    """The largest number of bytes of memory this process has held at once.

    On Linux of this process alone: what `getrusage` tells there begins with its parent's.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "stepsmith": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
