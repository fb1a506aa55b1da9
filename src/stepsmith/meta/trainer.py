"""Meta-training: windows, meta-Adam, validation, checkpoints.

Shape letters: C = copies.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from stepsmith.hub import TrainedRule
from stepsmith.meta.adjoint import LossTimes, Window, adjoint_window
from stepsmith.meta.checkpoint import load_run, save_run
from stepsmith.meta.interrupt import Interrupt
from stepsmith.meta.losses import META_LOSSES, meta_loss
from stepsmith.meta.progress import Reporter
from stepsmith.rules import Rule, make_rule
from stepsmith.rules.base import require_choice, require_positive
from stepsmith.tasks.base import Task
from stepsmith.unroll import Copies, RuleStepper, roll

_log = logging.getLogger("stepsmith")

VALIDATION_SEED = 1_000_000
"""Validation optimizees take seeds from here up, far from those of training and evaluation."""


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
        lr: meta-Adam's peak rate.
        final_lr: share of `lr` that a cosine decays to.
        warmup: share of the budget over which the rate rises from zero.
        clip: largest norm of the meta-gradient.
        weight_decay: decoupled decay of the optimizee inside meta-training.
        validations: validations over the whole budget; the best weights are kept.
        validation_copies: optimizees of a validation.
        seed: of everything.
        checkpoint_seconds: seconds between checkpoints.

    Raises:
        ValueError: a value out of range, both budgets or none.
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
    lr: float = 1e-2
    final_lr: float = 0.03
    warmup: float = 0.03
    clip: float = 1.0
    weight_decay: float = 0.0
    validations: int = 12
    validation_copies: int = 16
    seed: int = 0
    checkpoint_seconds: float = 120.0

    def __post_init__(self):
        owner = "meta_train"
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"{owner}: give a budget, either seconds=... or steps=...")
        require_positive(
            owner, seconds=self.seconds or 1, steps=self.steps or 1 if self.steps != 0 else 0,
            lr=self.lr, clip=self.clip, checkpoint_seconds=self.checkpoint_seconds,
        )  # fmt: skip
        whole = ("horizon", "copies", "validations", "validation_copies")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{owner}: {name} must be at least 1, got {getattr(self, name)}")
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
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"{owner}: samples must be at least 1, got {self.samples}")
        for name in ("fraction", "discount"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{owner}: {name} must lie in (0, 1], got {getattr(self, name)}")
        for name in ("final_lr", "warmup", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{owner}: {name} must lie in [0, 1], got {getattr(self, name)}")
        require_choice(owner, "loss", self.loss, META_LOSSES)
        require_choice(owner, "losses", self.losses, ("after", "before"))

    @property
    def unroll(self) -> int:
        """Steps of a window."""
        return self.window or self.horizon

    def share(self, parameters: int) -> float:
        """Share of an optimizee's coordinates replayed."""
        if self.samples is None:
            return self.fraction
        return min(1.0, self.samples / (self.unroll * parameters))

    def rate(self, progress: float) -> float:
        """Meta-Adam's rate when `progress` (0 to 1) of the budget is spent."""
        if progress < self.warmup:
            return self.lr * max(progress, 1e-3) / self.warmup
        done = (progress - self.warmup) / max(1e-9, 1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclass
class Progress:
    """Counters of a run, all of them saved in its checkpoints.

    `elapsed` is seconds, `core_seconds` processor time of all threads (None where a checkpoint from
    before it was counted was continued).
    """

    inner_steps: int = 0
    updates: int = 0
    elapsed: float = 0.0
    core_seconds: float | None = 0.0
    skipped: int = 0
    diverged: int = 0
    best_score: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)


