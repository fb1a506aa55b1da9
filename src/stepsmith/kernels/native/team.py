"""Running one compiled function on all of torch's threads.

A pool of our own would compete with torch's: OpenMP's threads spin for a while after each parallel
region, waiting for the next. The function therefore runs on that very team, where the OpenMP
library that torch is linked with can be asked; on a pool of Python threads elsewhere.

The function takes the address of a record of arguments and shares work out by itself: it takes the
next piece from a counter in the record (`maths.next_piece`) until none is left, whoever else does
the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@cache
def _parallel() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP library torch is linked with, or None.

    GNU's, LLVM's and Intel's libraries all export it on Linux, since compiled code calls it.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "stepsmith-native")


def address(tensor: Tensor, what: str, shape: tuple[int, ...]) -> int:
    """Where a tensor's float32 numbers begin, for compiled code, which cannot look for itself.

    Args:
        tensor: the tensor; its rows may lie apart, its numbers else not.
        what: it is, for the error.
        shape: that compiled code will read and write.

    Raises:
        ValueError: another dtype, device or shape, or numbers of a row that lie apart.
    """
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise ValueError(
            f"backend 'native' computes on float32 tensors on the CPU, got {tensor.dtype} on "
            f"{tensor.device} for {what}"
        )
    if tensor.shape != shape:
        raise ValueError(
            f"backend 'native': {what} should have shape {shape}, has {tuple(tensor.shape)}; give "
            "all tensors of one step for as many coordinates"
        )
    if not tensor.is_contiguous() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"backend 'native' needs the last dimension contiguous, got strides {tensor.stride()} "
            f"for {what}"
        )
    return tensor.data_ptr()


def whole_address(tensor: Tensor, what: str, shape: tuple[int, ...]) -> int:
    """As `address`, of a tensor whose rows follow one another.

    Raises:
        ValueError: as `address`, and for rows that lie apart.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"backend 'native' needs {what} contiguous, got strides {tensor.stride()}")
    return address(tensor, what, shape)


def run(function: int, arguments: np.ndarray, pieces: int) -> None:
    """Call a compiled function on as many of torch's threads as there is work for.

    Args:
        function: its address; it takes one pointer, touches no Python object and shares out work
            by the record's counter.
        arguments: the record, an array of one.
        pieces: how many pieces of work there are.
    """
    record = arguments.ctypes.data
    threads = min(torch.get_num_threads(), pieces)
    if threads <= 1:
        _callable(function)(record)
        return
    parallel = _parallel()
    if parallel is not None:
        parallel(function, record, threads, 0)
        return
    call = _callable(function)
    others = [_pool(threads - 1).submit(call, record) for _ in range(threads - 1)]
    call(record)
    for other in others:
        other.result()


@cache
def _callable(function: int) -> Callable[[int], None]:
    # A ctypes call lets other Python threads run meanwhile.
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
