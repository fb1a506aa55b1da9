"""Scalar functions that the compiler turns into vector instructions, and raw memory.

tanh is a rational function (`scripts/fit_tanh.py`), relative error 3e-7, and sigmoid(x) =
(1 + tanh(x / 2)) / 2; the logarithm splits off the exponent and sums the series of the area tangent
of (m - 1) / (m + 1), relative error 2e-7. nan stays nan in all of them.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportReturnType=false
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

FLAGS = {"contract", "reassoc", "nsz", "arcp"}
"""Fast mathematics, but nan stays nan and infinity infinity."""

inline = njit(error_model="numpy", fastmath=FLAGS, inline="always")

_f = np.float32
_TOP = _f(8.0)
_P0, _P1, _P2, _P3, _P4 = map(
    _f, (1.0, 1.344452202e-01, 3.571627196e-03, 2.189512452e-05, 1.523102888e-08)
)
_Q0, _Q1, _Q2, _Q3, _Q4 = map(
    _f, (1.0, 4.677785039e-01, 2.616455406e-02, 3.411338839e-04, 8.522703183e-07)
)
_L1, _L2, _L3, _L4 = map(_f, (1 / 3, 1 / 5, 1 / 7, 1 / 9))
_LN2 = _f(math.log(2))
_HALF, ONE, _TWO = _f(0.5), _f(1.0), _f(2.0)
_ROOT_HALF_BITS, _ONE_BITS = np.int32(0x3F3504F3), np.int32(0x3F800000)


jit = njit(nogil=True, error_model="numpy", fastmath=FLAGS)
"""For the inner functions. They are compiled into their entry, which alone is cached on disk."""


@cache
def _stamp() -> int:
    """A number that changes with any source of this package: numba's cache looks only at the file
    of the function it caches, not at those it calls."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return int(digest[:15], 16) + 1


def entry(make: Callable[[int], Callable[[Any], None]]) -> int:
    """Compile a function of one address, cached on disk where there is a place to write.

    Args:
        make: given a stamp (never zero), returns the function, which must use the stamp.

    Returns:
        The address of the machine code, callable with the C convention and without Python's lock.
    """
    signature, function = types.void(types.voidptr), make(_stamp())
    try:
        compiled = cfunc(signature, cache=True)(function)
    except RuntimeError:  # a read-only installation and no home
        compiled = cfunc(signature)(function)
    _KEPT.append(compiled)
    return compiled.address


_KEPT: list[Any] = []


@intrinsic
def _bits(typing, number):
    """The bits of a float32 as int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _number(typing, bits):
    """The float32 of these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


def _as_pointer(context, builder, signature, arguments):
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


@intrinsic
def numbers(typing, address):
    """The float32 numbers from an address on, for `numba.carray`."""
    return types.CPointer(types.float32)(types.int64), _as_pointer


@intrinsic
def integers(typing, address):
    """The int64 numbers from an address on, for `numba.carray`."""
    return types.CPointer(types.int64)(types.int64), _as_pointer


@intrinsic
def next_piece(typing, address):
    """Take the next number from a counter that other threads take from too."""

    def generate(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), generate


@inline
def tanh(x):
    """The hyperbolic tangent; exactly 1 from 8 on: a saturated gate has no gradient."""
    z = x * x
    p = (((_P4 * z + _P3) * z + _P2) * z + _P1) * z + _P0
    q = (((_Q4 * z + _Q3) * z + _Q2) * z + _Q1) * z + _Q0
    return math.copysign(ONE, x) if abs(x) > _TOP else x * p / q


@inline
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return _HALF + _HALF * tanh(_HALF * x)


@inline
def log(x):
    """The natural logarithm of a normal positive number, or nan."""
    bits = _bits(x)
    # The exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)), where the series is short.
    exponent = ((bits - _ROOT_HALF_BITS + _ONE_BITS) >> np.int32(23)) - np.int32(127)
    mantissa = _number(bits - (exponent << np.int32(23)))
    s = (mantissa - ONE) / (mantissa + ONE)
    z = s * s
    series = (((_L4 * z + _L3) * z + _L2) * z + _L1) * z + ONE
    value = _f(exponent) * _LN2 + _TWO * s * series
    return value if x == x else x