class Run:
    """The whole state of one meta-training; `meta_train` drives it."""

    def __init__(self, task: Task, rule: Rule | TrainedRule, config: MetaTrainConfig):
        self.parent = rule if isinstance(rule, TrainedRule) else None
        if isinstance(rule, TrainedRule):
            rule = rule.rule
        if not rule.learned:
            raise ValueError(
                f"{type(rule).__name__} has no weights: there is nothing to meta-train"
            )
        self.task, self.rule, self.config = task, rule, config
        seeds = torch.Generator().manual_seed(config.seed)
        self.sampler = torch.Generator().manual_seed(config.seed + 1)
        first = int(torch.randint(2**40, (), generator=seeds))
        start = self.parent.weights if self.parent else rule.init(seeds)
        self.weights = {
            key: value.detach().to(task.device, copy=True).requires_grad_()
            for key, value in start.items()
        }
        self.best = {key: value.detach().clone() for key, value in self.weights.items()}
        # Seeds above all that validation and evaluation use.
        self.copies = Copies(task, [2**41 + first + copy for copy in range(config.copies)])
        self.stepper = RuleStepper(
            rule, self.weights, self.copies.theta, self.copies.layout,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        self.adam = torch.optim.Adam(self.weights.values(), lr=config.lr)
        # Where the window is shorter than the horizon, first episodes end early, one a copy, so
        # that ages are spread from then on.
        windows = config.horizon // config.unroll
        self.ages = [0] * config.copies
        self.lives = [
            config.horizon - copy * windows // config.copies * config.unroll
            for copy in range(config.copies)
        ]
        self.progress = Progress()
        if rule.coupling == "network" and config.share(self.copies.layout.total) < 1:
            raise ValueError(
                f"{type(rule).__name__} couples coordinates in its network: a sampled replay would "
                "be biased. Set samples=None and fraction=1."
            )

    @property
    def spent(self) -> float:
        """Share of the budget spent, 0 to 1."""
        if self.config.steps is not None:
            return self.progress.inner_steps / self.config.steps
        assert self.config.seconds is not None
        return self.progress.elapsed / self.config.seconds

    def window(self) -> Window:
        """One window, one meta-update."""
        config, progress = self.config, self.progress
        window = adjoint_window(
            self.copies, self.stepper, self.weights, config.unroll,
            kind=config.loss, losses=config.losses,
            fraction=config.share(self.copies.layout.total), discount=config.discount,
            ages=self.ages, horizon=config.horizon, generator=self.sampler,
        )  # fmt: skip
        self._update(window)
        progress.inner_steps += config.unroll * config.copies
        for copy in range(config.copies):
            self.ages[copy] += config.unroll
            dead = not bool(window.finite_C[copy])
            progress.diverged += dead
            if dead or self.ages[copy] >= self.lives[copy]:
                self.copies.restart(copy)
                self.stepper.restart(copy, self.copies.theta)
                self.ages[copy], self.lives[copy] = 0, config.horizon
        return window

    def _update(self, window: Window) -> None:
        gradients = list(window.gradients.values())
        norm = torch.stack([g.norm() for g in gradients]).norm()
        row = {
            "inner_steps": self.progress.inner_steps, "value": window.value, "norm": float(norm),
        }  # fmt: skip
        self.progress.history.append(row)
        if not bool(norm.isfinite()) or not window.finite_C.any():
            self.progress.skipped += 1
            if self.progress.skipped == 1:
                _log.warning(
                    "meta_train: a window's losses or meta-gradient were not finite; its update "
                    "is skipped (later ones are counted, not announced)"
                )
            return
        scale = min(1.0, self.config.clip / (float(norm) + 1e-12))
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient * scale
        self.adam.param_groups[0]["lr"] = self.config.rate(self.spent)
        self.adam.step()
        self.progress.updates += 1
        self.stepper.load(self.weights, self.copies.theta)

    def validate(self) -> float:
        """Score the weights on whole episodes of held-out examples; keep them where best."""
        config = self.config
        copies = Copies(
            self.task, [VALIDATION_SEED + copy for copy in range(config.validation_copies)]
        )
        stepper = RuleStepper(
            self.rule, self.weights, copies.theta, copies.layout, weight_decay=config.weight_decay
        )
        losses_TC = roll(copies, stepper, config.horizon, split="meta_valid")
        places = torch.arange(1, config.horizon + 1, device=losses_TC.device)[:, None]
        score = float(meta_loss(config.loss, losses_TC, places, config.horizon)[0].mean())
        progress = self.progress
        progress.validations.append(
            {"inner_steps": progress.inner_steps, "seconds": progress.elapsed, "score": score}
        )
        better = progress.best_score is None or score < progress.best_score
        if math.isfinite(score) and better:
            progress.best_score = score
            self.best = {key: value.detach().clone() for key, value in self.weights.items()}
        return score

    def trained(self, name: str | None) -> TrainedRule:
        """The best weights so far, with how they came to be."""
        progress = self.progress
        before = self.parent.manifest if self.parent else {}
        manifest = {
            "name": name or self.task.name,
            "tasks": [self.task.name],
            "data": self.task.data_name,
            "horizon": self.config.horizon,
            "parameters": self.copies.layout.total,
            "meta_training": asdict(self.config),
            "validation": {"loss": self.config.loss, "score": progress.best_score},
            "seconds": round(progress.elapsed + before.get("seconds", 0.0), 1),
            "inner_steps": progress.inner_steps + before.get("inner_steps", 0),
            "updates": progress.updates + before.get("updates", 0),
            "skipped": progress.skipped,
            "diverged": progress.diverged,
            "validations": progress.validations,
            "torch": torch.__version__.split("+")[0],
        }
        parent_cores = before.get("core_seconds") if self.parent else 0.0
        if progress.core_seconds is not None and parent_cores is not None:
            manifest["core_seconds"] = round(progress.core_seconds + parent_cores, 1)
        if self.parent is not None:
            kept = ("name", "tasks", "horizon", "seconds", "core_seconds", "inner_steps",
                    "meta_training", "parent")  # fmt: skip
            manifest["parent"] = {key: before[key] for key in kept if key in before}
            manifest["parent"]["fingerprint"] = self.parent.fingerprint
        weights = {key: value.cpu().clone() for key, value in self.best.items()}
        return TrainedRule(self.rule, weights, manifest)


def meta_train(
    task: Task,
    rule: Rule | TrainedRule | str = "joined",
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    name: str | None = None,
    on_window: Callable[[Run, Window], None] | None = None,
    **config: Any,
) -> TrainedRule:
    """Meta-train an update rule on a task.

    Args:
        task: what the rule will learn to train; `Task.from_module` makes one of any module.
        rule: a rule, or the name of one (`joined`, `l2o_dm`, `rnnprop`), to start from fresh
            weights; a `TrainedRule` (`load` gives one) to go on from its weights. The manifest then
            counts its seconds too, and tells its history under `parent`.
        out: folder for checkpoints (`run.safetensors`, every few minutes and at the end) and the
            result (`rule.safetensors`); None writes nothing.
        resume: continue from the checkpoint in `out`, to the same numbers as an uninterrupted run
            (bitwise on a CPU with a budget in steps).
        progress: show a bar with rates and the expected end.
        tensorboard: write TensorBoard events to `out/tensorboard` (needs the extra).
        name: of the trained rule; by default the task's.
        on_window: called after each window with the run and the window.
        config: fields of `MetaTrainConfig`; a budget (`seconds` or `steps`) is needed.

    Returns:
        The rule with the weights that validated best.

    Raises:
        ValueError: a bad configuration, a rule without weights, a checkpoint of another one.
        RuntimeError: no validation ever had a finite score.
        KeyboardInterrupt: interrupted; the window was finished and a checkpoint written first.

    >>> from stepsmith.tasks import Quadratic
    >>> trained = meta_train(Quadratic(), "joined", steps=400, horizon=20, validations=1)
    >>> trained.horizon
    20
    """
    settings = MetaTrainConfig(**config)
    run = Run(task, make_rule(rule) if isinstance(rule, str) else rule, settings)
    folder = None if out is None else Path(out)
    if folder is None and (resume or tensorboard):
        raise ValueError("meta_train: resume and tensorboard need out=FOLDER")
    checkpoint = None if folder is None else folder / "run.safetensors"
    if resume:
        assert checkpoint is not None
        load_run(run, checkpoint)
    earlier, earlier_cores = run.progress.elapsed, run.progress.core_seconds
    begun = saved = time.perf_counter()
    begun_cores = time.process_time()

    def tick() -> None:
        run.progress.elapsed = earlier + time.perf_counter() - begun
        if earlier_cores is not None:
            run.progress.core_seconds = earlier_cores + time.process_time() - begun_cores

    events = folder / "tensorboard" if tensorboard and folder is not None else None
    with Interrupt() as interrupt, Reporter(run, shown=progress, tensorboard=events) as reporter:
        if not run.progress.validations:
            run.validate()
            tick()
            if checkpoint:  # so that a run killed early can be resumed too
                save_run(run, checkpoint)
        while run.spent < 1:
            window = run.window()
            tick()
            due = len(run.progress.validations) - 1 < int(run.spent * settings.validations)
            if due or run.spent >= 1:
                run.validate()
                tick()
            reporter.show(window)
            if on_window is not None:
                on_window(run, window)
            stale = time.perf_counter() - saved > settings.checkpoint_seconds
            if checkpoint and (stale or interrupt.asked):
                save_run(run, checkpoint)
                saved = time.perf_counter()
            if interrupt.asked:
                kept = f"; continue with resume=True, out={str(folder)!r}" if checkpoint else ""
                raise KeyboardInterrupt(f"meta-training was interrupted{kept}")
    if run.progress.best_score is None:
        raise RuntimeError(
            "meta_train: no validation had a finite score; try a smaller step_scale or lr"
        )
    scores = [point["score"] for point in run.progress.validations]
    if run.progress.best_score == scores[0] and len(scores) > 1:
        _log.warning(
            "meta_train: no validation was better than the first, so the weights returned are "
            "those it started from; give it a larger budget, or look at lr and step_scale"
        )
    trained = run.trained(name)
    if folder is not None and checkpoint is not None:
        save_run(run, checkpoint)
        trained.save(folder / "rule.safetensors")
    return trained
