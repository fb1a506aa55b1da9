"""A task's steps are those of its module, trained as torch trains it."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from stepsmith import Task, meta_train, subspace
from stepsmith.tasks.module import ModuleTask
from stepsmith.tasks.rescaled import RandomlyScaled
from stepsmith.tasks.started import StartedTask
from stepsmith.tasks.subspace import SubspaceTask
from stepsmith.unroll import Copies

STEPS = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(shape: tuple[int, ...] = (4,)) -> tuple[Tensor, Tensor]:
    return torch.randn(20, *shape, generator=seeded()), torch.randn(20, 3, generator=seeded(1))


def task_of(
    make: Callable[[], nn.Module], shape: tuple[int, ...] = (4,), loss=nn.functional.mse_loss,
    **options,
) -> ModuleTask:  # fmt: skip
    data = pair(shape)
    options = {"batch_size": 5, **options}
    task = Task.from_module(make, loss, (data, data), **options)
    assert isinstance(task, ModuleTask)
    return task


def by_torch(task: ModuleTask, seed: int, lr: float, loss=nn.functional.mse_loss):
    """Losses and the module after steps of gradient descent, in a loop as torch has it."""
    generator = seeded(seed)
    module = task.module(*task.init(generator)).train()
    losses = []
    for _ in range(STEPS):
        inputs, targets = task.batch(generator, "train")
        for param in module.parameters():
            param.grad = None
        value = loss(module(inputs), targets)
        value.backward()
        with torch.no_grad():
            for param in module.parameters():
                if param.grad is not None:
                    param -= lr * param.grad
        losses.append(value.detach())
    return torch.stack(losses), module


def require_same_training(task: ModuleTask, copies: int = 2, lr: float = 0.1) -> None:
    group = Copies(task, range(copies))
    losses = []
    for _ in range(STEPS):
        losses_C, grad_CP = group.gradients(group.batches("train"))
        losses.append(losses_C)
        group.theta = group.theta - lr * grad_CP
    for place in range(copies):
        want, module = by_torch(task, place, lr)
        got = torch.stack(losses)[:, place]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        params = group.layout.views(group.theta[place])
        own = dict(module.named_parameters())
        for key, value in params.items():
            torch.testing.assert_close(value, own[key].detach(), rtol=1e-3, atol=1e-5)
        held = {**own, **dict(module.named_buffers())}
        for key, value in group.buffers.items():
            torch.testing.assert_close(value[place], held[key].detach(), rtol=1e-3, atol=1e-5)
            assert not value.requires_grad
        inputs, targets = next(task.test_batches())
        with torch.no_grad():
            tested = nn.functional.mse_loss(module.eval()(inputs), targets)
        torch.testing.assert_close(group.test()["loss"][place], tested, rtol=1e-4, atol=1e-5)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False, dropout: float = 0.0, conv: bool = False):
        super().__init__()
        first = nn.Conv1d(4, 8, 1) if conv else nn.Linear(4, 8)
        self.encoder = nn.Sequential(first, nn.Tanh(), nn.Dropout(dropout))
        self.middle = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.reentrant, self.conv = reentrant, conv

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.unsqueeze(-1) if self.conv else inputs
        if not self.training:
            return self.head(self.middle(self.encoder(inputs)))
        inputs = inputs.clone().requires_grad_()
        for part in (self.encoder, self.middle):
            inputs = checkpoint(part, inputs, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return self.head(inputs)


class Nested(nn.Module):
    """A checkpoint in a checkpoint, the weights tied."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def inner(self, inputs: Tensor) -> Tensor:
        return torch.sigmoid(checkpoint(self.two, inputs, use_reentrant=False))  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.one(inputs))
        return self.head(checkpoint(self.inner, hidden, use_reentrant=False))


class Rebinds(nn.Module):
    """Running statistics set anew, not written in place; the second in a module within."""

    def __init__(self, persistent: bool = True, detach: bool = True):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("running", torch.zeros(4), persistent=persistent)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=persistent)
        self.inner = Centre(detach)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.running = 0.9 * self.running + 0.1 * inputs.mean(0)
            self.calls = self.calls + 1
            inputs = inputs + 0.1 * self.calls
        return self.inner(self.linear(inputs - self.running))


