"""What PyTorch asks of its own optimizers (its test/test_optim.py), asked of these.

The cases are this project's own; what does not apply stands in docs/1-deploy.md, with the reason.
`torch.testing._internal` is not used: importing it changes global settings of torch.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from stepsmith import LearnedOptimizer, SubspaceOptimizer
from stepsmith.hub import BUNDLED
from stepsmith.subspace import random

INNER: dict[str, Any] = {
    "subspace-sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "subspace-adam": partial(torch.optim.Adam, lr=0.05),
    "subspace-rule": partial(LearnedOptimizer, rule="general-warmed"),
}
KINDS = [*BUNDLED, *INNER]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_rule = pytest.mark.parametrize("kind", BUNDLED)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind: str, params, **options) -> torch.optim.Optimizer:
    """An optimizer of parameters; of all their directions where it is a subspace's."""
    if kind in BUNDLED:
        return LearnedOptimizer(params, kind, **options)
    named = {f"p{index}": param for index, param in enumerate(params)}
    total = sum(param.numel() for param in named.values())
    subspace = random(named, min(total, 40), generator=seeded(3))
    return SubspaceOptimizer(named, subspace, partial(INNER[kind], **options))


class Problem:
    """Least squares: a matrix, a vector, and the loss of both."""

    def __init__(self, layout: str = "contiguous", dtype: torch.dtype = torch.float32):
        weight, bias, self.input = (
            torch.randn(shape, generator=seeded(5), dtype=torch.float64).to(dtype)
            for shape in ((10, 5, 2), (10, 2), (5,))
        )
        if layout == "contiguous":
            self.params = [nn.Parameter(v[..., 0].contiguous()) for v in (weight, bias)]
        else:
            self.params = [nn.Parameter(v[..., 0]) for v in (weight, bias)]
            assert not self.params[0].is_contiguous()

    def loss(self) -> torch.Tensor:
        weight, bias = self.params
        return (weight.mv(self.input) + bias).square().mean()

    def step(self, optimizer, count: int = 1) -> float:
        for _ in range(count):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
        return float(self.loss().detach())


def solved(kind: str, steps: int = 3, **options) -> tuple[Problem, torch.optim.Optimizer]:
    problem = Problem()
    optimizer = make(kind, problem.params, **options)
    problem.step(optimizer, steps)
    return problem, optimizer


def same(one: Any, two: Any) -> bool:
    """Whether nested states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def values(params) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


@every_kind
@pytest.mark.parametrize("layout", ["contiguous", "apart"])
def test_steps_go_the_right_way(kind, layout):
    problem = Problem(layout)
    before = float(problem.loss().detach())
    assert problem.step(make(kind, problem.params), 20) < before


@every_kind
def test_tensors_of_many_sizes_go_the_right_way(kind):
    params = [nn.Parameter(torch.randn(n, generator=seeded(n))) for n in (1, 7, 300, 5000)]
    optimizer = make(kind, params)

    def loss():
        return torch.cat([(p - 0.05).square() for p in params]).mean() * 100

    before = float(loss().detach())
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < before


SCHEDULERS = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "step": lambda o: schedulers.StepLR(o, 2),
    "multi step": lambda o: schedulers.MultiStepLR(o, [2, 3]),
    "constant": lambda o: schedulers.ConstantLR(o, 0.5, 3),
    "linear": lambda o: schedulers.LinearLR(o, 0.5, total_iters=4),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 8),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.9)], [3]
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.02, anneal_epochs=4),
}


@every_kind
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(kind, name):
    """The rate of every step is the schedule's, and the loss falls."""
    problem = Problem()
    optimizer = make(kind, problem.params)
    # The schedule alone, on an optimizer of PyTorch's with the same rate.
    rate = optimizer.param_groups[0]["lr"]
    twin = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate)
    before = float(problem.loss().detach())
    schedule, alone = SCHEDULERS[name](optimizer), SCHEDULERS[name](twin)
    for _ in range(6):
        assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
        problem.step(optimizer)
        twin.step()
        given = (1.0,) if name == "plateau" else ()
        schedule.step(*given)
        alone.step(*given)
    assert optimizer.param_groups[0]["lr"] != rate or name in ("constant", "restarts", "linear")
    assert float(problem.loss().detach()) < before


