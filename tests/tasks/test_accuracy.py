"""Accuracies: along the axis that the loss takes for the classes, of the targets it looks at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepsmith import Task
from stepsmith.evaluate import evaluate
from stepsmith.tasks.accuracy import Scores
from stepsmith.tasks.module import ModuleTask
from stepsmith.tasks.started import StartedTask
from stepsmith.unroll import Copies

K = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Add(nn.Module):
    """Inputs that are scores already, moved by one number."""

    def __init__(self):
        super().__init__()
        self.plus = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.plus


def task_of(
    loss: Callable[[Any, Tensor], Tensor], output: Tensor, targets: Tensor, **options: Any
) -> Task:
    data = ((output, targets), (output, targets))
    return Task.from_module(Add, loss, data, batch_size=2, stacking="loop", **options)


def accuracy(task: Task) -> float | None:
    found = Copies(task, [0]).test().get("accuracy")
    return None if found is None else float(found)


def last_axis(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def moved_last(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.movedim(-1, 1), targets)


def smoothed(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets, label_smoothing=0.2)


def log_likelihood(output: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(output.log_softmax(1), targets)


def one_hot(output: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(output, F.one_hot(targets.long(), K).movedim(-1, 1).to(output))


def focal(output: Tensor, targets: Tensor) -> Tensor:
    log = output.log_softmax(1).gather(1, targets.unsqueeze(1))
    return -((1 - log.exp()).square() * log).mean()


SECOND = [
    F.cross_entropy, nn.CrossEntropyLoss(), log_likelihood, nn.NLLLoss(), smoothed, one_hot, focal,
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0])),
]  # fmt: skip


@pytest.mark.parametrize("loss", [*SECOND, nn.MultiMarginLoss()])
def test_of_scores_of_two_axes(loss):
    output, targets = torch.randn(9, K, generator=seeded()), torch.arange(9) % K
    want = (output.argmax(1) == targets).float().mean()
    assert accuracy(task_of(loss, output, targets)) == pytest.approx(float(want))


@pytest.mark.parametrize("loss", SECOND)
@pytest.mark.parametrize("rest", [(5,), (K,), (3, K), (K, K), (2, 3, K)])
def test_classes_on_the_second_axis(loss, rest):
    output = torch.randn(6, K, *rest, generator=seeded())
    targets = torch.randint(K, (6, *rest), generator=seeded(1))
    want = (output.argmax(1) == targets).float().mean()
    assert accuracy(task_of(loss, output, targets)) == pytest.approx(float(want))


@pytest.mark.parametrize("loss", [last_axis, moved_last])
@pytest.mark.parametrize("rest", [(5,), (K,), (3, K), (K, K)])
def test_classes_on_the_last_axis(loss, rest):
    output = torch.randn(6, *rest, K, generator=seeded())
    targets = torch.randint(K, (6, *rest), generator=seeded(1))
    want = (output.argmax(-1) == targets).float().mean()
    assert accuracy(task_of(loss, output, targets)) == pytest.approx(float(want))


def next_token(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :, :-1], targets[:, 1:])


def last_token(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :, -1], targets[:, -1])


def means(output: Tensor, targets: Tensor) -> Tensor:
    """Of several heads, for labels (B, K) that may all hold at once."""
    return F.binary_cross_entropy_with_logits(output.mean(2), targets.to(output))


@pytest.mark.parametrize(
    ("loss", "shape", "targets"),
    [
        (next_token, (6, K, 5), (6, 5)),
        (last_token, (6, K, 5), (6, 5)),
        (means, (6, K, 2), (6, K)),
        (lambda o, t: (o.squeeze(1) - t).square().mean(), (6, 1), (6,)),
        (lambda o, t: F.binary_cross_entropy_with_logits(o, t.to(o)), (6,), (6,)),
        (lambda o, t: F.binary_cross_entropy_with_logits(o[:, 0], t.to(o)), (6, 1), (6,)),
        (lambda o, t: (o.mean(1) - t).square().mean(), (6, 3), (6,)),
        (lambda o, t: F.cross_entropy(o, t.to(o)), (6, K), (6, K)),
    ],
)
def test_what_is_no_score_of_its_target_has_no_accuracy(loss, shape, targets):
    given = torch.randint(2, targets, generator=seeded(1))
    task = task_of(loss, torch.randn(shape, generator=seeded()), given)
    assert accuracy(task) is None


def test_probabilities_as_targets_have_no_accuracy():
    output = torch.randn(6, K, generator=seeded())
    assert accuracy(task_of(F.cross_entropy, output, output.softmax(1))) is None


LEAVING_OUT = [
    (nn.CrossEntropyLoss(ignore_index=0), 0),
    (nn.CrossEntropyLoss(ignore_index=255), 255),
    (nn.CrossEntropyLoss(), -100),
    (nn.NLLLoss(ignore_index=3), 3),
    (functools.partial(F.cross_entropy, ignore_index=1), 1),
    (lambda o, t: F.cross_entropy(o, t, ignore_index=-1), -1),
    (lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 1, 0, 1])), 2),
    (lambda o, t: (F.cross_entropy(o, t, reduction="none") * (t != 2)).mean(), 2),
]


@pytest.mark.parametrize("place", range(len(LEAVING_OUT)))
@pytest.mark.parametrize("rest", [(), (K,), (2, 3)])
def test_targets_that_the_loss_leaves_out_do_not_count(place, rest):
    loss, out = LEAVING_OUT[place]
    output = torch.randn(40, K, *rest, generator=seeded())
    targets = torch.randint(K, (40, *rest), generator=seeded(1))
    targets[::3] = out
    counted = targets != out
    want = float((output.argmax(1) == targets)[counted].float().mean())
    assert accuracy(task_of(loss, output, targets)) == pytest.approx(want)


@pytest.mark.parametrize("wrap", [lambda task: task, lambda task: StartedTask(task, *start(task))])
def test_a_batch_of_a_test_weighs_what_counts_of_it(wrap):
    """Two test batches: all of 500 targets right, then one of four that count."""
    output = F.one_hot(torch.zeros(1000, dtype=torch.long), K).float()
    targets = torch.zeros(1000, dtype=torch.long)
    targets[500:] = -100
    targets[500:504] = torch.tensor([0, 1, 2, 3])
    assert accuracy(wrap(task_of(F.cross_entropy, output, targets))) == pytest.approx(501 / 504)


def start(task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return task.init(seeded())


def test_a_batch_of_which_nothing_counts_weighs_nothing():
    output = F.one_hot(torch.zeros(1000, dtype=torch.long), K).float()
    targets = torch.zeros(1000, dtype=torch.long)
    targets[500:] = -100
    assert accuracy(task_of(F.cross_entropy, output, targets)) == 1


def test_where_nothing_counts_there_is_no_accuracy():
    output = torch.randn(9, K, generator=seeded())
    task = task_of(
        lambda o, t: (F.cross_entropy(o, t, reduction="none") * (t >= 0)).mean(),
        output, torch.full((9,), -100),
    )  # fmt: skip
    found = Copies(task, [0]).test()
    assert found.keys() == {"loss"}
    assert found["loss"].isfinite().all()


def test_accuracies_of_low_precision_are_not_rounded_to_it():
    output = F.one_hot(torch.zeros(499, dtype=torch.long), K).to(torch.bfloat16)
    targets = torch.zeros(499, dtype=torch.long)
    targets[0] = 1
    task = task_of(F.cross_entropy, output, targets, dtype=torch.bfloat16)
    assert accuracy(task) == pytest.approx(498 / 499, abs=1e-6)


def test_the_targets_of_many_classes_are_tried_in_parts(monkeypatch):
    monkeypatch.setattr("stepsmith.tasks.accuracy.LARGEST", 200)
    output = torch.randn(9, 23, generator=seeded())
    targets = torch.arange(9) % 3
    task = task_of(nn.CrossEntropyLoss(ignore_index=2), output, targets)
    counted = targets != 2
    want = float((output.argmax(1) == targets)[counted].float().mean())
    assert accuracy(task) == pytest.approx(want)


def test_a_smaller_type_of_targets_holds_fewer_classes():
    output = torch.randn(9, 300, generator=seeded())
    targets = torch.arange(9, dtype=torch.uint8)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets.long())

    want = float((output.argmax(1) == targets).float().mean())
    assert accuracy(task_of(loss, output, targets)) == pytest.approx(want)


def test_trying_the_loss_moves_no_generator():
    def noisy(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output + 0 * torch.rand(()), targets)

    task = task_of(noisy, torch.randn(9, K), torch.arange(9) % K)
    params, buffers = task.init(seeded())
    batch = next(task.test_batches())
    torch.manual_seed(5)
    first = task.loss(params, buffers, batch, None, False)[2]
    after = torch.rand(())
    torch.manual_seed(5)
    second = task.loss(params, buffers, batch, None, False)[2]
    assert torch.equal(first["accuracy"], second["accuracy"])
    assert torch.equal(after, torch.rand(()))


def test_a_segmentation_is_evaluated():
    """(B, K, H, W) with K = W, where the last axis gives another number."""
    output = torch.randn(40, K, 3, K, generator=seeded())
    targets = output.argmax(1)
    targets[:10] = (targets[:10] + 1) % K
    still = {"still": functools.partial(torch.optim.SGD, lr=0.0)}
    records = evaluate(
        task_of(F.cross_entropy, output, targets), (), (), optimizers=still,
        steps=1, seeds=2, timing_rounds=0,
    ).records  # fmt: skip
    (block,) = records.select("test_accuracy")
    assert block.values.tolist() == [[pytest.approx(0.75)]] * 2


def test_outputs_of_another_shape_are_tried_anew():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.plus = nn.Parameter(torch.zeros(()))
            self.last = True

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs if self.last else inputs.movedim(-1, 1)) + self.plus

    def either(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output if output.shape[1] == K else output.movedim(-1, 1), targets)

    inputs = torch.randn(6, 5, K, generator=seeded())
    targets = torch.randint(K, (6, 5), generator=seeded(1))
    task = ModuleTask(Either, either, ((inputs, targets), (inputs, targets)), stacking="loop")
    params, buffers = task.init(seeded())
    want = (inputs.argmax(-1) == targets).float().mean()
    for last in (True, False):
        task._module.last = last
        _, _, metrics = task.loss(params, buffers, (inputs, targets), None, False)
        torch.testing.assert_close(metrics["accuracy"], want)


def test_scores_read_what_they_say():
    scores = Scores(1, 3, torch.tensor([True, False, True]))
    targets = torch.tensor([0, 1, 2, 7, -100])
    assert scores.counted(targets).tolist() == [True, False, True, False, False]
    output = torch.eye(3)[[0, 1, 0, 0, 0]]
    assert float(scores.accuracy(output, targets)) == 0.5