class Centre(nn.Module):
    def __init__(self, detach: bool):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.detach = detach

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.mean(0)
        new = 0.9 * self.mean + 0.1 * mean
        if self.training:
            self.mean = new.detach() if self.detach else new
        return inputs - (mean if self.training else self.mean.detach())


class Target(nn.Module):
    """A frozen copy of the weights that follows them slowly."""

    def __init__(self):
        super().__init__()
        self.online, self.slow = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.online(inputs) + self.slow(inputs).detach()
        if self.training:
            with torch.no_grad():
                self.slow.weight.lerp_(self.online.weight, 0.01)
                self.slow.bias.data = torch.lerp(self.slow.bias, self.online.bias, 0.01)
        return output


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.rnn(inputs.unsqueeze(1))[0][:, -1])


class Hooked(nn.Module):
    """Parameters held in a list besides, one of them with a hook on its gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.held = list(self.linear.parameters())
        self.held[0].register_hook(lambda grad: grad.clamp(-0.01, 0.01))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.held[0].T + self.held[1]


def old(apply: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(apply(nn.Linear(4, 6)), nn.Tanh(), apply(nn.Linear(6, 3)))

    return make


def normed(**options) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Linear(6, 3))


def jitted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(4, 3),
    "checkpoint": Checkpointed,
    "reentrant checkpoint": lambda: Checkpointed(reentrant=True),
    "checkpointed convolution": lambda: Checkpointed(conv=True),
    "reentrant checkpointed convolution": lambda: Checkpointed(True, conv=True),
    "nested checkpoints": Nested,
    "rebound buffers": Rebinds,
    "rebound buffers that are not saved": lambda: Rebinds(persistent=False),
    "frozen copy": Target,
    "recurrent": Recurrent,
    "hooked": Hooked,
    "old weight norm": old(nn.utils.weight_norm),
    "old spectral norm": old(nn.utils.spectral_norm),
    "pruned": old(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
    "weight norm": old(parametrizations.weight_norm),
    "spectral norm": old(parametrizations.spectral_norm),
    "orthogonal": old(parametrizations.orthogonal),
    "batch norm": normed(),
    "cumulative batch norm": normed(momentum=None),
    "batch norm of batches": normed(track_running_stats=False),
    "data parallel": lambda: nn.DataParallel(nn.Linear(4, 3)),
    "jitted": jitted,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(3)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
@pytest.mark.parametrize("name", MODULES)
def test_training_is_torchs(name):
    require_same_training(task_of(MODULES[name]))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("stacking", ["loop", "threads"])
def test_training_is_torchs_however_copies_run(name, stacking):
    require_same_training(task_of(MODULES[name], stacking=stacking), copies=3)


@pytest.mark.parametrize("name", ["plain", "rebound buffers", "batch norm", "old weight norm"])
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
def test_what_can_be_stacked_is(name):
    task = task_of(MODULES[name])
    assert task.stacking == "vmap"
    require_same_training(task, copies=3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_dropout_repeats_its_draws(reentrant):
    """The same seed with and without a checkpoint."""
    plain = task_of(lambda: Checkpointed(dropout=0.5))
    plain._plain = False
    task = task_of(lambda: Checkpointed(reentrant, dropout=0.5))
    params, buffers = task.init(seeded())
    batch = task.batch(seeded(), "train")
    grads = []
    for one, module in ((task, None), (plain, Unchecked())):
        if module is not None:
            one._local.module = module
        given = {key: value.clone().requires_grad_() for key, value in params.items()}
        loss, _, _ = one.loss(given, buffers, batch, seeded(7), True)
        grads.append(torch.autograd.grad(loss, list(given.values())))
    torch.testing.assert_close(*grads)


class Unchecked(Checkpointed):
    def __init__(self):
        super().__init__(dropout=0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.middle(self.encoder(inputs)))


def test_losses_taken_before_their_backward_passes_keep_their_own_parameters():
    task = task_of(Checkpointed)
    batch = task.batch(seeded(), "train")
    starts = [task.init(seeded(seed))[0] for seed in (1, 2)]

    def gradients(together: bool) -> list[tuple[Tensor, ...]]:
        given = [{k: v.clone().requires_grad_() for k, v in start.items()} for start in starts]
        leaves = [list(params.values()) for params in given]
        if together:
            losses = [task.loss(params, {}, batch, None, True)[0] for params in given]
            return [torch.autograd.grad(*one) for one in zip(losses, leaves, strict=True)]
        return [
            torch.autograd.grad(task.loss(params, {}, batch, None, True)[0], own)
            for params, own in zip(given, leaves, strict=True)
        ]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_factor_on_the_loss_reaches_the_gradient():
    task = task_of(Checkpointed)
    params, buffers = task.init(seeded())
    batch = task.batch(seeded(), "train")
    given = {key: value.requires_grad_() for key, value in params.items()}
    loss, _, _ = task.loss(given, buffers, batch, None, True)
    once = torch.autograd.grad(loss, list(given.values()), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, list(given.values()))
    torch.testing.assert_close([3 * grad for grad in once], list(thrice))


def test_a_second_derivative_of_what_is_checkpointed_is_refused():
    task = task_of(Checkpointed)
    params, buffers = task.init(seeded())
    given = {key: value.requires_grad_() for key, value in params.items()}
    loss, _, _ = task.loss(given, buffers, task.batch(seeded(), "train"), None, True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, given["head.bias"], create_graph=True)


def wrapped(task: ModuleTask) -> list[Task]:
    space = subspace.random(task.module(*task.init(seeded())), 6, generator=seeded())
    return [StartedTask(task, *task.init(seeded(3))), RandomlyScaled(task, 1.0),
            SubspaceTask(task, space)]  # fmt: skip


@pytest.mark.parametrize("place", range(3))
def test_wrapped_tasks_have_the_slopes_of_their_losses(place):
    """By central differences."""
    task = wrapped(task_of(Checkpointed, dtype=torch.float64))[place]
    group = Copies(task, [0])
    batch = group.batches("train")
    theta = group.theta.clone()
    _, grad_CP = group.gradients(batch)
    away = torch.randn(theta.shape, generator=seeded(4)).to(theta) * 1e-5
    ends = []
    for sign in (1, -1):
        group.theta = theta + sign * away
        ends.append(group.gradients(batch)[0])
    torch.testing.assert_close((ends[0] - ends[1]) / 2, (grad_CP * away).sum(1), rtol=1e-4, atol=0)


def test_transformers_own_switch():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=6, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    class Scores(nn.Module):
        def __init__(self, switched: bool):
            super().__init__()
            self.bert = transformers.BertForMaskedLM(config)
            if switched:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # newer ones call it otherwise
                    self.bert.gradient_checkpointing_enable()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.bert(tokens).logits

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.transpose(1, 2), targets)

    tokens = torch.randint(11, (20, 6), generator=seeded())
    groups = [
        Copies(Task.from_module(make, loss, (tokens, tokens), batch_size=4), [0, 1])
        for make in (lambda: Scores(True), lambda: Scores(False))
    ]
    one, other = (group.gradients(group.batches("train")) for group in groups)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Decayed(ModuleTask):
    """A task whose loss is more than its module's."""

    def loss(self, params, buffers, batch, generator, train):
        value, moved, metrics = super().loss(params, buffers, batch, generator, train)
        return 2 * value + sum(p.square().sum() for p in params.values()), moved, metrics


