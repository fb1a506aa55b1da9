"""Paper A as published: its data, its networks, its rates, its LSTM, its mistakes.

Everything here exists so that the published figures can be recognised; the corrected protocol is
`stepsmith.evaluate`'s own. What cannot be repeated: gradients that shared memory with buffers which
later steps overwrote, and the seeds, which were never set.

Source: Daduryan, "Transferring Learned Optimizers", and its public code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from stepsmith.evaluate import Key
from stepsmith.evaluate.cost import MakeOptimizer, seconds_in_turn
from stepsmith.evaluate.run import add_times, learned_key
from stepsmith.hub import TrainedRule
from stepsmith.optim import LearnedOptimizer
from stepsmith.tasks import ModuleTask, Task, load_images
from stepsmith.tasks.networks.convnet import ConvNet
from stepsmith.tasks.networks.mlp import MLP
from stepsmith.tasks.published import PublishedHalves

if TYPE_CHECKING:
    from stepsmith.recipes.study import Study

PROTOCOL = "as-published"

_NETWORKS: dict[str, Callable[[torch.Size, int, bool], torch.nn.Module]] = {
    "mlp": lambda shape, classes, affine: MLP(shape.numel(), classes=classes),
    "convnet": lambda shape, classes, affine: ConvNet(shape, classes, affine=affine),
    # The kernel-size variant had sigmoids too.
    "convnet5x5": lambda shape, classes, affine: ConvNet(shape, classes, 5, "sigmoid", affine),
    "convnet-sigmoid": lambda shape, classes, affine: ConvNet(shape, classes, 3, "sigmoid", affine),
}
"""(image shape, classes, whether batch-norm's scale and shift are trained) -> network."""

RATES: dict[str, dict[str, float]] = {
    "quadratic": {"adam": 0.1, "rmsprop": 0.03, "sgd": 0.01, "nag": 0.01},
    "mlp-mnist": {"adam": 0.03, "rmsprop": 0.01, "sgd": 1.0, "nag": 1.0},
    "convnet-mnist": {"adam": 0.01, "nag": 0.03},
    "convnet5x5-mnist": {"adam": 0.01},
    "convnet-sigmoid-mnist": {"adam": 0.01},
    "convnet-fashion_mnist": {"adam": 0.02},
}
"""The rates the paper used."""

_MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "nag": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}


class HalvesTask(ModuleTask):
    """A network of the paper on the halves it used."""


def task(study: Study, name: str, *, affine: bool = True) -> Task:
    """A task of the paper on the halves it used.

    Args:
        study: says where data come from.
        name: a key of `RATES`.
        affine: whether batch-norm's scale and shift are trained: by Adam they were, by the LSTM
            they were left untouched.
    """
    if name == "quadratic":
        return study.task(name)
    network, _, data = name.rpartition("-")
    images = load_images(data, **study.where)
    shape = images.train_images.shape[1:]
    return HalvesTask(
        lambda: _NETWORKS[network](shape, images.num_classes, affine),
        F.cross_entropy,
        PublishedHalves.of(images),
        name=name,
        device=study.device,
    )


def compare(
    study: Study,
    name: str,
    rules: Mapping[str, TrainedRule],
    *,
    others: Mapping[str, tuple[TrainedRule, str]] | None = None,
    timing: bool = False,
) -> None:
    """Rules beside the paper's baselines at the paper's rates.

    Args:
        study: gets the records.
        name: the task, a key of `RATES`.
        rules: for the figure's learned curves; batch-norm's scale and shift stay untouched.
        others: name -> (rule, the task it really trained), for a curve that shows another task.
        timing: time the steps of all of them too, in turn.
    """
    optimizers = {opt: partial(_MAKE[opt], lr=rate) for opt, rate in RATES[name].items()}
    by_hand = task(study, name)
    study.compare(by_hand, {}, (), protocol=PROTOCOL, optimizers=optimizers)
    by_rules = [(rules, task(study, name, affine=False))]
    for label, (trained, trained_on) in (others or {}).items():
        shown = task(study, trained_on)
        shown.name = name
        by_rules.append(({label: trained}, shown))
    for named, made in by_rules:
        if named:
            study.compare(made, named, (), protocol=PROTOCOL)
    if not timing:
        return
    study.say(f"{name}: timing steps")
    key = Key(
        recipe=study.recipe, scale=study.scale.name, protocol=PROTOCOL, task=name,
        network=by_hand.network_name, data=by_hand.data_name, horizon=study.scale.first.steps,
    )  # fmt: skip
    placed: dict[str, tuple[Task, MakeOptimizer]] = {
        opt: (by_hand, make) for opt, make in optimizers.items()
    }
    keys = {opt: replace(key, optimizer=opt, kind="baseline") for opt in optimizers}
    for named, made in by_rules:
        for label, trained in named.items():
            placed[label] = (made, partial(LearnedOptimizer, rule=trained))
            keys[label] = learned_key(key, label, trained)
    times = seconds_in_turn(placed, rounds=study.scale.timing_rounds)
    add_times(study.records, times, keys)
