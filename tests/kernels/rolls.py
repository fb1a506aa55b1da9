"""What the tests of the fused steps share: a rule's memory, gradients, a tolerance."""

from __future__ import annotations

import torch

from stepsmith import kernels
from stepsmith.rules.lstm import LSTMRule
from stepsmith.testing import fresh_weights

CPU = torch.device("cpu")


def drawn(rule: LSTMRule, steps: int, n: int, dtype: torch.dtype = torch.float32):
    """Features (T, F, N) and a carry, standard normal."""
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(steps, rule.feature_set.count, n, generator=generator, dtype=dtype)
    carry = {
        key: torch.randn(value.shape, generator=generator, dtype=dtype)
        for key, value in rule.init_carry(n).items()
    }
    return features, carry


class Roll:
    """A rule's memory for some copies at different ages, and its steps by one backend."""

    def __init__(
        self,
        rule: LSTMRule,
        backend: str,
        copies: int,
        n: int,
        device: torch.device = CPU,
        carry_dtype: torch.dtype = torch.float32,
    ):
        params = torch.zeros(copies, n, device=device)
        self.carry = rule.init_carry(copies * n, dtype=carry_dtype, device=device)
        self.state = kernels.init_state(rule, params)
        self.state["step"] += torch.arange(3.0, 3 + copies, device=device)[:, None]
        self.advance = kernels.advance_function(
            rule, fresh_weights(rule), torch.float32, device, backend, carry_dtype
        )

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        return self.advance(grad, grad, self.state, self.carry)


def gradients(steps: int, copies: int, n: int) -> torch.Tensor:
    """Of many magnitudes; a third of them zero, and some coordinates never touched."""
    generator = torch.Generator().manual_seed(n)
    size = torch.randn(steps, copies, n, generator=generator)
    size = size * 10 ** torch.randn(steps, copies, n, generator=generator)
    kept = torch.rand(steps, copies, n, generator=generator) > 1 / 3
    return size * kept * (torch.rand(copies, n, generator=generator) > 0.1)


def assert_near(one: torch.Tensor, two: torch.Tensor) -> None:
    """Equal to float32 rounding, which differs from processor to processor.

    Where a coordinate's mean gradient all but cancels, rounding decides the digits that are left,
    and their logarithm differs by more: one number in a thousand may be off by a thousandth of the
    largest.
    """
    assert (one.shape, one.dtype) == (two.shape, two.dtype)
    largest = float(two.abs().max()) + 1e-30
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-3 * largest)
    far = ~torch.isclose(one, two, rtol=1e-5, atol=1e-5 * largest)
    assert float(far.double().mean()) <= 1e-3