@pytest.mark.parametrize("make", [MODULES["plain"], Checkpointed, MODULES["rebound buffers"]])
def test_a_subclass_may_add_to_the_loss(make):
    tasks = [
        kind(make, nn.functional.mse_loss, pair(), batch_size=5) for kind in (ModuleTask, Decayed)
    ]
    (losses, grads), (more, steeper) = (
        (group := Copies(task, [0, 1])).gradients(group.batches("train")) for task in tasks
    )
    theta = Copies(tasks[0], [0, 1]).theta
    torch.testing.assert_close(more, 2 * losses + theta.square().sum(1))
    torch.testing.assert_close(steeper, 2 * grads + 2 * theta)


@pytest.mark.parametrize("reentrant", [False, True])
def test_rules_are_meta_trained_on_what_is_checkpointed(reentrant):
    rule = meta_train(
        task_of(lambda: Checkpointed(reentrant)), "l2o_dm", steps=40, horizon=5, copies=2
    )
    assert all(value.isfinite().all() for value in rule.weights.values())


def test_a_buffer_with_a_graph_keeps_none():
    """torch's own loop would fail at the second step."""
    group = Copies(task_of(lambda: Rebinds(detach=False)), [0, 1])
    for _ in range(3):
        group.gradients(group.batches("train"))
    assert not any(value.requires_grad for value in group.buffers.values())