@every_rule
def test_schedules_of_momentum_are_refused(kind):
    with pytest.raises(ValueError, match="must support momentum"):
        schedulers.OneCycleLR(make(kind, Problem().params), 0.1, total_steps=5)


@every_rule
def test_groups_with_a_scheduler_go_the_right_way(kind):
    problem = Problem()
    groups = [{"params": problem.params[:1]}, {"params": problem.params[1:], "lr": 0.5}]
    optimizer = make(kind, groups)
    schedule = schedulers.ExponentialLR(optimizer, 0.9)
    before = float(problem.loss().detach())
    for _ in range(10):
        problem.step(optimizer)
        schedule.step()
    assert float(problem.loss().detach()) < before
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.9**10, 0.5 * 0.9**10])


@every_kind
@pytest.mark.parametrize("dims", [0, 1])
def test_a_rate_in_a_tensor(kind, dims):
    if kind in ("subspace-sgd", "subspace-adam") and dims == 1:
        pytest.skip("PyTorch's own take no such rate without foreach=False")
    shape = (1,) * dims
    problem, plain = Problem(), Problem()
    optimizer = make(kind, problem.params, lr=torch.full(shape, 0.25))
    other = make(kind, plain.params, lr=0.25)
    for each, own in ((problem, optimizer), (plain, other)):
        schedule = schedulers.ExponentialLR(own, 0.5)
        for _ in range(3):
            each.step(own)
            schedule.step()
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    for one, two in zip(problem.params, plain.params, strict=True):
        torch.testing.assert_close(one, two)


@every_rule
@pytest.mark.parametrize(
    ("options", "kind_of_error", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": float("inf")}, ValueError, "lr must be finite"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be finite and >= 0"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"lr": None}, TypeError, "lr must be a number"),
        ({"lr": True}, TypeError, "lr must be a number"),
        ({"lr": 1j}, TypeError, "lr must be a number"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay must be finite and >= 0"),
        ({"weight_decay": "1e-4"}, TypeError, "weight_decay must be a number"),
    ],
)
def test_bad_options(kind, options, kind_of_error, match):
    with pytest.raises(kind_of_error, match=match):
        make(kind, Problem().params, **options)
    optimizer = make(kind, Problem().params)
    with pytest.raises(kind_of_error, match=match):
        optimizer.add_param_group({"params": [torch.ones(2)], **options})
    assert len(optimizer.param_groups) == 1


@every_rule
@pytest.mark.parametrize(
    ("params", "kind_of_error", "match"),
    [
        (torch.ones(2), TypeError, "should be an iterable of Tensors or dicts"),
        ([], ValueError, "empty parameter list"),
        ([3], TypeError, "can only optimize Tensors"),
        ([torch.ones(2, requires_grad=True) * 2], ValueError, "can't optimize a non-leaf"),
        ([{"params": {torch.ones(2)}}], TypeError, "ordered collections"),
        ([torch.ones(2, dtype=torch.cfloat)], ValueError, "complex parameters are not supported"),
        ([torch.ones(2, 2, dtype=torch.cdouble)], ValueError, "complex parameters are not"),
    ],
)
def test_bad_parameters(kind, params, kind_of_error, match):
    with pytest.raises(kind_of_error, match=match):
        make(kind, params)


@every_rule
@pytest.mark.parametrize("group", [[torch.ones(2)], "weights", None])
def test_a_group_of_the_wrong_type(kind, group):
    optimizer = make(kind, Problem().params)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group(group)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"][0]})
    assert len(optimizer.param_groups) == 1


@every_rule
def test_a_parameter_listed_twice_is_said(kind):
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make(kind, Problem().params * 2)


