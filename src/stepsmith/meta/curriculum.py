"""A curriculum of horizons: short episodes first, each stage going on from the best of the last.

Long episodes from the start cost many inner steps for each update, and a fresh rule wanders or
diverges in them; a rule that can do 100 steps learns to do 200 quickly.

Source: Chen et al. 2020, "Training Stronger Baselines for Learning to Optimize", arXiv:2010.09089:
there too a stage is validated on the horizon of the next one, and ends when that stops improving.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stepsmith.hub import TrainedRule
from stepsmith.meta.adjoint import Window
from stepsmith.meta.checkpoint import CHECKPOINT, alone, require_begun, require_fresh, save_rule
from stepsmith.meta.config import MetaTrainConfig
from stepsmith.meta.progress import require_tensorboard
from stepsmith.meta.trainer import Run, has_stalled, meta_train
from stepsmith.rules import Rule
from stepsmith.rules.base import require_count, require_flag, require_kind, require_number
from stepsmith.tasks.base import Task

HORIZONS = (100, 200, 500, 1000)
"""Stages by default."""

SEEDS_APART = 1000
"""Between the seeds of two stages, so that no stage sees the starts of another."""

_SET_BY_STAGE = ("horizon", "validation_horizon", "patience")


def train_curriculum(
    task: Task | Sequence[Task],
    rule: Rule | TrainedRule | str = "joined",
    horizons: Sequence[int] = HORIZONS,
    *,
    shares: Sequence[float] | None = None,
    patience: int | None = 3,
    look_ahead: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    name: str | None = None,
    on_window: Callable[[Run, Window], None] | None = None,
    **config: Any,
) -> TrainedRule:
    """Meta-train in stages of growing horizon.

    Args:
        task, rule, progress, tensorboard, name, on_window: as for `meta_train`.
        horizons: steps of an episode in each stage, growing.
        shares: of the budget, one a stage; by default equal. What a stage leaves, because it ended
            early, goes to those after it.
        patience: a stage ends when so many validations in a row were no better than its best; None
            spends its whole share.
        look_ahead: validate a stage on the horizon of the next, so that its best weights are those
            that the next one can start from; the last stage is validated on its own.
        out: folder: one folder a stage (`stage-1-100`, ...), as `meta_train` writes them, and the
            result (`rule.safetensors`).
        resume: continue in `out`: stages that have ended are not run again.
        config: fields of `MetaTrainConfig`; a budget, of all stages together, is needed. `window`
            is the longest window: each stage takes the longest that divides its horizon; None takes
            whole horizons. `validations` are those of a stage.

    Returns:
        The weights that validated best in the last stage. Its manifest counts all stages, and
        tells them under `curriculum`.

    Raises:
        ValueError: horizons that do not grow, shares that are not one a stage and above zero,
            `horizon`, `patience` or `validation_horizon` among `config`, or as `meta_train`.
        TypeError: an argument of another type.
        RuntimeError, KeyboardInterrupt: as `meta_train`.

    >>> from stepsmith.tasks import Quadratic
    >>> trained = train_curriculum(Quadratic(3), horizons=(5, 10), steps=200, copies=2)
    >>> trained.horizon, [stage["horizon"] for stage in trained.manifest["curriculum"]]
    (10, [5, 10])
    """
    stages, shares = curriculum_stages(
        horizons, shares=shares, patience=patience, look_ahead=look_ahead, **config
    )
    folder = None if out is None else Path(out)
    if folder is None and (resume or tensorboard):
        raise ValueError("train_curriculum: resume and tensorboard need out=FOLDER")
    if tensorboard:
        require_tensorboard()
    if folder is not None and resume:
        require_begun(folder)
    unit = "steps" if config.get("steps") is not None else "seconds"
    counter = "inner_steps" if unit == "steps" else "seconds"
    start = rule.manifest if isinstance(rule, TrainedRule) else {}
    told: list[dict[str, Any]] = []
    current: Rule | TrainedRule | str = rule
    before = start
    with alone("train_curriculum", folder):
        if folder is not None and not resume:
            require_fresh("train_curriculum", folder)
        for place, stage in enumerate(stages):
            left = config[unit] - (before.get(counter, 0) - start.get(counter, 0))
            budget = left * shares[place] / sum(shares[place:])
            # Where earlier stages overran, a stage still has a window, and validates what it gives.
            least = stage["window"] or stage["horizon"]
            stage[unit] = max(least, int(budget)) if unit == "steps" else max(1e-3, budget)
            own = None if folder is None else folder / f"stage-{place + 1}-{stage['horizon']}"
            begun = resume and own is not None and (own / CHECKPOINT).exists()
            try:
                current = meta_train(
                    task, current, out=own, resume=begun, progress=progress,
                    tensorboard=tensorboard, name=name, on_window=on_window, **stage,
                )  # fmt: skip
            except KeyboardInterrupt:
                kept = "" if folder is None else f"; continue with resume=True, out={str(folder)!r}"
                raise KeyboardInterrupt(
                    f"meta-training was interrupted in stage {place + 1} of {len(stages)}{kept}"
                ) from None
            told.append(_told(current, before, patience))
            before = current.manifest
        assert isinstance(current, TrainedRule)
        trained = dataclasses.replace(current, manifest={**current.manifest, "curriculum": told})
        if folder is not None:
            save_rule(trained, folder)
    return trained


def curriculum_stages(
    horizons: Sequence[int] = HORIZONS,
    *,
    shares: Sequence[float] | None = None,
    patience: int | None = 3,
    look_ahead: bool = True,
    **config: Any,
) -> tuple[list[dict[str, Any]], list[float]]:
    """The settings of each stage, checked before any of them is run, and its share of the budget.

    Args:
        horizons, shares, patience, look_ahead, config: as for `train_curriculum`.

    Raises:
        ValueError, TypeError: as `train_curriculum`.
    """
    owner = "train_curriculum"
    require_kind(owner, "horizons", horizons, Iterable, "the steps of each stage")
    horizons = [require_count(owner, f"horizons[{i}]", n) for i, n in enumerate(horizons)]
    require_kind(owner, "shares", shares, Iterable | None, "one number a stage")
    shares = [1.0] * len(horizons) if shares is None else list(shares)
    shares = [require_number(owner, f"shares[{i}]", n, above=0) for i, n in enumerate(shares)]
    look_ahead = require_flag(owner, "look_ahead", look_ahead)
    if not horizons or any(b <= a for a, b in itertools.pairwise(horizons)):
        raise ValueError(f"{owner}: horizons must grow from stage to stage, got {tuple(horizons)}")
    if len(shares) != len(horizons):
        raise ValueError(
            f"{owner}: shares must be one a stage ({len(horizons)}), got {tuple(shares)}"
        )
    for key in _SET_BY_STAGE:
        if key in config:
            raise ValueError(f"{owner}: {key} is set stage by stage; leave it out")
    seed = require_count(owner, "seed", config.get("seed", 0), least=0, most=2**62)
    window = config.get("window")
    window = None if window is None else require_count(owner, "window", window, least=0)
    stages = []
    for place, horizon in enumerate(horizons):
        ahead = horizons[min(place + 1, len(horizons) - 1)]
        stage = {
            **config, "horizon": horizon, "patience": patience,
            "window": longest_window(horizon, window),
            "validation_horizon": ahead if look_ahead and ahead != horizon else None,
            "seed": seed + SEEDS_APART * place,
        }  # fmt: skip
        MetaTrainConfig(**stage).require_a_window(owner)
        stages.append(stage)
    return stages, shares


def longest_window(horizon: int, limit: int | None) -> int | None:
    """The longest window of at most `limit` steps that divides the horizon; None, the whole
    horizon, where nothing limits it.

    >>> longest_window(500, 200), longest_window(100, 200), longest_window(500, None)
    (125, None, None)
    """
    if limit is None or limit >= horizon:
        return None
    return max((steps for steps in range(1, limit + 1) if horizon % steps == 0), default=limit)


def _told(trained: TrainedRule, before: dict[str, Any], patience: int | None) -> dict[str, Any]:
    """What the manifest says of a stage."""
    manifest = trained.manifest
    return {
        "horizon": manifest["horizon"],
        "window": manifest["meta_training"]["window"] or manifest["horizon"],
        "validation_horizon": manifest["meta_training"]["validation_horizon"]
        or manifest["horizon"],
        "inner_steps": manifest["inner_steps"] - before.get("inner_steps", 0),
        "updates": manifest["updates"] - before.get("updates", 0),
        **{
            key: round(manifest[key] - before.get(key, 0.0), 1)
            for key in ("seconds", "core_seconds")
            if key in manifest
        },
        "ended": "no better" if has_stalled(manifest["validations"], patience) else "budget",
        "scores": [point["score"] for point in manifest["validations"]],
        "fingerprint": trained.fingerprint,
    }