class Untested(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            raise NotImplementedError("training only")
        return super().forward(inputs)


def test_what_cannot_be_tested_can_be_trained():
    group = Copies(task_of(lambda: Untested(4, 3)), [0, 1])
    losses, _ = group.gradients(group.batches("train"))
    assert losses.isfinite().all()
    with pytest.raises(NotImplementedError, match="training only"):
        group.test()


class Counting(nn.Module):
    """Counts calls in a buffer, tests too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(inputs)


def test_a_test_leaves_the_buffers_as_they_are():
    group = Copies(task_of(Counting), [0, 1])
    group.gradients(group.batches("train"))
    group.test()
    assert group.buffers["calls"].tolist() == [1, 1]


class Remembers(nn.Module):
    """Keeps something outside its parameters and buffers."""

    def __init__(self, how: str):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.how, self.calls, self.mean = how, 0, torch.zeros(4)
        self.generator = seeded(5)
        self.plus = float(np.random.rand())  # noqa: NPY002
        self.register_buffer("last", None)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.how == "a count":
            self.calls += 1
            return self.linear(inputs) / self.calls
        if self.how == "a tensor":
            self.mean = 0.5 * self.mean + 0.5 * inputs.mean(0)
            return self.linear(inputs - self.mean)
        if self.how == "a tensor for tests":
            if self.training:
                self.mean = 0.5 * self.mean + 0.5 * inputs.mean(0)
            return self.linear(inputs if self.training else inputs - self.mean)
        if self.how == "a late buffer":
            self.last = inputs.mean(0) if self.last is None else self.last
            return self.linear(inputs - self.last)
        if self.how == "a generator":
            return self.linear(inputs + torch.randn(4, generator=self.generator))
        return self.linear(inputs) + self.plus


@pytest.mark.parametrize(
    "how", ["a count", "a tensor", "a tensor for tests", "a late buffer", "a generator", "numpy"]
)
def test_state_that_runs_would_share_is_refused(how):
    with pytest.raises(ValueError, match="keep what forward remembers in buffers"):
        task_of(lambda: Remembers(how))


class Clipped(nn.Module):
    def __init__(self, in_place: bool, in_tests: bool = True):
        super().__init__()
        self.linear, self.in_place, self.in_tests = nn.Linear(4, 3), in_place, in_tests

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.linear.weight
        if not self.training and not self.in_tests:
            return self.linear(inputs)
        if self.in_place:
            weight.data.clamp_(-0.01, 0.01)
        else:
            weight.data = weight.data.clamp(-0.01, 0.01)
        return self.linear(inputs)


class Resizes(nn.Module):
    def __init__(self, start: Tensor, end: Tensor | None):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("held", start)
        self.end = end

    def forward(self, inputs: Tensor) -> Tensor:
        self.held = self.end
        return self.linear(inputs)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).detach()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Clipped(True), "writes to its own parameter 'linear.weight'"),
        (lambda: Clipped(True, False), "writes to its own parameter 'linear.weight'"),
        (lambda: Clipped(False, False), "writes to its own parameter 'linear.weight'"),
        (lambda: Clipped(False), "writes to its own parameter 'linear.weight'"),
        (lambda: Resizes(torch.zeros(()), torch.zeros(2)), r"'held' from \(\), torch.float32 into"),
        (lambda: Resizes(torch.zeros(2), torch.zeros(2).double()), r"into \(2,\), torch.float64"),
        (lambda: Resizes(torch.zeros(2), None), "takes the buffer 'held' away"),
        (Detached, "depends on no parameter"),
    ],
)
def test_what_cannot_be_carried_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        task_of(make)


class Scaled(nn.Module):
    def __init__(self, trained: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=trained)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return (self.scale * output - targets).square().mean()


def test_a_loss_with_parameters_of_its_own_is_refused():
    with pytest.raises(ValueError, match="Scaled has parameters of its own, which would never be"):
        task_of(lambda: nn.Linear(4, 3), loss=Scaled(True))
    task_of(lambda: nn.Linear(4, 3), loss=Scaled(False))


@pytest.mark.parametrize(
    ("make", "stacking", "match"),
    [
        (lambda: nn.Linear(4, 3), "stack", "stacking"),
        (Checkpointed, "vmap", "stacking='vmap' fails here, or gives other gradients"),
        (MODULES["old spectral norm"], "vmap", "stacking='vmap' fails here"),
        (lambda: Checkpointed(dropout=0.5), "threads", "shares torch's one random generator"),
    ],
)
def test_a_stacking_that_the_module_does_not_stand_is_refused(make, stacking, match):
    with pytest.raises(ValueError, match=match):
        task_of(make, stacking=stacking)


class Drawing(nn.Module):
    """Skips a layer now and then, as Python or numpy draws."""

    def __init__(self, draw: Callable[[], float]):
        super().__init__()
        self.one, self.two, self.draw = nn.Linear(4, 4), nn.Linear(4, 3), draw

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.draw() < 0.5 else self.one(inputs)
        return self.two(hidden * self.draw())


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_modules_that_draw_from_global_generators_are_taken(draw):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    task_of(lambda: Drawing(draw))
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002


class Noisy(nn.Module):
    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output + torch.randn(output.shape) - targets).square().mean()


def test_a_loss_that_draws_is_of_the_seed():
    task = task_of(lambda: nn.Linear(4, 3), loss=Noisy())
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        group = Copies(task, [0])
        losses.append(group.gradients(group.batches("train"))[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("make_checkpointed", [False, True])
def test_a_model_that_is_handed_out_again_and_again_stays_as_it_is(make_checkpointed):
    model = Checkpointed() if make_checkpointed else nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3)
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    task = task_of(lambda: model, stacking="threads")
    require_same_training(task, copies=3)
    for value in task.module().parameters():
        value.data.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_parameters_around_one_tensor_are_not_moved_through_one_another():
    start = torch.randn(3, 4, generator=seeded())
    before = start.clone()

    def make() -> nn.Module:
        module = Checkpointed()
        module.held = nn.Parameter(start)
        return module

    group = Copies(task_of(make), [0, 1])
    group.theta += 1
    group.gradients(group.batches("train"))
    assert torch.equal(start, before)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")
@pytest.mark.parametrize("name", MODULES)
def test_the_module_holds_what_it_is_given(name):
    task = task_of(MODULES[name])
    params, buffers = (
        {key: value + 1 for key, value in part.items()} for part in task.init(seeded(3))
    )
    module = task.module(params, buffers)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for key, value in {**params, **buffers}.items():
        assert torch.equal(held[key].detach(), value)
        assert held[key].data_ptr() != value.data_ptr()
    own = task.init(seeded(0))[0]
    fresh = dict(task.module().named_parameters())
    assert all(torch.equal(fresh[key].detach(), value) for key, value in own.items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p, b: p.pop("1.bias"), "'1.bias' is missing among those given"),
        (lambda p, b: p.update(more=torch.zeros(2)), r"'more' is \(2,\) among those given"),
        (lambda p, b: p.update({"1.bias": torch.zeros(7)}), r"'1.bias' is \(7,\) .* \(6,\) in"),
        (lambda p, b: b.pop("1.running_var"), "'1.running_var' is missing"),
    ],
)
def test_a_module_takes_no_other_tensors(change, match):
    task = task_of(normed())
    params, buffers = task.init(seeded())
    change(params, buffers)
    with pytest.raises(ValueError, match=match):
        task.module(params, buffers)


def test_parameters_alone_leave_the_buffers_fresh():
    task = task_of(normed())
    params, buffers = task.init(seeded(3))
    held = dict(task.module(params).named_buffers())
    assert all(torch.equal(held[key], value) for key, value in buffers.items())
