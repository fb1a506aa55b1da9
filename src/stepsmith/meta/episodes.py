"""One task's part in a meta-training: its optimizees, the rule's memory of them, their ages.

Shape letters: T = tasks, V = validations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stepsmith.meta.adjoint import Window, adjoint_window
from stepsmith.meta.config import MetaTrainConfig
from stepsmith.meta.imitation import imitation_window, make_teacher
from stepsmith.meta.losses import meta_loss
from stepsmith.rules import Rule
from stepsmith.rules.base import Weights
from stepsmith.tasks.base import Task
from stepsmith.unroll import Copies, RuleStepper, roll

VALIDATION_SEED = 1_000_000
"""Validation optimizees take seeds from here up, far from those of training and evaluation."""

MEMORY = 0.9
"""Of the running mean of a task's log meta-gradient norms: some ten windows."""


@dataclass(frozen=True)
class Turn:
    """What a task's turn gave.

    Attributes:
        window: its meta-gradient.
        steps: inner steps, all copies counted.
        diverged: copies that were not finite under the rule.
        imitated: whether the teacher made the steps.
    """

    window: Window
    steps: int
    diverged: int = 0
    imitated: bool = False


class Episodes:
    """The optimizees of one task, from episode to episode.

    Args:
        task: the task.
        rule: what is learned.
        weights: its weights, which the run moves.
        config: of the run.
        first: seed of the first copy; the others follow.

    Attributes:
        ages: steps each copy has made in its episode.
        lives: steps after which each copy's episode ends.
        windows: windows so far.
        levels: for own windows and for imitated ones the running mean of the log norms of their
            meta-gradients, still biased towards its start at zero, and how many are in it.

    Raises:
        ValueError: a rule whose network couples coordinates, to be replayed on a sample.
    """

    def __init__(
        self, task: Task, rule: Rule, weights: Weights, config: MetaTrainConfig, first: int
    ):
        self.task, self.rule, self.config = task, rule, config
        self.copies = Copies(task, [first + copy for copy in range(config.copies)])
        self.stepper = self._stepper(weights, self.copies)
        # Where the window is shorter than the horizon, first episodes end early, one a copy, so
        # that ages are spread from then on.
        windows = config.horizon // config.unroll
        self.ages = [0] * config.copies
        self.lives = [
            config.horizon - copy * windows // config.copies * config.unroll
            for copy in range(config.copies)
        ]
        self.windows = 0
        self.levels = {"own": (0.0, 0), "imitated": (0.0, 0)}
        self._initial: float | None = None
        if rule.coupling == "network" and config.share(self.parameters) < 1:
            raise ValueError(
                f"{type(rule).__name__} couples coordinates in its network: a sampled replay would "
                "be biased. Set samples=None and fraction=1."
            )

    @property
    def parameters(self) -> int:
        """Numbers of one optimizee."""
        return self.copies.layout.total

    def _stepper(self, weights: Weights, copies: Copies) -> RuleStepper:
        return RuleStepper(
            self.rule, weights, copies.theta, copies.layout, weight_decay=self.config.weight_decay
        )

    def turn(self, weights: Weights, generator: torch.Generator) -> Turn:
        """A window by these weights or, by chance, an imitated episode.

        Args:
            weights: phi.
            generator: of the choice and of the sample.
        """
        self.windows += 1
        chance = self.config.imitation
        if chance and float(torch.rand((), generator=generator)) < chance:
            return self._imitate(weights, generator)
        return self._window(weights, generator)

    def _imitate(self, weights: Weights, generator: torch.Generator) -> Turn:
        """A whole episode of fresh optimizees of its own on the teacher's trajectory: the replay
        needs no more memory for it, and the teacher's state need not outlive it."""
        config = self.config
        first = 2**42 + int(torch.randint(2**40, (), generator=generator))
        copies = Copies(self.task, [first + copy for copy in range(config.copies)])
        window = imitation_window(
            copies, self._stepper(weights, copies), weights,
            make_teacher(config.teacher, config.teacher_lr, copies), config.horizon,
            fraction=config.share(self.parameters, config.horizon), generator=generator,
        )  # fmt: skip
        return Turn(window, config.horizon * config.copies, imitated=True)

    def _window(self, weights: Weights, generator: torch.Generator) -> Turn:
        """One window; copies whose episode has ended, or that diverged, start afresh."""
        config = self.config
        self.stepper.load(weights, self.copies.theta)
        window = adjoint_window(
            self.copies, self.stepper, weights, config.unroll,
            kind=config.loss, losses=config.losses, fraction=config.share(self.parameters),
            discount=config.discount, ages=self.ages, horizon=config.horizon, generator=generator,
        )  # fmt: skip
        dead = [not finite for finite in window.finite_C.tolist()]
        for copy in range(config.copies):
            self.ages[copy] += config.unroll
            if dead[copy] or self.ages[copy] >= self.lives[copy]:
                self.copies.restart(copy)
                self.stepper.restart(copy, self.copies.theta)
                self.ages[copy], self.lives[copy] = 0, config.horizon
        return Turn(window, config.unroll * config.copies, diverged=sum(dead))

    def weight(self, norm: float, imitated: bool = False) -> float:
        """The factor on a meta-gradient of this norm that keeps it in balance with other tasks'."""
        balance = self.config.balance
        if balance == "loss" and self.config.loss != "log" and not imitated:
            return 1 / self.initial_loss()
        if balance == "gradient" and norm > 0:
            # Logs: single norms a hundred times the usual come up, and must not silence the task.
            key = "imitated" if imitated else "own"
            mean, count = self.levels[key]
            mean = MEMORY * mean + (1 - MEMORY) * math.log(norm)
            self.levels[key] = (mean, count + 1)
            return math.exp(-mean / (1 - MEMORY ** (count + 1)))
        return 1.0

    def initial_loss(self) -> float:
        """The mean size of the validation optimizees' losses before their first step."""
        if self._initial is None:
            copies = self._validation_copies()
            losses, _ = copies.gradients(copies.batches(self.config.validation_split))
            self._initial = max(float(losses.abs().mean()), 1e-12)
        return self._initial

    def validate(self, weights: Weights) -> float:
        """The validation loss of whole episodes, the same starts and batches every time."""
        config = self.config
        steps = config.validation_horizon or config.horizon
        with self._memory_aside(weights):
            copies = self._validation_copies()
            losses = roll(
                copies, self._stepper(weights, copies), steps, split=config.validation_split
            )
        places: Tensor = torch.arange(1, steps + 1, device=losses.device)[:, None]
        return float(meta_loss(config.validated_by, losses, places, steps)[0].mean())

    @contextmanager
    def _memory_aside(self, weights: Weights) -> Iterator[None]:
        """The rule's memory of the copies, its largest part, makes room for another's: let go where
        all are about to begin an episode; amid episodes, from a GPU, kept on the host."""
        if not any(self.ages):
            del self.stepper
            try:
                yield
            finally:
                self.stepper = self._stepper(weights, self.copies)
        else:
            _move(self.stepper, torch.device("cpu"))
            try:
                yield
            finally:
                _move(self.stepper, self.copies.theta.device)

    def _validation_copies(self) -> Copies:
        count = self.config.validation_copies
        return Copies(self.task, [VALIDATION_SEED + copy for copy in range(count)])