@every_rule
def test_rates_of_groups(kind):
    problem, plain = Problem(), Problem()
    groups = [{"params": problem.params[:1]}, {"params": problem.params[1:], "lr": 0.0}]
    before = values(problem.params)
    problem.step(make(kind, groups))
    plain.step(make(kind, plain.params))
    torch.testing.assert_close(problem.params[0], plain.params[0])
    assert torch.equal(problem.params[1], before[1])


@every_rule
def test_weight_decay_of_groups(kind):
    """It shrinks exactly the parameters of the group it is given to."""
    problem, plain = Problem(), Problem()
    groups = [{"params": problem.params[:1], "weight_decay": 0.1}, {"params": problem.params[1:]}]
    before = values(problem.params)
    problem.step(make(kind, groups))
    plain.step(make(kind, plain.params))
    torch.testing.assert_close(problem.params[0], plain.params[0] - 0.1 * before[0])
    torch.testing.assert_close(problem.params[1], plain.params[1])


@every_rule
def test_options_that_a_group_lacks_are_the_defaults(kind):
    optimizer = make(kind, [{"params": Problem().params}], lr=0.3, weight_decay=0.1, maximize=True)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["maximize"]) == (0.3, 0.1, True)


@every_kind
def test_without_gradients_a_step_changes_nothing(kind):
    problem, optimizer = solved(kind)
    optimizer.zero_grad()
    before, state = values(problem.params), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert same(before, values(problem.params))
    assert same(state, optimizer.state_dict())


@every_kind
def test_the_first_steps_on_zero_gradients_change_nothing(kind):
    problem = Problem()
    optimizer = make(kind, problem.params)
    before = values(problem.params)
    for _ in range(3):
        for param in problem.params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert same(before, values(problem.params))


@every_rule
def test_empty_gradients(kind):
    empty, other = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(3))
    optimizer = make(kind, [empty, other])
    empty.grad, other.grad = torch.ones(0, 3), torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert float(optimizer.state[other]["step"]) == 2
    assert empty.shape == (0, 3)


@every_kind
def test_maximizing_is_minimizing_the_negative(kind):
    up, down = Problem(), Problem()
    one, two = make(kind, up.params, maximize=True), make(kind, down.params)
    for _ in range(3):
        for problem, optimizer, sign in ((up, one, -1), (down, two, 1)):
            optimizer.zero_grad()
            (sign * problem.loss()).backward()
            optimizer.step()
    for a, b in zip(up.params, down.params, strict=True):
        torch.testing.assert_close(a, b)


@every_kind
def test_a_closure_is_called_and_its_loss_returned(kind):
    problem, plain = Problem(), Problem()
    optimizer, other = make(kind, problem.params), make(kind, plain.params)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    for _ in range(2):
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert float(loss.detach()) == calls[-1]
        plain.step(other)
    assert len(calls) == 2
    assert same(values(problem.params), values(plain.params))
    assert optimizer.step() is None


@every_rule
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.half)])
def test_mixed_dtypes(kind, dtypes):
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (*dtypes, torch.float32)]
    optimizer = make(kind, params)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack([param.float().square().sum() for param in params]).sum().backward()
        optimizer.step()
    for param, dtype in zip(params, (*dtypes, torch.float32), strict=True):
        assert param.dtype == dtype
        assert bool((param < 1).all())


@every_kind
def test_there_is_state(kind):
    problem, optimizer = solved(kind)
    assert optimizer.state[problem.params[0]]
    found = optimizer.state_dict()
    found = found.get("inner", found)
    assert all(isinstance(v, torch.Tensor) for e in found["state"].values() for v in e.values())
    assert all(entry for entry in found["state"].values())


@every_kind
def test_states_are_deterministic(kind):
    """A resumed run goes exactly as one that was not interrupted."""
    problem, optimizer = solved(kind)
    weights, state = values(problem.params), copy.deepcopy(optimizer.state_dict())
    problem.step(optimizer, 5)
    again = Problem()
    resumed = make(kind, again.params)
    resumed.load_state_dict(state)
    with torch.no_grad():
        for param, value in zip(again.params, weights, strict=True):
            param.copy_(value)
    assert same(state, resumed.state_dict())
    again.step(resumed, 5)
    assert same(values(problem.params), values(again.params))
    assert same(optimizer.state_dict(), resumed.state_dict())


