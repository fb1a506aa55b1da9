"""What the numbers were measured on, for every record that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
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


def require_device(device: torch.device | str) -> None:
    """Check that tasks can run on a device.

    Raises:
        ValueError: no name of a device, a GPU or another accelerator that PyTorch does not see, a
            number of one that is not there, or a device that holds no numbers.
        TypeError: neither a name nor a `torch.device`.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a name such as cpu or cuda, got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    # PyTorch takes the number of a device modulo 256.
    if found is None or str(found) != str(device):
        raise ValueError(f"device {device!r}: no name of a device; use cpu, cuda or cuda:NUMBER")
    if found.type == "cpu":
        if found.index:
            raise ValueError(f"device {device}: there is one CPU to PyTorch; use cpu")
    elif found.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device}: this PyTorch sees no GPU; use cpu")
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise ValueError(
                f"device {device}: this PyTorch sees {torch.cuda.device_count()} GPUs, numbered "
                "from 0; use one of them"
            )
    elif found.type != "mps" or not torch.backends.mps.is_available() or found.index:
        raise ValueError(f"device {device}: not one that tasks can run on here; use cpu or cuda")


def start_peak(device: torch.device | str = "cpu") -> int:
    """Let `peak_memory` count from here on; returns the bytes held now.

    On a CPU of this process, on a GPU what PyTorch has allocated there. Where a system cannot begin
    anew (only Linux can), peaks go on from the process's beginning, and that so far is returned.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or the next peak hides in it
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return peak_memory()


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The largest number of bytes of memory held at once, since `start_peak` or the beginning.

    On Linux of this process alone: what `getrusage` tells there begins with its parent's.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        pass  # not Linux
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """Bytes of an entry of Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {name}")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {
        "stepsmith": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
    }
    if torch.cuda.is_available():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["triton"] = metadata.version("triton")
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
