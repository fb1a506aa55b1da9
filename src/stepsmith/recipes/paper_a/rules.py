"""The meta-trainings behind paper A's recipes, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stepsmith.hub import TrainedRule
from stepsmith.names import unknown
from stepsmith.recipes.paper_a import published
from stepsmith.recipes.study import Study
from stepsmith.rules import Rule, l2o_dm, make_rule
from stepsmith.tasks import RandomlyScaled, Task

Protocol = Literal["corrected", "as-published"]


@dataclass(frozen=True)
class MetaTraining:
    """A rule and how it is meta-trained.

    Args:
        tasks: names; several are trained on at once.
        rule: fresh.
        config: of `meta_train`, its budget in inner steps.
        further: changes to `config` for stages that go on from the one before.
        protocol: which data and network the tasks stand for.
        scaled: `"coordinate"` or `"tensor"`: each task by `RandomlyScaled`; empty, as it is.
        changed: fields of the rule that are changed once it is meta-trained.
    """

    tasks: tuple[str, ...]
    rule: Rule
    config: dict[str, Any]
    further: tuple[dict[str, Any], ...] = ()
    protocol: Protocol = "corrected"
    scaled: str = ""
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The configuration of each stage."""
        return [self.config, *(self.config | change for change in self.further)]


def as_published(name: str, rule: Rule, lr: float, validation_copies: int) -> MetaTraining:
    """20 epochs of 20 episodes of 100 steps in windows of 20, every coordinate, plain Adam.

    The losses of a window are those before its steps; after each epoch the rule is validated by
    its summed loss over 100 steps, and the best is kept.
    """
    config = {
        "steps": 40_000, "horizon": 100, "window": 20, "copies": 1, "samples": None,
        "losses": "before", "lr": lr, "final_lr": 1.0, "warmup": 0.0, "clip": 1e9,
        "validations": 20, "validation_copies": validation_copies,
    }  # fmt: skip
    return MetaTraining((name,), rule, config, protocol="as-published")


def _lstm(inputs: str = "log_sign", step_scale: float = 0.1) -> Rule:
    return l2o_dm(inputs=inputs, step_scale=step_scale, faithful=True)


def _quadratic(step_scale: float = 0.3) -> Rule:
    return make_rule("joined", hidden=20, step_scale=step_scale, start=0.03, scaling="absolute")


def _relative() -> Rule:
    return make_rule("joined")


_OWN: dict[str, Any] = {
    "horizon": 100, "copies": 1, "validation_copies": 16, "lr": 0.01, "samples": 40_000,
}  # fmt: skip
"""Windows of the whole horizon, for rules in relative units."""


def _own(
    task: str, steps: int, further: tuple[dict[str, Any], ...] = (), **changes: Any
) -> MetaTraining:
    return MetaTraining((task,), _relative(), {**_OWN, "steps": steps, **changes}, further)


def _technique(
    *more: str, rule: Rule | None = None, scaled: str = "", **changes: Any
) -> MetaTraining:
    """One of `TECHNIQUES`: the MLP at a modest budget, one thing changed."""
    config = {**_OWN, "steps": 30_000, **changes}
    if "horizons" in config:
        del config["horizon"]
    return MetaTraining(("mlp-mnist", *more), rule or _relative(), config, scaled=scaled)


TECHNIQUES: dict[str, MetaTraining] = {
    "plain": _technique(),
    # The step scale of the networks' bundled rules before relative units.
    "absolute units": _technique(rule=make_rule("joined", scaling="absolute")),
    "windows of 20": _technique(window=20, copies=5),
    "final loss": _technique(loss="final"),
    "log loss": _technique(loss="log"),
    "curriculum": _technique(horizons=(100, 300, 1000), patience=None),
    "imitation": _technique(imitation=0.3, teacher_lr=0.03),
    "scaled coordinates": _technique(scaled="coordinate"),
    "scaled tensors": _technique(scaled="tensor"),
    "with the ConvNet": _technique("convnet-mnist"),
    "with two more MLPs": _technique("mlp64-relu-fashion_mnist", "mlp32x32-tanh-mnist"),
}
"""What the field offers for meta-training, one at a time, at equal budgets of inner steps; what
validations take (of the curriculum more, over longer horizons) comes on top."""

TECHNIQUE_SEEDS = (0, 1)
"""Of each technique's meta-trainings."""


def technique(name: str, seed: int) -> str:
    """The name in `RULES` of a technique's meta-training."""
    return f"technique-{name.lower().replace(' ', '-')}-{seed}"


