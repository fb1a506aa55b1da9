"""What SL2O's paper says cannot be done: its rule on all parameters of a network, by the adjoint
engine, in the memory of deployment."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from stepsmith.evaluate.epochs import CONSTANT, Contest
from stepsmith.hub import TrainedRule, load
from stepsmith.machine import peak_memory, start_peak
from stepsmith.meta import MetaTrainConfig
from stepsmith.meta.trainer import Run
from stepsmith.recipes.paper_b.clock import outlasting, speed
from stepsmith.recipes.paper_b.comparisons import (
    SL2O,
    add_clock,
    basis_seconds,
    contests,
    learn_episodes,
    of_episodes,
)
from stepsmith.recipes.paper_b.deep import (
    COSINE,
    FULL_SPACE,
    Place,
    contest,
    deep_recipe,
    depth,
    fresh_places,
    learn,
    place,
)
from stepsmith.recipes.study import Study
from stepsmith.rules import Rule, rnnprop
from stepsmith.tasks import ModuleTask, Task
from stepsmith.tasks.networks import get_network
from stepsmith.unroll import Copies, RuleStepper, TorchStepper, roll

_SL2O_RULE = partial(rnnprop, step_scale=0.01)
"""The rule of the supplement, with steps that suit single weights."""
BUNDLED = "general-warmed"
AS_IT_IS = f"{BUNDLED}, all parameters"
"""This library's bundled rule, which has seen neither the network nor its data."""
FROM_NOTHING = "SL2O's rule, all parameters"
RULES: dict[str, tuple[Callable[[], Rule | TrainedRule], str]] = {
    FROM_NOTHING: (_SL2O_RULE, "window"),
    f"{BUNDLED}, meta-trained further": (partial(load, BUNDLED), "episode"),
}
"""What is meta-trained, and in windows of which of `Depth`'s lengths: the rule of the supplement
from nothing, which takes many updates; and the bundled one, which takes few, of whole episodes:
shorter ones teach it steps that the next few make up for."""

NETWORKS = {"full": ("resnet20", "resnet18"), "small": ("resnet20",), "quick": ("resnet8",)}
"""Whose parameters are all trained, by scale."""
SAMPLES = 400_000
"""Coordinate-steps replayed a window."""
MEASURED = {
    "full": {"resnet20": tuple(RULES), "resnet18": tuple(RULES)},
    "small": {"resnet20": tuple(RULES), "resnet18": (FROM_NOTHING,)},
    "quick": {"resnet8": tuple(RULES)},
}
"""Of which rules on which networks memory is measured, by scale."""
IMAGE, CLASSES = (3, 32, 32), 10
"""Of the images that memory is measured on."""
WARM_UP = "resnet8"
LONGER = "adamw, cosine"
"""Baseline of the whole space that is tuned once more where the steps of a basis count."""
STEPS = 100
"""Over which the memory of training and of deployment is measured: no more of them change it."""


def all_parameters(study: Study) -> None:
    """The rules on all parameters beside SL2O and the tuned baselines, from the saved start and
    from fresh ones; over as many steps as SL2O takes with those of its basis; memory and rate of
    meta-training them."""
    for name in NETWORKS[study.scale.name]:
        _network(study, name)
    study.findings["memory"] = [
        row
        for name, labels in MEASURED[study.scale.name].items()
        for row in memory(study, name, labels)
    ]


def _network(study: Study, name: str) -> None:
    here, fresh, amounts = place(study, name), fresh_places(study, name), depth(study)
    within = {
        SL2O: learn(study, f"sl2o-{name}", here.sub),
        of_episodes(amounts.descent): learn_episodes(study, name, here, amounts.descent),
    }
    # A test's steps on a tenth of the images would be kept for learning these by heart.
    rules = {
        label: learn(
            study, f"full-space-{name}-{number + 1}", here.task, start(),
            unroll=getattr(amounts, window), samples=SAMPLES, validation_split="meta_train",
        )
        for number, (label, (start, window)) in enumerate(RULES.items())
    }  # fmt: skip
    whole = {**rules, AS_IT_IS: load(BUNDLED)}
    published, corrected = contests(study, name, here, fresh, within, whole, full_space=FULL_SPACE)
    for protocol in (published.key.protocol, corrected.key.protocol):
        about = (study.records, name, protocol)
        study.findings.setdefault("against_sl2o", []).extend(
            speed(*about, label, within) for label in whole
        )
    add_clock(study, published, here)
    _with_the_basis(study, published, here, within, rules)


