"""What SL2O's paper says cannot be done: its rule on all parameters of a network, by the adjoint
engine, in the memory of deployment."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch

from stepsmith.hub import TrainedRule
from stepsmith.machine import peak_memory
from stepsmith.meta import MetaTrainConfig
from stepsmith.meta.trainer import Run
from stepsmith.recipes.paper_b.clock import clock, speed
from stepsmith.recipes.paper_b.comparisons import SL2O, basis_seconds
from stepsmith.recipes.paper_b.deep import FULL_SPACE, SUBSPACE, contest, depth, learn, place
from stepsmith.recipes.study import Recipe, Study
from stepsmith.rules import Rule, make_rule, rnnprop
from stepsmith.tasks import Task
from stepsmith.unroll import Copies, RuleStepper, roll

RULES: dict[str, Rule] = {
    "SL2O's rule, all parameters": rnnprop(step_scale=0.01),
    "relative units, all parameters": make_rule("joined", scaling="relative", step_scale=3.0),
}
"""The rule of the supplement with steps that suit single weights, and this library's own."""

WINDOW = 50
"""Steps of a window: memory does not grow with it."""
SAMPLES = 400_000
"""Coordinate-steps replayed a window."""


def all_parameters(study: Study) -> None:
    """The rules on all parameters of ResNet-20 beside SL2O and the tuned baselines; memory and rate
    of meta-training them on ResNet-20 and ResNet-18."""
    here = place(study, "resnet20")
    held = contest(study, "resnet20", here.task)
    trained = learn(study, "sl2o-resnet20", here.sub)
    held.rule(SL2O, here.sub, trained, before=here.seconds)
    amounts = depth(study)
    window = WINDOW if amounts.episode % WINDOW == 0 else amounts.unroll
    for number, (label, rule) in enumerate(RULES.items()):
        trained = learn(
            study, f"full-space-resnet20-{number + 1}", here.task, rule, unroll=window,
            samples=SAMPLES,
        )  # fmt: skip
        held.rule(label, here.full, trained)
    for label, entry in SUBSPACE.items():
        held.baseline(label, here.sub, entry, before=here.seconds)
    for label, entry in FULL_SPACE.items():
        held.baseline(label, here.full, entry)
    held.finish()
    about = (study.records, "resnet20", held.key.protocol)
    study.findings["against_sl2o"] = {label: speed(*about, label, [SL2O]) for label in RULES}
    study.findings["clock"] = clock(
        *about, basis_seconds=basis_seconds(held, here), subspace={SL2O, *SUBSPACE}
    )
    networks = ("resnet8",) if study.scale.name == "quick" else ("resnet20", "resnet18")
    study.findings["memory"] = [memory(study, name) for name in networks]


def memory(study: Study, network: str, windows: int = 2) -> dict[str, Any]:
    """Peak memory of deploying and of meta-training a rule on a network, in processes of their own.

    Args:
        study: says how much.
        network: which.
        windows: of meta-training, of the length of the recipe's; the first is not in the rate.

    Returns:
        Bytes above those of a process that only takes gradients' place (imports, data, one
        optimizee): `deployment` and `meta_training`, their ratio, and inner steps a second. On a
        GPU, bytes allocated there.
    """
    study.say(f"{network}: memory of meta-training")
    amounts = depth(study)
    data = amounts.data.partition("@")[0]
    given = (f"{network}-{data}@rgb32@200", study.where, amounts.batch, study.device)
    steps = WINDOW
    if study.scale.name == "quick":
        steps = amounts.unroll
    base, _ = _alone(_base, *given)
    deployed, _ = _alone(_deploy, *given, windows * steps)
    trained, rate = _alone(_meta_train, *given, windows, steps)
    return {
        "network": network, "batch": amounts.batch, "inner_steps": windows * steps,
        "deployment": deployed - base, "meta_training": trained - base,
        "ratio": (trained - base) / max(1, deployed - base), "inner_steps_per_second": rate,
    }  # fmt: skip


def _alone(measure: Callable[..., tuple[int, float]], *arguments: Any) -> tuple[int, float]:
    """In a fresh process, whose peak is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def _task(name: str, where: dict[str, Any], batch: int, device: str) -> Task:
    from stepsmith.tasks import make_task

    return make_task(name, batch_size=batch, device=device, **where)


def _rule() -> TrainedRule:
    rule = next(iter(RULES.values()))
    return TrainedRule(rule, rule.init(torch.Generator().manual_seed(0)), {})


def _peak(task: Task) -> int:
    if task.device.type == "cuda":
        return torch.cuda.max_memory_allocated(task.device)
    return peak_memory()


def _base(*given: Any) -> tuple[int, float]:
    task = _task(*given)
    Copies(task, [0])
    return _peak(task), 0.0


def _deploy(*given: Any) -> tuple[int, float]:
    *where, steps = given
    task, trained = _task(*where), _rule()
    copies = Copies(task, [0])
    stepper = RuleStepper(trained.rule, trained.weights, copies.theta, copies.layout)
    roll(copies, stepper, steps)
    return _peak(task), 0.0


def _meta_train(*given: Any) -> tuple[int, float]:
    *where, windows, steps = given
    task = _task(*where)
    config = MetaTrainConfig(steps=1, horizon=steps, copies=1, samples=SAMPLES)
    run = Run([task], _rule(), config)
    run.window()
    begun = time.perf_counter()
    for _ in range(windows - 1):
        run.window()
    return _peak(task), steps * (windows - 1) / (time.perf_counter() - begun)


RECIPES = (
    Recipe("b12-full-space", "rules on all parameters of ResNet-20 and -18", all_parameters),
)
