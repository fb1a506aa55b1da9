"""A task in a subspace: its gradient is P g, copies share P, and the engine runs it."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from tests.conftest import make_tiny_task
from tests.subspace.runs import BytesRead, flat, seeded
from torch import nn

from stepsmith import SubspaceOptimizer, TrainedRule, make_rule, meta_train
from stepsmith.evaluate import evaluate
from stepsmith.evaluate.cache import identity
from stepsmith.meta.reference import reference_window
from stepsmith.subspace import Snapshots, Subspace, from_trajectory, per_layer, random
from stepsmith.tasks import ModuleTask, SubspaceTask, make_task
from stepsmith.tasks.noisy import with_noisy_batches
from stepsmith.testing import fresh_weights
from stepsmith.unroll import Copies, RuleStepper, TorchStepper, roll


def normed_task(**options) -> ModuleTask:
    """The tiny task with batch-norm."""
    generator = seeded(7)
    inputs = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (60,), generator=generator)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    return ModuleTask(
        make, nn.functional.cross_entropy, ((inputs, targets), (inputs[:9], targets[:9])),
        batch_size=8, dtype=torch.float64, **options,
    )  # fmt: skip


def basis(task: ModuleTask, seed: int = 0, d: int = 5, made=random) -> Subspace:
    return made(task.module(*task.init(seeded(seed))), d, generator=seeded(100 + seed))


@pytest.fixture(params=["dense", "per layer"])
def made(request):
    return random if request.param == "dense" else per_layer


def test_the_gradient_is_p_g(made):
    task = normed_task()
    subspace = basis(task, made=made)
    within = SubspaceTask(task, subspace)
    params, buffers = within.init(seeded())
    assert {key: tuple(value.shape) for key, value in params.items()} == {
        "coefficients": (subspace.dim,)
    }
    assert not params["coefficients"].any()
    c = torch.randn(subspace.dim, generator=seeded(3), dtype=torch.float64, requires_grad=True)
    batch = task.batch(seeded(1), "train")
    loss, moved, _ = within.loss({"coefficients": c}, buffers, batch, None, True)
    (got,) = torch.autograd.grad(loss, c)
    theta = {k: v.detach().requires_grad_() for k, v in subspace.parameters(c).items()}
    want_loss, want_moved, _ = task.loss(theta, buffers, batch, None, True)
    grads = dict(zip(theta, torch.autograd.grad(want_loss, list(theta.values())), strict=True))
    assert torch.equal(loss, want_loss)
    torch.testing.assert_close(got, subspace.project(grads), rtol=1e-12, atol=1e-14)
    assert all(torch.equal(moved[key], want_moved[key]) for key in want_moved)


def test_a_gradient_reads_p_twice():
    task = normed_task()
    subspace = basis(task)
    within = SubspaceTask(task, subspace)
    params, buffers = within.init(seeded())
    c = params["coefficients"].requires_grad_()
    with BytesRead(subspace.blocks) as read:
        loss, _, _ = within.loss(params, buffers, task.batch(seeded(), "train"), None, True)
        torch.autograd.grad(loss, c)
    assert read.count == 2 * subspace.blocks[0].numel() * 8


@pytest.mark.parametrize("stacking", ["vmap", "loop", "threads"])
@pytest.mark.parametrize("bases", [1, 3])
def test_stacked_copies_are_the_copies_alone(stacking, bases, made):
    task = normed_task(stacking=stacking)
    within = SubspaceTask(task, [basis(task, seed, made=made) for seed in range(bases)])
    assert within.stacking == stacking
    seeds = range(5)

    def stepper(group: Copies) -> TorchStepper:
        return TorchStepper(partial(torch.optim.SGD, lr=0.5), group.theta, group.layout)

    together = Copies(within, seeds)
    losses = roll(together, stepper(together), 4)
    for copy_, seed in enumerate(seeds):
        alone = Copies(within, [seed])
        one = roll(alone, stepper(alone), 4)
        torch.testing.assert_close(losses[:, copy_], one[:, 0])
        torch.testing.assert_close(together.theta[copy_], alone.theta[0])
    if bases > 1:
        assert len(together.buffers["subspace.basis"].unique()) > 1
    sizes = {key: value.numel() for key, value in together.buffers.items()}
    assert max(sizes.values()) <= 5 * 5, "no basis and no origin among the buffers"


def test_it_trains_as_the_optimizer_does():
    task = normed_task()
    subspace = basis(task)
    within = SubspaceTask(task, subspace)
    group = Copies(within, [0])
    make = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    model = task.module(*task.init(seeded(9)))
    optimizer = SubspaceOptimizer(model, subspace, make)
    stepper = TorchStepper(make, group.theta, group.layout)
    for seed in range(6):
        inputs, targets = task.batch(seeded(seed), "train")
        losses, grads = group.gradients((inputs[None], targets[None]))
        stepper(group.theta, grads)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(losses[0], loss.detach())
    torch.testing.assert_close(group.theta[0], optimizer.coefficients.detach())


def test_each_start_draws_a_basis_with_its_origin_and_buffers():
    task = normed_task()
    bases = [basis(task, seed) for seed in range(3)]
    for seed, subspace in enumerate(bases):
        subspace.buffers["1.running_mean"].fill_(seed + 0.5)
    within = SubspaceTask(task, bases)
    found = set()
    for seed in range(20):
        params, buffers = within.init(seeded(seed))
        chosen = int(buffers["subspace.basis"])
        found.add(chosen)
        assert float(buffers["1.running_mean"][0]) == chosen + 0.5
        theta = within.parameters(params["coefficients"], buffers["subspace.basis"])
        assert torch.equal(flat(theta.values()), bases[chosen].origin)
        again = within.init(seeded(seed))[1]
        assert int(again["subspace.basis"]) == chosen
    assert found == {0, 1, 2}


def test_buffers_without_saved_ones_are_the_tasks_own():
    task = normed_task()
    bare = dataclasses.replace(basis(task), buffers={})
    _, buffers = SubspaceTask(task, bare).init(seeded())
    want = task.init(seeded())[1]
    assert buffers.keys() == want.keys()
    assert all(torch.equal(buffers[key], want[key]) for key in want)


def test_saved_buffers_are_copied_in_the_tasks_dtype_and_must_fit():
    task = normed_task()
    made = basis(task)
    saved = made.buffers["1.running_mean"]
    saved.fill_(2)
    within = SubspaceTask(task, dataclasses.replace(
        made, buffers={**made.buffers, "1.running_mean": saved.float()}))  # fmt: skip
    for _ in range(2):  # what was written to the first start's is not in the next one's
        _, buffers = within.init(seeded())
        assert buffers["1.running_mean"].dtype == torch.float64
        assert torch.all(buffers["1.running_mean"] == 2)
        buffers["1.running_mean"].fill_(9)
    other = {**made.buffers, "1.running_mean": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"buffer '1.running_mean' has shape \(7,\), .* \(5,\)"):
        SubspaceTask(task, dataclasses.replace(made, buffers=other))


@pytest.mark.parametrize("seeded_layer", [True, False])
def test_frozen_layers_must_be_those_of_the_basis(seeded_layer):
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        model[0].requires_grad_(False)
        if seeded_layer:
            nn.init.normal_(model[0].weight, generator=seeded(1))
            nn.init.zeros_(model[0].bias)
        return model

    inputs, targets = torch.randn(20, 6).double(), torch.zeros(20, dtype=torch.int64)
    task = ModuleTask(make, nn.functional.cross_entropy, (inputs, targets), dtype=torch.float64)
    model = task.module(*task.init(seeded(5)))
    made = random(model, 3, generator=seeded(1))
    if not seeded_layer:
        with pytest.raises(ValueError, match=r"frozen parameter '0.bias' is drawn anew for every"):
            SubspaceTask(task, made)
        frozen = {f"0.{name}": value.detach() for name, value in model[0].named_parameters()}
        made = dataclasses.replace(made, buffers=frozen)
    within = SubspaceTask(task, made)
    for seed in (0, 1):
        params, buffers = within.init(seeded(seed))
        loss, _, _ = within.loss(params, buffers, (inputs, targets), None, True)
        torch.testing.assert_close(loss, nn.functional.cross_entropy(model(inputs), targets))


def test_graphs_are_for_one_basis():
    task = normed_task()
    task.capturable = True
    assert SubspaceTask(task, basis(task)).capturable
    assert not SubspaceTask(task, [basis(task), basis(task, 1)]).capturable


def test_what_the_inner_task_says_is_passed_on():
    task = with_noisy_batches(make_tiny_task(), every=2, distinct=1)
    within = SubspaceTask(task, basis(task))
    assert within.data_name == task.data_name
    assert within.network_name == task.network_name
    assert (within.batch_size, within.device, within.has_test) == (8, task.device, True)
    assert within.name == f"{task.name}, subspace 5"
    stream, want = within.stream([seeded()], "train"), task.stream([seeded()], "train")
    for _ in range(4):
        assert torch.equal(next(stream)[0], next(want)[0])
    tests = zip(within.test_batches(), task.test_batches(), strict=True)
    assert all(torch.equal(one[0], two[0]) for one, two in tests)
    params, buffers = within.init(seeded())
    _, _, metrics = within.loss(params, buffers, next(task.test_batches()), None, False)
    assert metrics.keys() == {"accuracy"}


def test_dropout_is_seeded_as_in_the_inner_task():
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3))

    inputs, targets = torch.randn(20, 6, generator=seeded()), torch.arange(20) % 3
    task = ModuleTask(make, nn.functional.cross_entropy, (inputs, targets), batch_size=8)
    within = SubspaceTask(task, basis(task))
    losses = [Copies(within, [0, 1]) for _ in range(2)]
    one, two = (group.gradients(group.batches("train"))[0] for group in losses)
    assert torch.equal(one, two)


class Plain(SubspaceTask):
    """With plain products in place of the library's own function."""

    def parameters(self, coefficients, basis=None):
        subspace = self.subspaces[0 if basis is None else int(basis)]
        return subspace.layout.tensors(subspace.origin + coefficients @ subspace.blocks[0])