def _with_the_basis(
    study: Study,
    shorter: Contest,
    here: Place,
    within: Iterable[str],
    rules: Mapping[str, TrainedRule],
) -> None:
    """SL2O begins from a start of which a whole training is known: its basis. Here the whole space
    gets these steps as well, the rules by themselves and under the baseline's schedule."""
    amounts = depth(study)
    epochs = amounts.epochs + amounts.basis_epochs
    name = f"{shorter.name}, {epochs} epochs"
    # One at a time: these are long, and what is interrupted loses as many as run at once.
    held = contest(study, name, here.task, epochs=epochs, copies=1)
    timed = {LONGER: LONGER}
    for label, trained in rules.items():
        for entrant, schedule in ((label, CONSTANT), (f"{label}, cosine", COSINE)):
            held.rule(entrant, here.full, trained, schedule=schedule)
            timed[entrant] = label
    held.baseline(LONGER, here.full, FULL_SPACE[LONGER])
    basis = basis_seconds(shorter, here)
    study.findings.setdefault("against_sl2o_and_its_basis", []).extend(
        outlasting(held, entrant, shorter, other, basis, timed_as=timed_as)
        for entrant, timed_as in timed.items()
        for other in within
    )


def memory(study: Study, network: str, labels: Iterable[str]) -> list[dict[str, Any]]:
    """Peak memory of deploying and of meta-training rules on a network, in processes of their own.

    Args:
        study: says how much.
        network: which.
        labels: of some of `RULES`, which say the windows too.

    Returns:
        Of each rule, bytes above those of a process that has the network and its data but no
        optimizee yet: of `training` by SGD (an optimizee, its gradient and what the pass through it
        needs), of `deployment` of the rule, and of `meta_training`, a validation and two windows;
        its ratio to deployment, the `ratio_amid` where the validation falls amid an episode, so
        that on a CPU the rule's memory is there twice, and inner steps a second of the second
        window. On a GPU, bytes allocated there.
    """
    amounts = depth(study)
    given = (network, amounts.batch, study.device)
    study.say(f"{network}: memory of SGD")
    trained, _ = _alone(_train, *given, STEPS)
    rows = []
    for label in labels:
        study.say(f"{network}: memory of {label}")
        window = getattr(amounts, RULES[label][1])
        deployed, _ = _alone(partial(_deploy, label), *given, STEPS)
        learned, rate = _alone(partial(_meta_train, label), *given, window)
        amid, _ = _alone(partial(_meta_train, label, amid=True), *given, window)
        rows.append({
            "network": network, "rule": label, "batch": amounts.batch, "window": window,
            "training": trained, "deployment": deployed, "meta_training": learned,
            "ratio": learned / deployed, "ratio_amid": amid / deployed,
            "inner_steps_per_second": rate,
        })  # fmt: skip
    return rows


def _alone(measure: Callable[[Task, int], float | None], *given: Any) -> tuple[int, float | None]:
    """In a fresh process, whose peak is nobody else's: bytes, and what `measure` returns."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (measure, *given))


def _measured(
    measure: Callable[[Task, int], float | None], network: str, batch: int, device: str, steps: int
) -> tuple[int, float | None]:
    measure(_random_task(WARM_UP, batch, device), 2)  # what is loaded or compiled once is not of it
    task = _random_task(network, batch, device)
    before = start_peak(task.device)
    told = measure(task, steps)
    return peak_memory(task.device) - before, told


def _random_task(network: str, batch: int, device: str) -> Task:
    """A network on random images: to decode a data set would leave memory for what follows to hide
    in."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(256, *IMAGE, generator=draw)
    labels = torch.randint(CLASSES, (256,), generator=draw)
    return ModuleTask(
        partial(get_network(network), torch.Size(IMAGE), CLASSES), F.cross_entropy,
        (images, labels), batch_size=batch, device=device,
    )  # fmt: skip


def _rule(label: str) -> TrainedRule:
    rule = RULES[label][0]()
    if isinstance(rule, TrainedRule):
        return rule
    return TrainedRule(rule, rule.init(torch.Generator().manual_seed(0)), {})


def _train(task: Task, steps: int) -> None:
    copies = Copies(task, [0])
    sgd = partial(torch.optim.SGD, lr=0.01)
    roll(copies, TorchStepper(sgd, copies.theta, copies.layout), steps)


def _deploy(label: str, task: Task, steps: int) -> None:
    copies, trained = Copies(task, [0]), _rule(label)
    roll(copies, RuleStepper(trained.rule, trained.weights, copies.theta, copies.layout), steps)


def _meta_train(label: str, task: Task, window: int, amid: bool = False) -> float:
    """A validation and a window, where `amid` an episode in the other order; and a window's inner
    steps a second."""
    config = MetaTrainConfig(
        steps=2 * window, horizon=2 * window if amid else window, window=window, copies=1,
        samples=SAMPLES, validation_copies=1, validation_horizon=window,
    )  # fmt: skip
    run = Run([task], _rule(label), config)
    for part in (run.window, run.validate) if amid else (run.validate, run.window):
        part()
    begun = time.perf_counter()
    run.window()
    return window / (time.perf_counter() - begun)


RECIPES = (
    deep_recipe("b12-full-space", "rules on all parameters of ResNet-20 and -18", all_parameters),
)
