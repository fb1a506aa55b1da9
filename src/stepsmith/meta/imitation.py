"""Imitation: a rule learns the steps of a hand-designed optimizer, on that optimizer's trajectory.

The teacher trains the optimizee; the rule runs beside it on the same gradients, its steps computed
and not made. With v_s the teacher's step and u_s the rule's, both as they change the parameters,

    J       = 1/2 sum_s |u_s - v_s|^2 / sum_s |v_s|^2
    dJ/dphi = sum_s <u_s - v_s, du_s/dphi> / sum_s |v_s|^2

so that the difference stands where the adjoint stands in `stepsmith.meta.adjoint`, and the same
sampled replay serves. Divided by the teacher's own squares the loss has no unit: 1/2 for a rule
that does nothing, 0 for one that does the same.

Shape letters: T = steps, C = copies, P = parameters of one optimizee, S = sampled coordinates.

Source: Chen et al. 2020, "Training Stronger Baselines for Learning to Optimize", arXiv:2010.09089;
there the difference is not divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepsmith.meta.adjoint import Window
from stepsmith.meta.sample import Sample
from stepsmith.names import unknown
from stepsmith.rules.base import Weights, require_count, require_kind
from stepsmith.unroll import Copies, RuleStepper, Stepper, TorchStepper, roll
from stepsmith.unroll.steppers import ELEMENTWISE

TEACHERS = {optimizer.__name__.lower(): optimizer for optimizer in ELEMENTWISE}
"""Optimizers of `torch.optim` by name, in small letters."""


def make_teacher(name: str, lr: float, copies: Copies) -> TorchStepper:
    """A teacher for some copies, its other settings as torch has them.

    Raises:
        ValueError: unknown name.
    """
    if name not in TEACHERS:
        raise unknown("teacher", name, TEACHERS)
    return TorchStepper(lambda params: TEACHERS[name](params, lr=lr), copies.theta, copies.layout)


def imitation_window(
    copies: Copies,
    stepper: RuleStepper,
    weights: Weights,
    teacher: Stepper,
    steps: int,
    *,
    fraction: float = 1.0,
    generator: torch.Generator | None = None,
    split: str = "meta_train",
) -> Window:
    """Roll the copies forward by the teacher, and return the gradient of the difference in steps.

    Args:
        copies: moved in place, by the teacher.
        stepper: the rule's statistics and carry, moved in place; it must step by `weights`.
        weights: phi, requiring gradients.
        teacher: moves the copies; `make_teacher`, or any stepper.
        steps: T.
        fraction: share of the coordinates replayed, in (0, 1].
        generator: draws the sample; needed where `fraction` < 1.
        split: where batches come from.

    Returns:
        a window whose value is J over all coordinates and whose losses are those of the teacher.

    Raises:
        ValueError, TypeError: as `adjoint_window`.
    """
    require_kind("imitation_window", "copies", copies, Copies)
    steps = require_count("imitation_window", "steps", steps)
    sample = Sample(copies, stepper, steps, fraction, generator)
    beside = _Beside(sample, teacher, steps, copies.theta)
    losses_TC = roll(copies, beside, steps, split=split, hook=sample.keep)

    squares_C = beside.squares_C.clamp_min(torch.finfo(copies.theta.dtype).tiny)
    value_C = beside.gaps_C / 2 / squares_C
    finite_C = losses_TC.isfinite().all(0) & value_C.isfinite()
    beside.gap_TS /= squares_C[sample.owner_S]
    gradients, finite_C = sample.replay(weights, beside.gap_TS, finite_C)
    value = float(value_C[finite_C].mean()) if finite_C.any() else float("nan")
    return Window(gradients, value, losses_TC, finite_C)


class _Beside:
    """A stepper that moves the copies by the teacher and keeps the rule's difference from it.

    Attributes:
        gap_TS: (T, S) u - v at the sampled coordinates.
        gaps_C: sums over steps and all coordinates of (u - v)^2.
        squares_C: the same of v^2.
    """

    def __init__(self, sample: Sample, teacher: Stepper, steps: int, theta_CP: Tensor):
        self._sample, self._teacher = sample, teacher
        self._step = 0
        self.gap_TS = theta_CP.new_empty(steps, len(sample.index_S))
        self.gaps_C = theta_CP.new_zeros(len(theta_CP))
        self.squares_C = theta_CP.new_zeros(len(theta_CP))

    def __call__(self, theta_CP: Tensor, grad_CP: Tensor) -> None:
        before_CP = theta_CP.clone()
        # The rule's step is made and taken back: a stepper hands out no step of its own.
        self._sample(theta_CP, grad_CP)
        gap_CP = theta_CP - before_CP
        theta_CP.copy_(before_CP)
        self._teacher(theta_CP, grad_CP)
        taught_CP = theta_CP - before_CP
        gap_CP -= taught_CP
        self.gap_TS[self._step] = gap_CP.reshape(-1).index_select(0, self._sample.index_S)
        self.gaps_C += gap_CP.square().sum(1)
        self.squares_C += taught_CP.square().sum(1)
        self._step += 1