@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradients_are_those_of_plain_products(second_order):
    task = make_tiny_task()
    bases = [basis(task, seed) for seed in range(2)]
    rule = make_rule("rnnprop")
    weights = {key: v.double().requires_grad_() for key, v in fresh_weights(rule).items()}
    (value, got), (same, want) = (
        reference_window(Copies(kind(task, bases), [0, 1]), rule, weights, 4,
                         second_order=second_order)
        for kind in (SubspaceTask, Plain)
    )  # fmt: skip
    torch.testing.assert_close(value, same)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-15)


def test_rules_are_meta_trained_and_evaluated_within(tmp_path):
    task = make_task("mlp-mnist", source="sample")
    model = task.module(*task.init(seeded()))
    start = copy.deepcopy(model)
    snapshots = Snapshots(tmp_path / "run", model, every=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(45):
        snapshots()
        inputs, targets = task.batch(seeded(seed), "train")
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    subspace = from_trajectory(snapshots, 8)
    within = SubspaceTask(task, subspace)
    assert torch.equal(subspace.origin, flat(start.parameters()).float())
    rule = make_rule("rnnprop", step_scale=1.0)
    trained = meta_train(
        within, rule, steps=400, horizon=20, copies=1, validation_copies=2, validations=2
    )
    assert trained.manifest["tasks"] == ["mlp-mnist, subspace 8"]
    result = evaluate(
        within, {"learned": trained}, [], optimizers={"sgd": partial(torch.optim.SGD, lr=1.0)},
        steps=20, seeds=2, timing_rounds=1,
    )  # fmt: skip
    names = {block.key.optimizer for block in result.records.blocks}
    assert names == {"learned", "sgd"}
    for block in result.records.select("train_loss", purpose="test"):
        values = block.values
        assert values[..., -1].mean() < values[..., 0].mean()


def test_a_cache_tells_bases_apart():
    task = make_tiny_task()
    one, other = basis(task, 0), basis(task, 0).with_origin(task.module(*task.init(seeded(0))))
    turned = dataclasses.replace(one, blocks=(-one.blocks[0],), info={})
    told = [identity(SubspaceTask(task, subspace)) for subspace in (one, other, turned)]
    assert told[0] == told[1] != told[2]
    assert "subspaces" not in identity(task)


def test_bad_subspaces():
    task, other = make_tiny_task(), normed_task()
    with pytest.raises(ValueError, match="give at least one subspace"):
        SubspaceTask(task, [])
    with pytest.raises(TypeError, match=r"must be a Subspace or several, got str; Subspace.load"):
        SubspaceTask(task, ["basis.safetensors"])
    with pytest.raises(ValueError, match="subspaces have 3, 5 directions"):
        SubspaceTask(task, [basis(task), basis(task, d=3)])
    with pytest.raises(ValueError, match=r"'1.weight', of shape \(5,\), is not among the task's"):
        SubspaceTask(task, basis(other))
    params = task.init(seeded())[0]
    fewer = random({key: params[key] for key in list(params)[:3]}, 5)
    with pytest.raises(ValueError, match=r"parameter '2.bias' is not in the subspace"):
        SubspaceTask(task, fewer)
    turned = random(dict(reversed(params.items())), 5)
    with pytest.raises(ValueError, match="differ in the order or the dtypes"):
        SubspaceTask(task, [basis(task), turned])
    assert SubspaceTask(task, turned).dim == 5


def test_the_rule_that_comes_out_deploys():
    rule = make_rule("rnnprop")
    trained = TrainedRule(rule, fresh_weights(rule), {"name": "toy"})
    task = make_tiny_task()
    group = Copies(SubspaceTask(task, basis(task)), [0, 1])
    stepper = RuleStepper(trained.rule, trained.weights, group.theta, group.layout)
    losses = roll(group, stepper, 3)
    assert losses.shape == (3, 2)
    assert bool(losses.isfinite().all())


def test_a_basis_of_another_dtype_is_refused():
    task = normed_task()
    params, buffers = task.init(seeded())
    narrow = random(task.module(params, buffers).float(), 5)
    with pytest.raises(ValueError, match=r"parameter '0.weight' is torch.float64, in the subspace"):
        SubspaceTask(task, narrow)