MANY = (
    "mlp20-relu-mnist", "mlp64-relu-fashion_mnist", "mlp32x32-relu-mnist", "mlp-mnist",
    "mlp16x16x16-tanh-fashion_mnist", "mlp64-gelu-bn-mnist", "cnn8-mnist", "cnn8x16-fashion_mnist",
    "cnn8x16-bn-mnist", "resnet-small-gn-mnist", "vit-small-mnist", "convnet5x5-fashion_mnist",
)  # fmt: skip
"""The dozen small architectures of the general rule."""

_GENERAL = MetaTraining(MANY, _relative(), {**_OWN, "steps": 240_000, "validation_copies": 4})

RULES: dict[str, MetaTraining] = {
    "published-quadratic": as_published("quadratic", _lstm("raw", 1.0), 0.003, 100),
    "published-mlp-mnist": as_published("mlp-mnist", _lstm(), 0.01, 20),
    "published-convnet-mnist": as_published("convnet-mnist", _lstm(), 0.01, 5),
    "published-convnet-fashion_mnist": as_published("convnet-fashion_mnist", _lstm(), 0.01, 5),
    "published-quadratic-log_sign": as_published("quadratic", _lstm("log_sign", 1.0), 0.003, 100),
    "published-mlp-mnist-raw": as_published("mlp-mnist", _lstm("raw"), 0.01, 20),
    "published-convnet-mnist-raw": as_published("convnet-mnist", _lstm("raw"), 0.01, 5),
    "quadratic": MetaTraining(
        ("quadratic",),
        _quadratic(),
        {
            # Short windows: on quadratics the first-order estimate misleads over long ones.
            "steps": 10_000_000, "window": 5, "copies": 64, "validation_copies": 256,
            "samples": None, "lr": 0.01, "validations": 40,
        },
        # Then on longer episodes: late, tiny gradients otherwise make rare leaps.
        ({"steps": 3_000_000, "horizon": 300, "lr": 0.003, "validations": 10},),
    ),
    "mlp-mnist": _own("mlp-mnist", 300_000, samples=400_000),
    "mlp-fashion_mnist": _own("mlp-fashion_mnist", 300_000, samples=400_000),
    "convnet-mnist": _own("convnet-mnist", 100_000, samples=None, validations=20),
    # It goes on from mlp-mnist, over longer and longer horizons.
    "mlp-mnist-1000": _own(
        "mlp-mnist", 300_000, samples=400_000,
        further=(
            {"steps": 150_000, "horizon": 300, "samples": 120_000},
            {"steps": 450_000, "horizon": 1000, "lr": 0.005},
        ),
    ),
    "general": _GENERAL,
    "general-warmed": replace(_GENERAL, changed={"scaling": "warmed"}),
    "bert-e2e": _own("bert-e2e", 30_000, validation_copies=4),
    "bert-lora-e2e": _own("bert-lora-e2e", 15_000, validation_copies=4),
    "convnet-fashion_mnist": _own("convnet-fashion_mnist", 100_000, samples=None, validations=20),
    **{
        technique(name, seed): replace(plan, config={**plan.config, "seed": seed})
        for name, plan in TECHNIQUES.items()
        for seed in TECHNIQUE_SEEDS
    },
}  # fmt: skip


def learned(study: Study, name: str) -> TrainedRule:
    """A rule of `RULES`, meta-trained once and kept in the study's cache.

    Raises:
        ValueError: unknown name.
    """
    tasks, plan = meta_tasks(study, name), RULES[name]
    trained: TrainedRule | None = None
    for number, config in enumerate(plan.stages):
        label = f"{name}-{number + 1}" if number else name
        scaled = study.scaled(config, len(tasks))
        trained = study.meta_train(label, tasks, trained or plan.rule, scaled)
    assert trained is not None
    manifest = {**trained.manifest, "name": name}
    if plan.changed:
        manifest["changed_afterwards"] = plan.changed
    return replace(trained, rule=replace(trained.rule, **plan.changed), manifest=manifest)


def meta_tasks(study: Study, name: str) -> list[Task]:
    """The tasks that a rule of `RULES` is meta-trained on.

    Raises:
        ValueError: unknown name.
    """
    if name not in RULES:
        raise unknown("rule of the recipes", name, RULES)
    return [_task(study, RULES[name], task) for task in RULES[name].tasks]


def _task(study: Study, plan: MetaTraining, name: str) -> Task:
    if plan.protocol == published.PROTOCOL:
        return published.task(study, name, affine=False)
    task = study.task(name)
    return RandomlyScaled(task, per=plan.scaled) if plan.scaled else task