def _move(stepper: RuleStepper, device: torch.device) -> None:
    """What it remembers of every coordinate, to a device; it steps only where the copies are."""
    stepper.state = {key: value.to(device) for key, value in stepper.state.items()}
    stepper.carry = {key: value.to(device) for key, value in stepper.carry.items()}


def joint_name(tasks: Sequence[Task]) -> str:
    """A name for what was learned on these tasks: theirs where there are one or two, otherwise how
    many there are."""
    names = [task.name for task in tasks]
    return "+".join(names) if len(names) <= 2 else f"{len(names)}-tasks"


def joint_score(kind: str, scores_VT: Sequence[Sequence[float]], names: Sequence[str]) -> float:
    """The score over several tasks of the last validation.

    Args:
        kind: the meta-loss.
        scores_VT: each validation's meta-loss of each task, the first validation first.
        names: of the tasks.

    Returns:
        The geometric mean over tasks of last over first finite score (of `log`, which is a mean log
        loss, exp of the mean difference); nan where a task's last score is not finite.

    Raises:
        ValueError: a loss that is not above zero, which has no ratio.

    >>> joint_score("mean", [[2.0, 10.0], [1.0, 20.0]], ["one", "other"])
    1.0
    """
    logs = []
    for name, scores in zip(names, zip(*scores_VT, strict=True), strict=True):
        if not math.isfinite(scores[-1]):
            return math.nan
        first = next(score for score in scores if math.isfinite(score))
        if kind == "log":
            logs.append(scores[-1] - first)
            continue
        if min(first, scores[-1]) <= 0:
            raise ValueError(
                f"meta_train: task {name!r} has a validation loss of {min(first, scores[-1]):.3g}; "
                "tasks trained together are compared by ratios of losses, which must be above "
                "zero: add a constant to its loss"
            )
        logs.append(math.log(scores[-1] / first))
    return math.exp(sum(logs) / len(logs))
