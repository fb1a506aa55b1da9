"""Two products of small matrices at the speed of the machine's multiply-adds, for numba code.

A compiler does not keep a tile of results in registers over a loop it did not write, and a product
bound by loads and stores runs at a third of the speed. Both tiles are therefore written in LLVM's
own terms, on vectors as long as the machine's. Eight vectors of results and six of operands fit the
sixteen registers of x86.

Shape letters: G = outputs or gates, K = inputs, W = room for coordinates in a row.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from stepsmith.kernels.native.maths import jit

_LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8

TILE = 4 * _LANES
"""Coordinates of a tile: arrays passed here have room for a multiple of this many."""

_FLOAT, _INT, _INDEX = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, _LANES)
_FUSE = ("contract",)  # a multiplication and an addition may become one instruction


class _Emitter:
    """LLVM instructions on addresses of float32 numbers."""

    def __init__(self, builder: Any):
        self.builder = builder

    def at(self, address: Any, places: Any) -> Any:
        """The address of the number `places` on."""
        return self.builder.add(address, self.builder.shl(places, _INT(2)))

    def row(self, address: Any, apart: Any, index: int) -> Any:
        """The address of a row."""
        return self.at(address, self.builder.mul(apart, _INT(index)))

    def number(self, address: Any) -> Any:
        """Load one number."""
        return self.builder.load(self.builder.inttoptr(address, _FLOAT.as_pointer()))

    def vector(self, address: Any) -> Any:
        """Load a vector."""
        loaded = self.builder.load(self.builder.inttoptr(address, _VECTOR.as_pointer()))
        loaded.align = 4
        return loaded

    def store(self, value: Any, address: Any, kind: Any = _VECTOR) -> None:
        """Store a vector, or one number."""
        stored = self.builder.store(value, self.builder.inttoptr(address, kind.as_pointer()))
        stored.align = 4

    def spread(self, number: Any) -> Any:
        """A vector of the same number."""
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = self.builder.insert_element(undefined, number, _INDEX(0))
        lanes = ir.Constant(ir.VectorType(_INDEX, _LANES), [0] * _LANES)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def total(self, vector: Any) -> Any:
        """The sum of a vector, halves first."""
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        half = _LANES
        while half := half // 2:
            lanes = [(lane + half) % _LANES for lane in range(_LANES)]
            moved = self.builder.shuffle_vector(
                vector, undefined, ir.Constant(ir.VectorType(_INDEX, _LANES), lanes)
            )
            vector = self.builder.fadd(vector, moved)
        return self.builder.extract_element(vector, _INDEX(0))

    def add_product(self, one: Any, two: Any, sum_: Any) -> Any:
        """one * two + sum."""
        return self.builder.fadd(self.builder.fmul(one, two, _FUSE), sum_, _FUSE)

    def loop(self, count: Any, start: list[Any], body: Any) -> list[Any]:
        """Carry vectors through `count` >= 1 rounds of `body(index, vectors)`."""
        builder = self.builder
        before, inside = builder.block, builder.append_basic_block("inside")
        after = builder.append_basic_block("after")
        builder.branch(inside)
        builder.position_at_end(inside)
        index, carried = builder.phi(_INT), [builder.phi(_VECTOR) for _ in start]
        moved = body(index, carried)
        following = builder.add(index, _INT(1))
        for node, first, then in zip(
            [index, *carried], [_INT(0), *start], [following, *moved], strict=True
        ):
            node.add_incoming(first, before)
            node.add_incoming(then, inside)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
        builder.position_at_end(after)
        return moved


@intrinsic
def _affine_tile(typing, weight, bias, rows, out, count, weight_apart, rows_apart, out_apart):
    """out[:2, :W] = bias[:2] + weight[:2, :count] @ rows[:count, :W], W = TILE; by addresses."""

    def generate(context, builder, signature, arguments):
        weight, bias, rows, out, count, weight_apart, rows_apart, out_apart = arguments
        emit, outputs, width = _Emitter(builder), range(2), range(TILE // _LANES)
        start = [emit.spread(emit.number(emit.at(bias, _INT(g)))) for g in outputs for _ in width]

        def body(k, sums):
            row = emit.at(rows, builder.mul(k, rows_apart))
            values = [emit.vector(emit.at(row, _INT(_LANES * v))) for v in width]
            moved = []
            for g in outputs:
                factor = emit.number(emit.at(emit.row(weight, weight_apart, g), k))
                factor = emit.spread(factor)
                moved += [
                    emit.add_product(factor, value, sums[g * len(width) + v])
                    for v, value in enumerate(values)
                ]
            return moved

        sums = emit.loop(count, start, body)
        for g in outputs:
            row = emit.row(out, out_apart, g)
            for v in width:
                emit.store(sums[g * len(width) + v], emit.at(row, _INT(_LANES * v)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
def _sums_tile(typing, deltas, rows, sums, vectors, deltas_apart, rows_apart, sums_apart):
    """sums[:2, :4] += deltas[:2] @ rows[:4]^T over `vectors` vectors of coordinates."""

    def generate(context, builder, signature, arguments):
        deltas, rows, sums, vectors, deltas_apart, rows_apart, sums_apart = arguments
        emit, gates, columns = _Emitter(builder), range(2), range(4)

        def body(step, totals):
            place = builder.mul(step, _INT(_LANES))
            values = [emit.vector(emit.at(emit.row(rows, rows_apart, k), place)) for k in columns]
            moved = []
            for g in gates:
                delta = emit.vector(emit.at(emit.row(deltas, deltas_apart, g), place))
                moved += [
                    emit.add_product(delta, value, totals[g * len(columns) + k])
                    for k, value in enumerate(values)
                ]
            return moved

        zero = ir.Constant(_VECTOR, [0.0] * _LANES)
        totals = emit.loop(vectors, [zero] * len(gates) * len(columns), body)
        for g in gates:
            for k in columns:
                place = emit.at(emit.row(sums, sums_apart, g), _INT(k))
                total = emit.total(totals[g * len(columns) + k])
                emit.store(builder.fadd(emit.number(place), total), place, _FLOAT)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@jit
def affine(weight, bias, rows, out, n):
    """out[:, :n] = bias[:, None] + weight @ rows[:, :n], and what follows n up to a whole tile.

    Args:
        weight: (G, K) contiguous, G even, K at least 1.
        bias: (G,).
        rows: (K, W) contiguous, W a multiple of `TILE`.
        out: (G, W) contiguous, overwritten.
        n: coordinates, at most W.
    """
    count, wide, out_wide = weight.shape[1], rows.shape[1], out.shape[1]
    weights, biases = weight.ctypes.data, bias.ctypes.data
    source, target = rows.ctypes.data, out.ctypes.data
    for start in range(0, n, TILE):
        for g in range(0, weight.shape[0], 2):
            _affine_tile(
                weights + 4 * g * count, biases + 4 * g, source + 4 * start,
                target + 4 * (g * out_wide + start), count, count, wide, out_wide,
            )  # fmt: skip


@jit
def add_products(deltas, rows, sums, n):
    """sums += deltas[:, :m] @ rows[:, :m]^T, m being n rounded up to whole vectors.

    Args:
        deltas: (G, W) contiguous, G even, zero from n to m.
        rows: (K, W) contiguous, K a multiple of 4, finite from n to m.
        sums: (G, K) contiguous.
        n: coordinates, at least 1.
    """
    count, wide, rows_wide = rows.shape[0], deltas.shape[1], rows.shape[1]
    source, factors, target = deltas.ctypes.data, rows.ctypes.data, sums.ctypes.data
    vectors = np.int64((n + _LANES - 1) // _LANES)
    for g in range(0, deltas.shape[0], 2):
        for k in range(0, count, 4):
            _sums_tile(
                source + 4 * g * wide, factors + 4 * k * rows_wide, target + 4 * (g * count + k),
                vectors, wide, rows_wide, count,
            )  # fmt: skip
