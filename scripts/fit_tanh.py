"""Fit tanh(x) = x P(x^2) / Q(x^2) on [0, 8]: the coefficients in `stepsmith.kernels.native`,
which takes the sign beyond.

Weighted least squares on the relative error, linearised in Q, with the weights raised where the
error is largest (Lawson's iteration), in float64; then the float32 evaluation is checked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def fit(numerator: int, denominator: int, top: float, points: int = 4000) -> tuple[Vector, Vector]:
    """Coefficients of P and Q, constant first; Q's constant is 1."""
    x = (1 - np.cos(np.linspace(0, np.pi, points))) / 2 * top + 1e-6
    z = (x / top) ** 2
    target = np.tanh(x) / x
    powers_p = z[:, None] ** np.arange(numerator + 1)
    powers_q = z[:, None] ** np.arange(1, denominator + 1)
    weight, q = np.ones(points), np.ones(points)
    best, found = np.inf, (np.empty(0), np.empty(0))
    for _ in range(60):
        scale = weight / (target * q)
        system = np.concatenate([powers_p, -target[:, None] * powers_q], 1) * scale[:, None]
        unit = np.abs(system).max(0)
        solution = np.linalg.lstsq(system / unit, target * scale, rcond=None)[0] / unit
        p, q = powers_p @ solution[: numerator + 1], 1 + powers_q @ solution[numerator + 1 :]
        error = np.abs(p / q / target - 1)
        if q.min() > 0 and error.max() < best:
            best = error.max()
            units = top ** -(2.0 * np.arange(numerator + 1))
            units_q = top ** -(2.0 * np.arange(denominator + 1))
            found = (
                solution[: numerator + 1] * units,
                np.concatenate([[1.0], solution[numerator + 1 :]]) * units_q,
            )
        weight = weight * np.sqrt(error / error.max() + 1e-3)
        weight /= weight.max()
    print(f"degrees {numerator}/{denominator} in x^2, x <= {top}: relative error {best:.1e}")
    return found


def main() -> None:
    top = 8.0
    p, q = (c.astype(np.float32) for c in fit(4, 4, top))
    for name, coefficients in (("P", p), ("Q", q)):
        print(name, ", ".join(f"{c:.9e}" for c in coefficients))
    x = np.linspace(-10, 10, 1_000_001)[1:].astype(np.float32)
    z = x * x
    fitted = x * np.polyval(p[::-1], z) / np.polyval(q[::-1], z)
    got = np.where(np.abs(x) > top, np.sign(x), fitted)
    exact = np.tanh(x.astype(np.float64))
    worst = np.max(np.abs(got - exact) / np.maximum(np.abs(exact), 1e-30))
    print(f"float32: relative error {worst:.1e}, largest |tanh| {np.abs(got).max():.8f}")


if __name__ == "__main__":
    main()