@every_kind
def test_saving_and_loading_with_weights_only(kind):
    _, optimizer = solved(kind)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make(kind, Problem().params)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(optimizer.state_dict(), other.state_dict())


@every_kind
def test_a_state_from_before_an_option(kind):
    _, optimizer = solved(kind)
    state = copy.deepcopy(optimizer.state_dict())
    for key in state["param_groups"][0].keys() - {"lr", "params"}:
        del state["param_groups"][0][key]
    for key in ("maximize", "foreach", "differentiable", "rule"):  # of any optimizer's
        state.get("inner", state)["param_groups"][0].pop(key, None)
    problem = Problem()
    other = make(kind, problem.params)
    other.load_state_dict(state)
    problem.step(other)
    assert other.param_groups[0].keys() >= make(kind, Problem().params).param_groups[0].keys()
    assert other.param_groups[0]["maximize"] is False


@every_rule
@pytest.mark.parametrize("number", [int, float, torch.tensor, lambda n: torch.tensor(int(n))])
def test_a_step_count_that_is_a_plain_number(kind, number):
    problem, optimizer = solved(kind)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = number(float(entry["step"]))
    other = make(kind, problem.params)
    other.load_state_dict(state)
    problem.step(other)
    assert [float(other.state[p]["step"]) for p in problem.params] == [4, 4]


@every_rule
def test_names_of_parameters_travel(kind):
    model = nn.Linear(5, 2)
    optimizer = make(kind, list(model.named_parameters()))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 5)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    unnamed = make(kind, list(nn.Linear(5, 2).parameters()))
    unnamed.load_state_dict(state)
    assert unnamed.param_groups[0]["param_names"] == ["weight", "bias"]
    again = make(kind, list(nn.Linear(5, 2).named_parameters()))
    again.load_state_dict(make(kind, list(nn.Linear(5, 2).parameters())).state_dict())
    assert again.param_groups[0]["param_names"] == ["weight", "bias"]


@every_rule
def test_a_state_loads_into_another_dtype(kind):
    _, optimizer = solved(kind)
    wide = Problem(dtype=torch.float64)
    other = make(kind, wide.params)
    other.load_state_dict(optimizer.state_dict())
    wide.step(other)
    entry = other.state[wide.params[0]]
    assert float(entry["step"]) == 4
    assert {value.dtype for value in entry.values()} == {torch.float64}


@every_kind
def test_copies_have_all_public_attributes(kind):
    _, optimizer = solved(kind)
    copied = copy.deepcopy(optimizer)

    def public(of):
        return {name for name in vars(of) if not name.startswith("_")}

    assert public(copied) == public(optimizer)


@every_kind
@pytest.mark.parametrize("through", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_go_on_alike(kind, through):
    problem, optimizer = solved(kind)
    twin, twins = through((problem, optimizer))
    problem.step(optimizer, 3)
    twin.step(twins, 3)
    assert same(values(problem.params), values(twin.params))
    assert same(optimizer.state_dict(), twins.state_dict())


@every_kind
def test_step_hooks(kind):
    problem = Problem()
    optimizer = make(kind, problem.params)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("all before", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("all after", o))),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o))),
    ]
    try:
        problem.step(optimizer)
    finally:
        for handle in handles:
            handle.remove()
    problem.step(optimizer)
    assert [name for name, _ in seen] == ["all before", "before", "after", "all after"]
    assert all(o is optimizer for _, o in seen)


@every_kind
def test_a_step_hook_may_give_other_arguments(kind):
    problem = Problem()
    optimizer = make(kind, problem.params)

    def closure():
        problem.loss().backward()
        return 3.0

    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert optimizer.step() == 3.0


