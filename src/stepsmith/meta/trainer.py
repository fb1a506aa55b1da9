"""Meta-training: windows, meta-Adam, validation, checkpoints.

Shape letters: C = copies.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepsmith.hub import TrainedRule
from stepsmith.machine import machine
from stepsmith.meta.adjoint import Window
from stepsmith.meta.checkpoint import (
    CHECKPOINT,
    Saver,
    alone,
    can_continue,
    load_run,
    require_begun,
    require_fresh,
    save_rule,
)
from stepsmith.meta.config import MetaTrainConfig
from stepsmith.meta.episodes import Episodes, joint_name, joint_score
from stepsmith.meta.progress import Reporter, require_tensorboard
from stepsmith.rules import Rule, make_rule
from stepsmith.rules.base import require_flag, require_kind
from stepsmith.tasks.base import Task
from stepsmith.terminal import Interrupt

_log = logging.getLogger("stepsmith")


KEPT = 1000
"""Windows whose figures are kept: a checkpoint holds them."""


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
    validations: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """The whole state of one meta-training; `meta_train` drives it.

    Raises:
        ValueError: no task, tasks on several devices, proportions that are not one a task, or a
            rule without weights.
    """

    def __init__(self, tasks: Sequence[Task], rule: Rule | TrainedRule, config: MetaTrainConfig):
        self.parent = rule if isinstance(rule, TrainedRule) else None
        if isinstance(rule, TrainedRule):
            rule = rule.rule
        if not rule.learned:
            raise ValueError(
                f"{type(rule).__name__} has no weights: there is nothing to meta-train"
            )
        self.tasks, self.rule, self.config = tuple(tasks), rule, config
        device = _one_device(self.tasks)
        if config.proportions is not None and len(config.proportions) != len(self.tasks):
            raise ValueError(
                f"meta_train: proportions must be one a task ({len(self.tasks)}), got "
                f"{len(config.proportions)}"
            )
        seeds = torch.Generator().manual_seed(config.seed)
        self.sampler = torch.Generator().manual_seed(config.seed + 1)
        # Of the 2^32 that torch's generator on a CPU tells apart, at random: others are met as good
        # as never.
        first = 2**41 + int(torch.randint(2**40, (), generator=seeds))
        start = self.parent.weights if self.parent else rule.init(seeds)
        self.weights = {
            key: value.detach().to(device, copy=True).requires_grad_()
            for key, value in start.items()
        }
        self.best = {key: value.detach().clone() for key, value in self.weights.items()}
        self.adam = torch.optim.Adam(self.weights.values(), lr=config.lr)
        self.episodes = [
            Episodes(task, rule, self.weights, config, first + place * config.copies)
            for place, task in enumerate(self.tasks)
        ]
        self.progress = Progress()

    @property
    def spent(self) -> float:
        """Share of the budget spent, 0 to 1."""
        if self.config.steps is not None:
            return self.progress.inner_steps / self.config.steps
        assert self.config.seconds is not None
        return self.progress.elapsed / self.config.seconds

    @property
    def stalled(self) -> bool:
        """Whether the last `patience` validations brought nothing better."""
        return has_stalled(self.progress.validations, self.config.patience)

    def window(self) -> Window:
        """One meta-update, from one window or as many as are accumulated; returns the last."""
        share = self.spent
        parts = [self._one_window() for _ in range(self.config.accumulate)]
        self._update([gradients for _, gradients in parts if gradients is not None], share)
        return parts[-1][0]

    def _one_window(self) -> tuple[Window, list[Tensor] | None]:
        """A window of the task whose turn it is, and its share in the update, if any."""
        progress = self.progress
        proportions = self.config.proportions or [1.0] * len(self.episodes)
        # Whoever is furthest behind its share; equal shares go round in order.
        episodes, place, _ = min(
            zip(self.episodes, range(len(self.episodes)), proportions, strict=True),
            key=lambda one: ((one[0].windows + 1) / one[2], one[1]),
        )
        turn = episodes.turn(self.weights, self.sampler)
        window = turn.window
        gradients = list(window.gradients.values())
        norm = float(_norm(gradients))
        row = {"inner_steps": progress.inner_steps, "value": window.value, "norm": norm}
        if len(self.episodes) > 1:
            row["task"] = place
        if turn.imitated:
            row["imitated"] = 1
        progress.history.append(row)
        del progress.history[:-KEPT]
        progress.inner_steps += turn.steps
        progress.diverged += turn.diverged
        if not math.isfinite(norm) or not window.finite_C.any():
            progress.skipped += 1
            if progress.skipped == 1:
                _log.warning(
                    "meta_train: a window's losses or meta-gradient were not finite; its update "
                    "is skipped (later ones are counted, not announced)"
                )
            return window, None
        if len(self.episodes) > 1 or self.config.imitation:
            weight = episodes.weight(norm, turn.imitated)
            gradients = [gradient * weight for gradient in gradients]
        return window, gradients

    def _update(self, parts: list[list[Tensor]], share: float) -> None:
        """Step meta-Adam by the mean of some meta-gradients, `share` of the budget spent."""
        if not parts:
            return
        mean = [torch.stack(own).mean(0) for own in zip(*parts, strict=True)]
        scale = min(1.0, self.config.clip / (float(_norm(mean)) + 1e-12))
        for weight, gradient in zip(self.weights.values(), mean, strict=True):
            weight.grad = gradient * scale
        self.adam.param_groups[0]["lr"] = self.config.rate(share)
        self.adam.step()
        self.progress.updates += 1

    def validate(self) -> float:
        """Score the weights on whole episodes of held-out examples; keep them where best.

        With one task the score is its validation loss; with several, the geometric mean over tasks
        of the ratio to their first finite ones, which ranks weights alike whatever the scales.
        """
        scores = [episodes.validate(self.weights) for episodes in self.episodes]
        progress = self.progress
        row: dict[str, Any] = {"inner_steps": progress.inner_steps, "seconds": progress.elapsed}
        if len(scores) == 1:
            row["score"] = scores[0]
        else:
            row["scores"] = scores
            rows = [*(point["scores"] for point in progress.validations), scores]
            row["score"] = joint_score(self.config.validated_by, rows, [t.name for t in self.tasks])
        progress.validations.append(row)
        score = row["score"]
        better = progress.best_score is None or score < progress.best_score
        if math.isfinite(score) and better:
            progress.best_score = score
            self.best = {key: value.detach().clone() for key, value in self.weights.items()}
        return score

    def trained(self, name: str | None) -> TrainedRule:
        """The best weights so far, with how they came to be."""
        progress = self.progress
        before = self.parent.manifest if self.parent else {}
        sizes = [episodes.parameters for episodes in self.episodes]
        manifest = {
            "name": name or joint_name(self.tasks),
            "tasks": [task.name for task in self.tasks],
            "data": ", ".join(dict.fromkeys(task.data_name for task in self.tasks)),
            "horizon": self.config.horizon,
            "parameters": sizes[0] if len(sizes) == 1 else sizes,
            "meta_training": asdict(self.config),
            "validation": {"loss": self.config.validated_by, "score": progress.best_score},
            "seconds": round(progress.elapsed + before.get("seconds", 0.0), 1),
            "inner_steps": progress.inner_steps + before.get("inner_steps", 0),
            "updates": progress.updates + before.get("updates", 0),
            "skipped": progress.skipped,
            "diverged": progress.diverged,
            "validations": progress.validations,
            "machine": machine(),
            "torch": torch.__version__.split("+")[0],
        }
        parent_cores = before.get("core_seconds") if self.parent else 0.0
        if progress.core_seconds is not None and parent_cores is not None:
            manifest["core_seconds"] = round(progress.core_seconds + parent_cores, 1)
        if self.parent is not None:
            kept = ("name", "tasks", "horizon", "seconds", "core_seconds", "inner_steps",
                    "meta_training", "machine", "parent")  # fmt: skip
            manifest["parent"] = {key: before[key] for key in kept if key in before}
            manifest["parent"]["fingerprint"] = self.parent.fingerprint
        weights = {key: value.cpu().clone() for key, value in self.best.items()}
        return TrainedRule(self.rule, weights, manifest)


def meta_train(
    task: Task | Sequence[Task],
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
    """Meta-train an update rule on a task, or on several at once.

    Args:
        task: what the rule will learn to train; `Task.from_module` makes one of any module. Of
            several, each has its own optimizees, and windows go round.
        rule: a rule, or the name of one (`joined`, `l2o_dm`, `rnnprop`), to start from fresh
            weights; a `TrainedRule` (`load` gives one) to go on from its weights. The manifest then
            counts its seconds too, and tells its history under `parent`.
        out: folder for checkpoints (`run.safetensors`: after the first window, at growing intervals
            up to `checkpoint_seconds`, and at the end) and the result (`rule.safetensors`), without
            those of another run; None writes nothing. A checkpoint that cannot be written is said
            and tried again; a result that cannot is kept among the system's temporary files, and
            the warning says where.
        resume: continue from the checkpoint in `out`, to the same numbers as an uninterrupted run
            (bitwise on a CPU with a budget in steps). A folder without a checkpoint, whose run was
            killed before the first, begins from its start.
        progress: show a bar with rates and the expected end.
        tensorboard: write TensorBoard events to `out/tensorboard` (needs the extra).
        name: of the trained rule; by default the task's, or how many there are.
        on_window: called after each window with the run and the window.
        config: fields of `MetaTrainConfig`; a budget (`seconds` or `steps`) is needed.

    Returns:
        The rule with the weights that validated best.

    Raises:
        ValueError: a bad configuration, a budget smaller than one window, a rule without weights, a
            checkpoint of another one or a damaged one, a folder that holds a meta-training and is
            not to be resumed, that another process trains in, or that cannot be written to;
            TensorBoard is not installed.
        TypeError: an argument of another type.
        RuntimeError: no validation ever had a finite score.
        KeyboardInterrupt: interrupted by SIGINT, SIGTERM or SIGHUP; the window was finished and a
            checkpoint written first.

    >>> from stepsmith.tasks import Quadratic
    >>> trained = meta_train(Quadratic(), "joined", steps=400, horizon=20, validations=1)
    >>> trained.horizon
    20
    """
    owner = "meta_train"
    settings = MetaTrainConfig(**config)
    require_kind(owner, "task", task, Task | Iterable, "one or several")
    require_kind(owner, "rule", rule, Rule | TrainedRule | str, "a rule, or the name of one")
    require_kind(owner, "out", out, str | PathLike | None, "a folder")
    require_kind(owner, "name", name, str | None)
    require_kind(owner, "on_window", on_window, Callable | None)
    for flag, value in (("resume", resume), ("progress", progress), ("tensorboard", tensorboard)):
        require_flag(owner, flag, value)
    tasks = [task] if isinstance(task, Task) else list(task)
    folder = None if out is None else Path(out)
    if folder is None and (resume or tensorboard):
        raise ValueError("meta_train: resume and tensorboard need out=FOLDER")
    if tensorboard:
        require_tensorboard()
    if resume and folder is not None:
        require_begun(folder)
    run = Run(tasks, make_rule(rule) if isinstance(rule, str) else rule, settings)
    settings.require_a_window("meta_train")
    update = settings.unroll * settings.copies * settings.accumulate
    if settings.steps is not None and settings.steps < update:
        _log.warning(
            "meta_train: one update takes %s steps (%s a window, %s copies, %s windows an update), "
            "more than the budget of %s; it is made all the same",
            update, settings.unroll, settings.copies, settings.accumulate, settings.steps,
        )  # fmt: skip
    with alone("meta_train", folder):
        if folder is not None:
            if resume and can_continue(folder):
                load_run(run, folder / CHECKPOINT)
            else:
                require_fresh("meta_train", folder)
        saver = Saver(None if folder is None else folder / CHECKPOINT, settings.checkpoint_seconds)
        events = folder / "tensorboard" if tensorboard and folder is not None else None
        with (
            Reporter(run, shown=progress, tensorboard=events) as reporter,
            Interrupt() as interrupt,
        ):
            _drive(run, saver, reporter, interrupt, on_window)
            done = run.spent >= 1 or run.stalled
            if done and run.progress.best_score is None:
                raise RuntimeError(
                    f"meta_train: no validation had a finite score{_never_finite(run)}; try a "
                    "smaller step_scale or lr"
                )
            saver.save(run)
            trained = run.trained(name) if done else None
            if trained is not None and folder is not None:
                save_rule(trained, folder)
            if interrupt.asked or trained is None:
                raise KeyboardInterrupt(_stopped(folder, saver))
    scores = [point["score"] for point in run.progress.validations]
    if run.progress.best_score == scores[0] and len(scores) > 1:
        _log.warning(
            "meta_train: no validation was better than the first, so the weights returned are "
            "those it started from; give it a larger budget, or look at lr and step_scale"
        )
    return trained


def _drive(
    run: Run,
    saver: Saver,
    reporter: Reporter,
    interrupt: Interrupt,
    on_window: Callable[[Run, Window], None] | None,
) -> None:
    """Spend what is left of a run's budget, or of what comes before an interruption."""
    earlier, earlier_cores = run.progress.elapsed, run.progress.core_seconds
    begun, begun_cores = time.perf_counter(), time.process_time()

    def tick() -> None:
        run.progress.elapsed = earlier + time.perf_counter() - begun
        if earlier_cores is not None:
            run.progress.core_seconds = earlier_cores + time.process_time() - begun_cores

    if not run.progress.validations:
        run.validate()
        tick()
        saver.save(run)
    while run.spent < 1 and not run.stalled and not interrupt.asked:
        window = run.window()
        tick()
        due = len(run.progress.validations) - 1 < int(run.spent * run.config.validations)
        if due or run.spent >= 1:
            run.validate()
            tick()
        reporter.show(window)
        if on_window is not None:
            on_window(run, window)
        if saver.due():
            saver.save(run)


