"""Everything that decides a meta-training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stepsmith.meta.adjoint import LossTimes
from stepsmith.meta.imitation import TEACHERS
from stepsmith.meta.losses import META_LOSSES
from stepsmith.rules.base import (
    require_choice,
    require_count,
    require_kind,
    require_number,
    set_checked,
)

BALANCES = ("gradient", "loss", "none")
"""`gradient`: each task's meta-gradients (its own and its imitated ones apart) are divided by the
running geometric mean of their norms, so that all pull alike. `loss`: its meta-loss is divided by
its loss before the first step (unneeded for the log loss). `none`: as they are."""

MOST_AT_ONCE = 1_000_000
"""Copies, windows or validations: far more than any machine holds or has time for."""

VALIDATION_SPLITS = ("meta_valid", "meta_train")
"""Examples held out, or those of meta-training with starts and batches held out: where a validation
is so long that a network of many parameters would learn the held-out tenth by heart."""


@dataclass(frozen=True)
class MetaTrainConfig:
    """Everything that decides a meta-training, so that the same values give the same numbers.

    Args:
        seconds: budget of time, validation included. The schedule follows the share spent, so two
            runs of the same seconds differ; give `steps` where runs must repeat.
        steps: budget of inner steps, all copies counted.
        horizon: steps of an episode.
        window: steps of a window; None is the whole horizon.
        copies: optimizees at once; at staggered ages where the window is shorter than the horizon.
        samples: coordinate-steps replayed a window and copy; None replays `fraction` instead.
        fraction: share of coordinates replayed, where `samples` is None.
        loss: meta-loss, `mean`, `final` or `log`.
        losses: `after` or `before`, see `adjoint_window`.
        discount: of the adjoint recursion; 1 is none.
        proportions: shares of the windows, one a task, where there are several; None is equal.
        accumulate: windows averaged for one meta-update; with several tasks, of one task each.
        balance: what keeps a task's meta-gradients from drowning those of others, or imitated ones
            from drowning a task's own, one of `BALANCES`; a task alone, without imitation, is left
            as it is.
        imitation: chance that a window is a whole episode on the teacher's trajectory instead, the
            rule learning the teacher's steps (`stepsmith.meta.imitation`); 0 is never.
        teacher: an elementwise optimizer of `torch.optim`, its name in small letters.
        teacher_lr: its rate.
        lr: meta-Adam's peak rate.
        final_lr: share of `lr` that a cosine decays to.
        warmup: share of the budget over which the rate rises from zero.
        clip: largest norm of the meta-gradient.
        weight_decay: decoupled decay of the optimizee inside meta-training.
        validations: validations over the whole budget; the best weights are kept.
        validation_copies: optimizees of a validation, of each task.
        validation_horizon: steps of a validation; None is the horizon.
        validation_loss: by which the weights are kept, as `loss`; None is `loss`.
        validation_split: whose examples validations train on, one of `VALIDATION_SPLITS`.
        patience: end where this many validations in a row were no better than the best before
            them; None spends the whole budget.
        seed: of everything.
        checkpoint_seconds: longest time between checkpoints; the first come sooner.

    Raises:
        ValueError: a value out of range, both budgets or none.
        TypeError: a value of another type.
    """

    seconds: float | None = None
    steps: int | None = None
    horizon: int = 100
    window: int | None = None
    copies: int = 4
    samples: int | None = 40_000
    fraction: float = 1.0
    loss: str = "mean"
    losses: LossTimes = "after"
    discount: float = 1.0
    proportions: tuple[float, ...] | None = None
    accumulate: int = 1
    balance: str = "gradient"
    imitation: float = 0.0
    teacher: str = "adam"
    teacher_lr: float = 0.01
    lr: float = 1e-2
    final_lr: float = 0.03
    warmup: float = 0.03
    clip: float = 1.0
    weight_decay: float = 0.0
    validations: int = 12
    validation_copies: int = 16
    validation_horizon: int | None = None
    validation_loss: str | None = None
    validation_split: str = "meta_valid"
    patience: int | None = None
    seed: int = 0
    checkpoint_seconds: float = 120.0

    def __post_init__(self):
        owner = "meta_train"
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"{owner}: give a budget, either seconds=... or steps=...")
        for name in ("seconds", "lr", "clip", "checkpoint_seconds", "teacher_lr"):
            self._set(name, require_number, above=0)
        for name in ("steps", "horizon", "samples", "validation_horizon", "patience"):
            self._set(name, require_count)
        for name in ("copies", "accumulate", "validations", "validation_copies"):
            self._set(name, require_count, most=MOST_AT_ONCE)
        self._set("window", require_count, least=0)
        # Those of its copies and stages follow upon it.
        self._set("seed", require_count, least=0, most=2**62)
        if self.window is not None and not 1 <= self.window <= self.horizon:
            raise ValueError(
                f"{owner}: window must lie between 1 and the horizon ({self.horizon}), "
                f"got {self.window}"
            )
        if self.horizon % self.unroll:
            raise ValueError(
                f"{owner}: the horizon ({self.horizon}) must be a multiple of the window "
                f"({self.unroll})"
            )
        for name in ("fraction", "discount"):
            self._set(name, require_number, above=0, most=1)
        for name in ("final_lr", "warmup", "weight_decay", "imitation"):
            self._set(name, require_number, least=0, most=1)
        require_choice(owner, "loss", self.loss, META_LOSSES)
        if self.validation_loss is not None:
            require_choice(owner, "validation_loss", self.validation_loss, META_LOSSES)
        require_choice(owner, "validation_split", self.validation_split, VALIDATION_SPLITS)
        require_choice(owner, "losses", self.losses, ("after", "before"))
        require_choice(owner, "teacher", self.teacher, tuple(TEACHERS))
        require_choice(owner, "balance", self.balance, BALANCES)
        if self.proportions is not None:
            require_kind(owner, "proportions", self.proportions, Iterable, "one number a task")
            shares = enumerate(self.proportions)
            checked = [require_number(owner, f"proportions[{i}]", p, above=0) for i, p in shares]
            set_checked(self, proportions=tuple(checked))

    def _set(self, name: str, check: Callable[..., Any], **bounds: Any) -> None:
        """Check a number, or None where the field takes it."""
        value = getattr(self, name)
        if value is not None or "None" not in str(self.__dataclass_fields__[name].type):
            set_checked(self, **{name: check("meta_train", name, value, **bounds)})

    def require_a_window(self, owner: str) -> None:
        """Check that the budget is one that can be kept.

        Raises:
            ValueError: fewer steps than a window has.
        """
        if self.steps is not None and self.steps < self.unroll:
            raise ValueError(
                f"{owner}: a budget of {self.steps:,} steps is smaller than one window, of "
                f"{self.unroll:,}; give more steps, or a smaller window or horizon"
            )

    @property
    def validated_by(self) -> str:
        """The loss of validations."""
        return self.validation_loss or self.loss

    @property
    def unroll(self) -> int:
        """Steps of a window."""
        return self.window or self.horizon

    def share(self, parameters: int, steps: int | None = None) -> float:
        """Share of an optimizee's coordinates replayed over a window, or over as many steps."""
        if self.samples is None:
            return self.fraction
        return min(1.0, self.samples / ((steps or self.unroll) * parameters))

    def rate(self, progress: float) -> float:
        """Meta-Adam's rate when `progress` (0 to 1) of the budget is spent."""
        if progress < self.warmup:
            return self.lr * min(1.0, max(progress, 1e-3) / self.warmup)
        done = (progress - self.warmup) / max(1e-9, 1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)