@pytest.mark.parametrize("kind", INNER)
def test_hooks_on_the_inner_optimizer_run_once(kind):
    problem = Problem()
    optimizer, seen = make(kind, problem.params), []
    inner = optimizer.inner
    inner.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    inner.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    problem.step(optimizer)
    assert seen == ["before", "after"]
    schedulers.ConstantLR(inner)  # which puts a step of its own in the step's place
    problem = Problem()
    optimizer, seen = make(kind, problem.params), []
    optimizer.inner.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 2.0), {}))
    assert optimizer.step() == 2.0


@every_kind
def test_hooks_of_saving(kind):
    _, optimizer = solved(kind)
    want = optimizer.state_dict()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("second"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("first"), prepend=True)

    def emptied(o, found):
        assert same(found, want)  # the whole, as it is returned
        seen.append("after")
        return {**found, "param_groups": [], "mark": 1}

    optimizer.register_state_dict_post_hook(emptied)
    optimizer.register_state_dict_post_hook(lambda o, found: found.update(late=2))
    found = optimizer.state_dict()
    assert seen == ["first", "second", "after"]
    assert found.pop("late") == 2
    assert same(found, {**want, "param_groups": [], "mark": 1})


@every_kind
def test_hooks_of_loading(kind):
    problem, optimizer = solved(kind)
    state = copy.deepcopy(optimizer.state_dict())
    problem.step(optimizer, 2)
    seen = []

    def handed(o, given):
        assert given == {}
        seen.append("before")
        return copy.deepcopy(state)

    def after(o):
        assert same(o.state_dict(), state)  # all is loaded by now
        seen.append("after")

    optimizer.register_load_state_dict_pre_hook(handed)
    optimizer.register_load_state_dict_pre_hook(lambda o, given: seen.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict({})
    assert seen == ["first", "before", "after"]
    if "inner" in state:
        assert torch.equal(optimizer.coefficients.detach(), state["coefficients"])


@every_kind
def test_the_profiler_names_the_step(kind):
    problem, optimizer = solved(kind)
    problem.loss().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    name = type(optimizer).__name__
    names = [event.key for event in profile.key_averages()]
    assert names.count(f"Optimizer.step#{name}.step") == 1
    assert f"Optimizer.zero_grad#{name}.zero_grad" in names


@every_rule
def test_a_group_added_in_the_middle(kind):
    problem, optimizer = solved(kind)
    late = Problem()
    optimizer.add_param_group({"params": late.params, "lr": 0.5})
    for _ in range(2):
        problem.loss().backward()
        late.loss().backward()
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in problem.params + late.params] == [5, 5, 2, 2]


@every_kind
@pytest.mark.parametrize("bad", [False, True])
def test_grad_scaler(kind, bad):
    """A step with gradients that overflow is skipped whole; others go as without a scaler."""
    problem, plain = Problem(), Problem()
    optimizer, other = make(kind, problem.params), make(kind, plain.params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for turn in range(3):
        optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        skipped = bad and turn == 1
        if skipped:
            problem.params[0].grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not skipped:
            plain.step(other)
    assert same(values(problem.params), values(plain.params))


@every_kind
def test_a_compiled_step_is_the_same(kind):
    problem, plain = Problem(), Problem()
    optimizer, other = make(kind, problem.params), make(kind, plain.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            optimizer.zero_grad()
            problem.loss().backward()
            step()
            plain.step(other)
    assert same(values(problem.params), values(plain.params))


@pytest.mark.parametrize("kind", ["general-warmed", "subspace-adam", "subspace-rule"])
def test_a_compiled_training_step_is_the_same(kind):
    problem, plain = Problem(), Problem()
    optimizer, other = make(kind, problem.params), make(kind, plain.params)
    seen = []
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(1))

    @partial(torch.compile, backend="eager")
    def train():
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        optimizer.step()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(3):
            train()
            plain.step(other)
    assert same(values(problem.params), values(plain.params))
    assert len(seen) == 3