def _stopped(folder: Path | None, saver: Saver) -> str:
    told = "meta-training was interrupted"
    if folder is None:
        return told
    if saver.failed:
        told += "; its state could not be saved, so an earlier checkpoint counts, if there is one"
    return f"{told}; continue with resume=True, out={str(folder)!r}"


def has_stalled(validations: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` of these brought no better score than those before; never without
    patience or before the first finite score."""
    scores = [point["score"] for point in validations]
    finite = [score for score in scores if math.isfinite(score)]
    if patience is None or not finite:
        return False
    return len(scores) - 1 - scores.index(min(finite)) >= patience


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


def _one_device(tasks: Sequence[Task]) -> torch.device:
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        kinds = ", ".join(type(task).__name__ for task in tasks) or "none"
        raise ValueError(f"meta_train: needs a task or a sequence of tasks, got {kinds}")
    devices = {task.device for task in tasks}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"meta_train: all tasks must be on one device, got {names}")
    return tasks[0].device


def _never_finite(run: Run) -> str:
    if len(run.tasks) == 1:
        return ""
    columns = zip(*(point["scores"] for point in run.progress.validations), strict=True)
    bad = [
        task.name
        for task, scores in zip(run.tasks, columns, strict=True)
        if not any(math.isfinite(score) for score in scores)
    ]
    return f" on all tasks at once (never on {', '.join(bad)})" if bad else " on all tasks at once"
