"""Classic rules equal `torch.optim` to float64 rounding, over grids of hyper-parameters."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepsmith import LearnedOptimizer
from stepsmith.rules import classic

DECAY = (0.0, 0.1)


def grid(**choices):
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


CASES = [
    *[("SGD", classic.SGD, torch.optim.SGD, o) for o in grid(
        lr=(0.1, 1e-3), weight_decay=DECAY, momentum=(0.0, 0.9), dampening=(0.0, 0.3))],
    *[("SGD", classic.SGD, torch.optim.SGD, {**o, "nesterov": True}) for o in grid(
        lr=(0.1,), weight_decay=DECAY, momentum=(0.5, 0.9))],
    *[("Adam", classic.Adam, torch.optim.Adam, o) for o in grid(
        lr=(0.1, 1e-3), weight_decay=DECAY, betas=((0.9, 0.999), (0.5, 0.9)), eps=(1e-8, 1e-3))],
    *[("AdamW", classic.Adam, torch.optim.AdamW, o) for o in grid(
        lr=(0.1, 1e-3), weight_decay=DECAY, betas=((0.9, 0.999), (0.0, 0.9)))],
    *[("RMSprop", classic.RMSprop, torch.optim.RMSprop, o) for o in grid(
        lr=(0.1,), weight_decay=DECAY, alpha=(0.99, 0.5), momentum=(0.0, 0.9),
        centered=(False, True))],
    *[("Adagrad", classic.Adagrad, torch.optim.Adagrad, o) for o in grid(
        lr=(0.1,), weight_decay=DECAY, lr_decay=(0.0, 0.1), initial_accumulator_value=(0.0, 0.5))],
]  # fmt: skip


@pytest.mark.parametrize(("name", "ours", "theirs", "options"), CASES)
def test_equal_to_torch(name, ours, theirs, options):
    arguments = dict(options)
    if "betas" in arguments:
        arguments["beta1"], arguments["beta2"] = arguments.pop("betas")
    if name == "AdamW":
        arguments["decoupled"] = True
    start = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    params = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    optimizers = [LearnedOptimizer(params[0], ours(**arguments)), theirs(params[1], **options)]
    for _ in range(25):
        grads = [torch.randn_like(p) for p in start]
        for own, optimizer in zip(params, optimizers, strict=True):
            for param, grad in zip(own, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    for one, two in zip(*params, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: classic.SGD(lr=-1), "lr"),
        (lambda: classic.SGD(momentum=-1), "momentum"),
        (lambda: classic.SGD(nesterov=True), "nesterov needs"),
        (lambda: classic.SGD(momentum=float("nan")), "momentum"),
        (lambda: classic.SGD(dampening=-0.1), "dampening"),
        (lambda: classic.Adam(beta2=1.0), "beta2"),
        (lambda: classic.Adam(eps=-1e-8), "eps"),
        (lambda: classic.RMSprop(alpha=-0.1), "alpha"),
        (lambda: classic.RMSprop(momentum=float("inf")), "momentum"),
        (lambda: classic.Adagrad(lr_decay=-0.1), "lr_decay"),
        (lambda: classic.Adagrad(initial_accumulator_value=-1), "initial_accumulator_value"),
        (lambda: classic.Adam(weight_decay=float("nan")), "weight_decay"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
