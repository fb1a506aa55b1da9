"""SubspaceOptimizer: plain torch in other words, and a true torch.optim.Optimizer."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from functools import partial

import pytest
import torch
from tests.subspace.runs import BytesRead, batch, flat, loss_of, network, recorded, seeded, train
from tests.subspace.test_basis import dense
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.func import functional_call

import stepsmith
from stepsmith import LearnedOptimizer, SubspaceOptimizer, TrainedRule, make_rule
from stepsmith.subspace import Subspace, from_trajectory, per_layer, random
from stepsmith.testing import fresh_weights

INNER = {
    "sgd": partial(torch.optim.SGD, lr=0.5),
    "momentum": partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.05),
    "rule": partial(LearnedOptimizer, rule=make_rule("adam", lr=0.05)),
}


def learned() -> partial:
    rule = make_rule("rnnprop")
    return partial(LearnedOptimizer, rule=TrainedRule(rule, fresh_weights(rule), {"name": "toy"}))


INNER["learned"] = learned()


@pytest.fixture(params=["dense", "per layer"])
def subspace(request) -> Subspace:
    made = random if request.param == "dense" else per_layer
    return made(network(), 5, generator=seeded(1))


def reparametrised(subspace: Subspace, make, seeds) -> tuple[torch.Tensor, list[float]]:
    """theta = theta0 + c P by explicit autograd; the last theta and the losses."""
    model = network()
    c = nn.Parameter(torch.zeros(subspace.dim, dtype=torch.float64))
    optimizer, losses = make([c]), []
    matrix, start = dense(subspace), flat(network().parameters())
    sizes = [p.numel() for p in model.parameters()]
    for seed in seeds:
        parts = (start + c @ matrix).split(sizes)
        named = zip(model.named_parameters(), parts, strict=True)
        params = {name: part.view(p.shape) for (name, p), part in named}
        inputs, targets = batch(seed)
        loss = nn.functional.cross_entropy(functional_call(model, params, (inputs,)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return (start + c @ matrix).detach(), losses


@pytest.mark.parametrize("name", INNER)
def test_it_is_autograd_through_the_reparametrisation(subspace, name):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER[name])
    losses = train(model, optimizer, range(12))
    theta, want = reparametrised(subspace, INNER[name], range(12))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want), rtol=1e-9, atol=0)
    torch.testing.assert_close(flat(model.parameters()), theta, rtol=1e-9, atol=1e-12)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_directions_are_the_full_space(momentum):
    """P is orthogonal where d = N, and SGD knows no axes."""
    make = partial(torch.optim.SGD, lr=0.3, momentum=momentum)
    full, within = network(), network()
    want = train(full, make(full.parameters()), range(10))
    subspace = random(within, 63, generator=seeded())
    losses = train(within, SubspaceOptimizer(within, subspace, make), range(10))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want), rtol=1e-9, atol=0)


def test_the_identity_is_the_full_space_for_any_optimizer():
    full, within = network(), network()
    identity = dataclasses.replace(random(within, 63), blocks=(torch.eye(63).double(),))
    make = partial(torch.optim.Adam, lr=0.03)
    want = train(full, make(full.parameters()), range(10))
    losses = train(within, SubspaceOptimizer(within, identity, make), range(10))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want), rtol=1e-12, atol=0)


def test_it_is_an_optimizer_and_theta_is_always_origin_plus_lifted_c(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["adam"])
    assert isinstance(optimizer, torch.optim.Optimizer)
    for seed in range(50):
        train(model, optimizer, [seed])
        with torch.no_grad():
            model[0].weight.add_(1)  # overwritten by the next step
        train(model, optimizer, [seed])
        want = subspace.parameters(optimizer.coefficients)
        for name, param in model.named_parameters():
            assert torch.equal(param, want[name])


def test_a_step_reads_p_twice(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["sgd"])
    loss_of(model).backward()
    with BytesRead(subspace.blocks) as read:
        optimizer.step()
    assert read.count == 2 * sum(block.numel() * 8 for block in subspace.blocks)


def test_batch_norm_stays_real(subspace):
    model, plain = network(), network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["sgd"])
    before = model[1].running_mean.clone()
    train(model, optimizer, [0])
    loss_of(plain, 0)
    assert not torch.equal(model[1].running_mean, before)
    assert torch.equal(model[1].running_mean, plain[1].running_mean)


def test_the_start_is_the_origin_or_the_model(subspace):
    other = network(seed=8)
    weights = flat(other.parameters())
    SubspaceOptimizer(other, subspace, INNER["sgd"], start="model")
    assert torch.equal(flat(other.parameters()), weights)
    optimizer = SubspaceOptimizer(other, subspace, INNER["sgd"])
    assert torch.equal(flat(other.parameters()), subspace.origin)
    assert optimizer.origin is subspace.origin
    moved = SubspaceOptimizer(network(8), subspace.with_origin(network(8)), INNER["sgd"])
    assert torch.equal(moved.origin, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models(dtype):
    model = network(dtype=dtype)
    subspace = random(model, 5, generator=seeded())
    half = dataclasses.replace(subspace, blocks=tuple(b.bfloat16() for b in subspace.blocks))
    optimizer = SubspaceOptimizer(model, half, INNER["sgd"])
    assert optimizer.coefficients.dtype == torch.float32
    grads = {}
    loss_of(model).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    torch.testing.assert_close(optimizer.coefficients.detach(), -0.5 * half.project(grads))
    assert all(p.dtype == dtype for p in model.parameters())
    want = half.parameters(optimizer.coefficients.detach())
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("start", ["origin", "model"])
@pytest.mark.parametrize("name", ["momentum", "adam", "learned"])
def test_a_state_round_trip_gives_the_very_same_steps(subspace, name, start):
    model = network(seed=3)
    optimizer = SubspaceOptimizer(model, subspace, INNER[name], start=start)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    want = train(model, optimizer, range(5, 10))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = network(seed=4)
    resumed = SubspaceOptimizer(again, subspace, INNER[name], start=start)
    resumed.load_state_dict(state)
    params = {k: v for k, v in weights.items() if k in dict(again.named_parameters())}
    assert all(torch.equal(again.get_parameter(k), v) for k, v in params.items())
    again.load_state_dict(weights)
    assert train(again, resumed, range(5, 10)) == want
    assert torch.equal(optimizer.coefficients, resumed.coefficients)


@pytest.mark.parametrize("starts", [("origin", "model"), ("model", "origin")])
def test_a_state_brings_its_origin(subspace, starts):
    models = network(seed=3), network(seed=4)
    saved, loaded = (
        SubspaceOptimizer(model, subspace, INNER["sgd"], start=start)
        for model, start in zip(models, starts, strict=True)
    )
    train(models[0], saved, range(2))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.origin, saved.origin)
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


def test_copies_and_pickles_continue_alike(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    train(model, optimizer, range(3))
    pairs = [copy.deepcopy([model, optimizer]), pickle.loads(pickle.dumps([model, optimizer]))]
    assert pairs[0][1].subspace is optimizer.subspace
    want = train(model, optimizer, range(3, 6))
    for other, copied in pairs:
        assert train(other, copied, range(3, 6)) == want


@pytest.mark.parametrize("name", ["sgd", "learned"])
def test_schedulers_set_the_inner_rate(subspace, name):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER[name])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.0)
    rates = []
    for seed in range(4):
        before = optimizer.coefficients.detach().clone()
        train(model, optimizer, [seed])
        schedule.step()
        rates.append(optimizer.inner.param_groups[0]["lr"])
        assert torch.equal(before, optimizer.coefficients.detach()) == (seed >= 2)
    assert rates[-1] == 0
    assert rates[0] == INNER[name].keywords.get("lr", 1.0)


def test_options_that_the_inner_optimizer_writes_are_kept(subspace):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["made"] = self.param_groups[0].get("made", 0) + 1
            return super().step(closure)

    model = network()
    optimizer = SubspaceOptimizer(model, subspace, partial(Counting, lr=0.1))
    train(model, optimizer, range(3))
    assert optimizer.param_groups[0]["made"] == 3
    assert optimizer.state_dict()["inner"]["param_groups"][0]["made"] == 3


def test_a_group_of_the_inner_optimizer_may_have_options_of_its_own(subspace):
    optimizer = SubspaceOptimizer(
        network(), subspace, lambda c: torch.optim.SGD([{"params": c, "lr": 0.3}], lr=0.1)
    )
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_without_gradients_nothing_moves(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["sgd"])
    train(model, optimizer, [0])
    optimizer.zero_grad()
    before = optimizer.coefficients.detach().clone()
    optimizer.step()
    assert torch.equal(optimizer.coefficients.detach(), before)


@pytest.mark.parametrize("trained", [0, 2])
def test_options_set_on_the_inner_optimizer_are_not_undone_in_silence(subspace, trained):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    train(model, optimizer, range(trained))
    optimizer.inner.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match=r"'lr' was set to 0.0 on the inner .* give schedulers"):
        train(model, optimizer, [3])
    optimizer.inner.param_groups[0]["lr"] = INNER["momentum"].keywords["lr"]
    train(model, optimizer, [3])


@pytest.mark.parametrize("trained", [0, 2])
def test_tensors_set_on_the_inner_optimizer_are_not_undone_in_silence(subspace, trained):
    model = network()
    rate = torch.tensor(0.2)
    optimizer = SubspaceOptimizer(model, subspace, partial(torch.optim.SGD, lr=rate, foreach=True))
    train(model, optimizer, range(trained))
    optimizer.inner.param_groups[0]["lr"] = torch.tensor(0.2)
    with pytest.raises(RuntimeError, match="'lr' was set to tensor"):
        train(model, optimizer, [3])
    optimizer.inner.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"].fill_(0.0)  # as schedulers do
    before = flat(model.parameters())
    train(model, optimizer, [3])
    assert torch.equal(flat(model.parameters()), before)
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())
    again.step()


def test_what_is_frozen_later_is_not_moved_in_silence(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    train(model, optimizer, [0])
    model[0].weight.requires_grad_(False)
    before = flat(model.parameters())
    with pytest.raises(RuntimeError, match=r"'0.weight' was frozen since .* unfreeze it"):
        train(model, optimizer, [1])
    assert torch.equal(flat(model.parameters()), before)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, [1])
    # Where there is one device, the basis is moved in the model's place.
    optimizer.subspace = optimizer.subspace.to("meta")
    with pytest.raises(RuntimeError, match=r"'0.weight' was moved to cpu, the basis is on meta"):
        train(model, optimizer, [2])


def test_distributed_checkpoints_do_not_step(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["adam"])
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    want = copy.deepcopy(optimizer.state_dict())
    kept = get_optimizer_state_dict(model, optimizer)
    assert torch.equal(optimizer.coefficients.detach(), want["coefficients"])
    torch.testing.assert_close(optimizer.inner.state_dict(), want["inner"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="the state lacks 'coefficients', 'inner'"):
        set_optimizer_state_dict(model, optimizer, kept)  # which carry nothing of a subspace
    optimizer.load_state_dict(want)
    get_optimizer_state_dict(model, optimizer)
    torch.testing.assert_close(optimizer.inner.state_dict(), want["inner"], rtol=0, atol=0)


def test_an_inner_optimizer_need_not_ask_for_gradients(subspace):
    class Bare(torch.optim.Optimizer):
        def step(self, closure=None):
            loss = closure()
            (c,) = self.param_groups[0]["params"]
            c -= c.grad
            return loss

    model = network()
    optimizer = SubspaceOptimizer(model, subspace, lambda c: Bare(c, {"lr": 1.0}))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.coefficients.detach().abs().sum() > 0


def test_states_go_by_the_names_of_the_tensors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    made = random(model, 3, generator=seeded(1))
    names = ("1.weight", "0.bias", "0.weight", "1.bias")
    swapped = dataclasses.replace(made, layout=dataclasses.replace(made.layout, names=names))
    state = SubspaceOptimizer(model, made, INNER["sgd"]).state_dict()
    with pytest.raises(ValueError, match="saved with another subspace"):
        SubspaceOptimizer(model, swapped, INNER["sgd"]).load_state_dict(state)


def test_closures(subspace):
    model, plain = network(), network()
    by_hand = SubspaceOptimizer(plain, subspace, INNER["momentum"])
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    want, losses = train(plain, by_hand, range(4)), []
    for seed in range(4):

        def closure(seed=seed):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    assert losses == want


def test_an_inner_optimizer_that_evaluates_often():
    """LBFGS on a quadratic of theta finds the minimum within the subspace in one call."""
    model = nn.Linear(20, 1, bias=False).double()
    subspace = random(model, 4, generator=seeded())
    target = torch.randn(1, 20, generator=seeded(2), dtype=torch.float64)
    make = partial(torch.optim.LBFGS, max_iter=50, line_search_fn="strong_wolfe")
    optimizer = SubspaceOptimizer(model, subspace, make)

    def closure():
        optimizer.zero_grad()
        loss = (model.weight - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    matrix, start = dense(subspace), subspace.origin
    best = start + matrix.t() @ (matrix @ (target[0] - start))
    torch.testing.assert_close(model.weight[0].detach(), best)


def test_grad_scaler_skips_a_step_whole(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):
        before = optimizer.coefficients.detach().clone()
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, optimizer.coefficients) == (factor != 1.0)


def test_a_learned_rule_skips_what_is_not_finite(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["learned"])
    train(model, optimizer, range(2))
    before = flat(model.parameters())
    loss_of(model).backward()
    model[3].bias.grad[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="the whole step is skipped"):
        optimizer.step()
    assert torch.equal(flat(model.parameters()), before)
    assert optimizer.inner.skipped_steps == 1


def test_zero_grad_and_clipping_see_the_models_gradients(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["sgd"])
    loss_of(model).backward()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(held, 1e-3)
    norm = float(flat(p.grad for p in model.parameters()).norm())
    assert norm == pytest.approx(1e-3, rel=1e-3)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_gradients_count_as_zero(subspace):
    model, other = network(), network()
    one = SubspaceOptimizer(model, subspace, INNER["adam"])
    two = SubspaceOptimizer(other, subspace, INNER["adam"])
    one.step()
    assert "step" not in one.inner.state[one.coefficients]
    for net in (model, other):
        loss_of(net).backward()
    model[0].weight.grad = None
    other[0].weight.grad.zero_()
    one.step()
    two.step()
    assert torch.equal(one.coefficients, two.coefficients)


def test_reordered_and_tied_and_frozen_models():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            layers = network()
            for name in ("3", "1", "0", "2"):
                self.add_module(name, layers.get_submodule(name))
            self.extra = nn.Parameter(torch.ones(3).double(), requires_grad=False)

        def forward(self, inputs):
            hidden = self.get_submodule("1")(self.get_submodule("0")(inputs))
            return self.get_submodule("3")(torch.tanh(hidden))

    subspace = random(network(), 5, generator=seeded())
    model, turned = network(), Turned()
    want = train(model, SubspaceOptimizer(model, subspace, INNER["adam"]), range(5))
    assert train(turned, SubspaceOptimizer(turned, subspace, INNER["adam"]), range(5)) == want
    turned.extra.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'extra', .* requires a gradient and is not in"):
        SubspaceOptimizer(turned, subspace, INNER["adam"])
    model[3].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'3.bias' is frozen in the model"):
        SubspaceOptimizer(model, subspace, INNER["adam"])
    other = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    before = flat(other.parameters())
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 6\), that of the model \(4"):
        SubspaceOptimizer(other, subspace, INNER["adam"])
    assert torch.equal(flat(other.parameters()), before)


def test_names_may_be_given_in_place_of_the_model(subspace):
    model, other = network(), network()
    want = train(model, SubspaceOptimizer(model, subspace, INNER["sgd"]), range(3))
    by_names = SubspaceOptimizer(other.named_parameters(), subspace, INNER["sgd"])
    assert train(other, by_names, range(3)) == want
    with pytest.raises(TypeError, match=r"not model.parameters\(\)"):
        SubspaceOptimizer(other.parameters(), subspace, INNER["sgd"])


def test_training_in_its_own_trajectorys_subspace_gets_as_far(tmp_path):
    """The reason for it all: in twelve directions of a run, ten times the rate reaches its loss."""
    model = network()
    subspace = from_trajectory(recorded(tmp_path, model), 8)
    reached = float(loss_of(model.eval()).detach())
    within = network()
    optimizer = SubspaceOptimizer(within, subspace, partial(torch.optim.SGD, lr=1.0))
    first = float(loss_of(within).detach())
    train(within, optimizer, range(30))
    assert float(loss_of(within.eval()).detach()) < reached + 0.2 * (first - reached)


@pytest.mark.parametrize(
    ("inner", "kind", "match"),
    [
        (lambda c: None, TypeError, "inner must return a torch.optim.Optimizer"),
        (lambda c: torch.optim.SGD([nn.Parameter(torch.ones(2))]), ValueError, "nothing else"),
        (
            lambda c: torch.optim.SGD([{"params": c}, {"params": [nn.Parameter(torch.ones(2))]}]),
            ValueError, "nothing else",
        ),
    ],
)  # fmt: skip
def test_inner_optimizers_of_something_else(subspace, inner, kind, match):
    with pytest.raises(kind, match=match):
        SubspaceOptimizer(network(), subspace, inner)


def test_bad_arguments(subspace):
    with pytest.raises(ValueError, match="start must be one of origin, model; got 'here'"):
        SubspaceOptimizer(network(), subspace, INNER["sgd"], start="here")
    with pytest.raises(TypeError, match=r"subspace must be a Subspace, got str; Subspace.load"):
        SubspaceOptimizer(network(), "basis.safetensors", INNER["sgd"])
    made = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"inner must be called .* got SGD; pass for example"):
        SubspaceOptimizer(network(), subspace, made)
    broken = network()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model's weights are not finite"):
        SubspaceOptimizer(broken, subspace, INNER["sgd"], start="model")
    spread = network()
    spread[3].to("meta")
    with pytest.raises(ValueError, match="the parameters are on several devices"):
        SubspaceOptimizer(spread, subspace, INNER["sgd"])
    optimizer = SubspaceOptimizer(network(), subspace, INNER["sgd"])
    with pytest.raises(ValueError, match="parameters cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = SubspaceOptimizer(model, random(model, 2), INNER["sgd"])
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_states_that_do_not_fit_change_nothing(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    train(model, optimizer, range(2))
    before = optimizer.coefficients.detach().clone()
    smaller = SubspaceOptimizer(network(), random(network(), 2), INNER["momentum"])
    other = SubspaceOptimizer(network(), subspace, INNER["adam"])
    plain = torch.optim.SGD(network().parameters(), lr=0.1)
    for state, match in (
        (smaller.state_dict(), r"coefficients should have shape .* have \(2,\)"),
        (other.state_dict(), "saved with Adam inside, here is SGD"),
        (plain.state_dict(), "the state lacks 'coefficients'"),
        ({**optimizer.state_dict(), "origin": torch.ones(2)}, r"origin should have shape \(63,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
    elsewhere = dataclasses.replace(subspace, origin=subspace.origin + 1)
    turned = random(network(), subspace.dim, generator=seeded(2))
    for of in (elsewhere, turned):
        saved = SubspaceOptimizer(network(), of, INNER["momentum"]).state_dict()
        with pytest.raises(ValueError, match="saved with another subspace"):
            optimizer.load_state_dict(saved)
    assert torch.equal(before, optimizer.coefficients)
    fewer = optimizer.state_dict()
    fewer["param_groups"] = [{**fewer["param_groups"][0], "params": [0]}]
    with pytest.raises(ValueError, match=r"the state is of \[1\] parameters, the subspace of 6"):
        optimizer.load_state_dict(fewer)


def everything(optimizer) -> list:
    """What loading may change, copied."""
    model = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    return copy.deepcopy([optimizer.state_dict(), optimizer.origin, model])


@pytest.mark.parametrize("name", ["momentum", "learned"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s["coefficients"].fill_(float("nan")), "coefficients .* should be finite"),
        (lambda s: s.update(coefficients=s["coefficients"].int()), "should be a tensor of"),
        (lambda s: s.update(coefficients=[0.0] * 5), "should be a tensor of fl"),
        (lambda s: s["origin"].fill_(float("inf")), "origin of the state should be finite"),
        (lambda s: s["inner"]["param_groups"].clear(), "different number of parameter groups"),
        (lambda s: s.pop("param_groups"), "the state lacks 'param_groups'"),
        (lambda s: s.update(param_groups=[1]), "'param_groups' of the state should be a list"),
    ],
)  # fmt: skip
def test_a_damaged_state_changes_nothing(subspace, name, change, match):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER[name], start="model")
    train(model, optimizer, range(2))
    before = everything(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.01
    change(state)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(everything(optimizer)[1:], before[1:], rtol=0, atol=0)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["inner"], before[0]["inner"], rtol=0, atol=0)
    assert after["param_groups"] == before[0]["param_groups"]
    train(model, optimizer, [2])


def test_an_inner_state_that_cannot_be_changes_nothing(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["learned"])
    train(model, optimizer, range(2))
    before = everything(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    state["coefficients"] += 1
    state["inner"]["state"][0]["exp_avg_sq"][0] = -1.0
    with pytest.raises(ValueError, match="'exp_avg_sq' should be >= 0"):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(everything(optimizer)[1:], before[1:], rtol=0, atol=0)


def test_loading_that_fails_late_leaves_the_inner_optimizer_as_it_was(subspace, monkeypatch):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    before = everything(optimizer)

    class Stubborn:
        def __deepcopy__(self, memo):
            raise MemoryError("no room")

    state["param_groups"][0]["note"] = Stubborn()
    with pytest.raises(MemoryError, match="no room"):
        optimizer.load_state_dict(state)
    after = everything(optimizer)
    torch.testing.assert_close(after[0]["inner"], before[0]["inner"], rtol=0, atol=0)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)


def test_hooks_see_the_model_and_the_rate_that_were_loaded(subspace):
    model, other = network(), network(seed=4)
    optimizer = SubspaceOptimizer(model, subspace, INNER["momentum"])
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    loading = SubspaceOptimizer(other, subspace, INNER["momentum"])
    seen = []

    def slower(o, given):
        return {**given, "param_groups": [{**given["param_groups"][0], "lr": 0.01}]}

    loading.register_load_state_dict_pre_hook(slower)
    loading.register_load_state_dict_post_hook(lambda o: seen.append(flat(other.parameters())))
    loading.load_state_dict(state)
    assert torch.equal(seen[0], flat(model.parameters()))
    assert loading.inner.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.param_groups[0]["params"].pop(),
        lambda o: o.param_groups[0]["params"].reverse(),
        lambda o: o.param_groups[0]["params"].append(nn.Parameter(torch.ones(2))),
        lambda o: o.param_groups[0].update(params=[*network().parameters()]),
        lambda o: o.param_groups.clear(),
        lambda o: o.param_groups.append(dict(o.param_groups[0])),
    ],
)
def test_other_parameters_in_the_groups_are_refused(subspace, change):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["adam"])
    train(model, optimizer, [0])
    group, params = optimizer.param_groups[0], [*optimizer.param_groups[0]["params"]]
    change(optimizer)
    before = flat(model.parameters())
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="hold other parameters than it was made with"):
        optimizer.step()
    assert torch.equal(flat(model.parameters()), before)
    group["params"] = list(params)  # a new list of the same is none
    optimizer.param_groups = [group]
    train(model, optimizer, [1])


@pytest.mark.parametrize("shape", [(7, 6), (1, 6), (30,), (0,)])
def test_another_size_is_refused(subspace, shape):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["adam"])
    train(model, optimizer, [0])
    loss_of(model, 1).backward()
    kept, state = model[0].weight.data, copy.deepcopy(optimizer.inner.state_dict())
    model[0].weight.data = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'0.weight' has shape .* now, in the subspace it has"):
        optimizer.step()
    model[0].weight.data = kept
    model[0].weight.grad.data = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"the gradient of '0.weight' has shape .* zero_grad"):
        optimizer.step()
    torch.testing.assert_close(optimizer.inner.state_dict(), state, rtol=0, atol=0)
    optimizer.zero_grad()
    train(model, optimizer, [1])


def test_a_saved_state_is_a_snapshot(subspace):
    model = network()
    optimizer = SubspaceOptimizer(model, subspace, INNER["learned"])
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, range(2, 4))
    assert torch.equal(state["coefficients"], before["coefficients"])
    torch.testing.assert_close(state["inner"], before["inner"], rtol=0, atol=0)


def test_a_state_brings_an_origin_of_its_own_to_the_same_directions(subspace):
    optimizer = SubspaceOptimizer(network(), subspace, INNER["momentum"], start="model")
    elsewhere = dataclasses.replace(subspace, origin=subspace.origin + 1)
    other = SubspaceOptimizer(network(), elsewhere, INNER["momentum"])
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.origin, optimizer.origin)
    unmarked = {k: v for k, v in optimizer.state_dict().items() if k != "subspace"}
    optimizer.load_state_dict(unmarked)


def test_the_package_exports_it():
    assert stepsmith.SubspaceOptimizer is SubspaceOptimizer
    assert stepsmith.Subspace is Subspace
