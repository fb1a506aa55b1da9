"""LearnedOptimizer is a true torch.optim.Optimizer, and no step is lost or invented."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from stepsmith import LearnedOptimizer, TrainedRule, make_rule
from stepsmith.store import CheckpointError
from stepsmith.testing import fresh_weights


def trained(name: str = "joined", horizon: int = 100, **options) -> TrainedRule:
    rule = make_rule(name, **options)
    return TrainedRule(rule, fresh_weights(rule), {"horizon": horizon, "name": "toy"})


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """A matrix, a vector, a 0-d number, an empty one and a transposed one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5,), (), (0, 2)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    drawn.append(torch.randn(3, 6, generator=generator).to(dtype).t())
    return [nn.Parameter(p) for p in drawn]


def feed(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(optimizer, params, seeds) -> None:
    for seed in seeds:
        feed(params, seed)
        optimizer.step()


def equal(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def tensors_equal(one: dict, two: dict) -> bool:
    """States bit for bit: keys, dtypes, shapes, values."""
    return one.keys() == two.keys() and all(
        one[key].keys() == two[key].keys()
        and all(
            a.dtype == two[key][name].dtype and torch.equal(a, two[key][name])
            for name, a in one[key].items()
        )
        for key in one
    )


def test_it_is_an_optimizer_and_it_moves():
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, range(3))
    for p, b in zip(params, before, strict=True):
        assert p.numel() == 0 or not torch.equal(p, b)
    assert not params[4].is_contiguous()


@pytest.mark.parametrize("name", ["joined", "l2o_dm", "rnnprop", "adam"])
def test_joining_parameters_changes_nothing(name):
    rules = {"joined": trained(scaling="absolute"), "adam": make_rule("adam", lr=0.1)}
    rule = rules.get(name) or trained(name)
    together, alone = parameters(), parameters()
    one = LearnedOptimizer(together, rule)
    each = [LearnedOptimizer([p], rule) for p in alone]
    for seed in range(4):
        feed(together, seed)
        feed(alone, seed)
        one.step()
        for optimizer in each:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_blocks_change_nothing(monkeypatch):
    from stepsmith.kernels import plain

    results = []
    for block in (plain.BLOCK, 5):
        monkeypatch.setattr(plain, "BLOCK", block)
        params = parameters(torch.float64)
        run(LearnedOptimizer(params, trained()), params, range(4))
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_reference_and_chunked_agree():
    results = []
    for backend in ("reference", "chunked"):
        params = parameters(torch.float64)
        run(LearnedOptimizer(params, trained(), backend=backend), params, range(6))
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_groups_have_their_own_lr_and_weight_decay():
    params, plain = parameters(torch.float64), parameters(torch.float64)
    groups = [{"params": params[:1], "lr": 0.5, "weight_decay": 0.1}, {"params": params[1:]}]
    optimizer = LearnedOptimizer(groups, trained(), lr=2.0)
    other = LearnedOptimizer(plain, trained())
    before = [p.detach().clone() for p in params]
    run(optimizer, params, [0])
    run(other, plain, [0])
    for i, (lr, decay) in enumerate([(0.5, 0.1), (2.0, 0.0), (2.0, 0.0)]):
        step = plain[i] - before[i]
        want = (1 - lr * decay) * before[i] + lr * step
        torch.testing.assert_close(params[i].detach(), want.detach(), rtol=1e-12, atol=1e-14)


def test_schedulers():
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    rates = []
    for seed in range(10):
        run(optimizer, params, [seed])
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[-1] == pytest.approx(0)
    frozen = [p.detach().clone() for p in params]
    run(optimizer, params, [3])
    assert equal(frozen, params)


def test_step_schedule_scales_each_step():
    """The same gradients give lr times the same step, whatever lr is."""
    params, plain = parameters(torch.float64), parameters(torch.float64)
    optimizer, other = LearnedOptimizer(params, trained()), LearnedOptimizer(plain, trained())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    for seed, lr in enumerate([1.0, 1.0, 0.1, 0.1, 0.01]):
        before = [[p.detach().clone() for p in own] for own in (params, plain)]
        run(optimizer, params, [seed])
        run(other, plain, [seed])
        schedule.step()
        for p, b, q, c in zip(params, before[0], plain, before[1], strict=True):
            torch.testing.assert_close(p - b, lr * (q - c), rtol=1e-9, atol=1e-14)


def test_closure():
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], trained())

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 3.0
    assert not torch.equal(param.detach(), torch.ones(3))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("through", ["memory", "file"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_round_trip_is_bitwise(dtype, used, through):
    params = parameters(dtype)
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, range(301, 306))
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(other_params, trained())
    if used:
        kept = [p.detach().clone() for p in other_params]
        run(other, other_params, [9])
        for p, k in zip(other_params, kept, strict=True):
            p.data.copy_(k)
    state = optimizer.state_dict()
    if through == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    assert tensors_equal(optimizer.state_dict()["state"], other.state_dict()["state"])
    run(optimizer, params, range(400, 404))
    run(other, other_params, range(400, 404))
    assert equal(params, other_params)
    assert tensors_equal(optimizer.state_dict()["state"], other.state_dict()["state"])


def other_weights():
    rule = trained()
    return replace(rule, weights={key: 1.01 * value for key, value in rule.weights.items()})


def other_scale():
    same = trained()
    return replace(same, rule=replace(same.rule, step_scale=same.rule.step_scale / 2))


def test_a_state_that_does_not_tell_its_rule_loads():
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, [1])
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["rule"]
    optimizer.load_state_dict(state)
    assert "rule" not in state["param_groups"][0]
    assert "rule" in optimizer.state_dict()["param_groups"][0]


def loaded(optimizer) -> tuple[list, LearnedOptimizer]:
    """Copies of an optimizer's parameters, and an optimizer of them with its state."""
    params = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    other = LearnedOptimizer(params, optimizer.trained)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return params, other


def test_units_are_remembered_where_the_first_step_reaches_others():
    """The parameters that had measured them have no gradient then."""
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params[:1], range(3))
    others, other = loaded(optimizer)
    for ps, own in ((params, optimizer), (others, other)):
        ps[0].grad = None
        run(own, ps[1:], [3, 4])
    assert torch.equal(params[1], others[1])
    assert float(other.state[others[1]]["measured"]) == 5
    assert tensors_equal(optimizer.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.parametrize("times", [1, 2])
def test_a_state_from_before_the_first_step(times):
    params, others = parameters(), parameters()
    optimizer = LearnedOptimizer(params, trained())
    state = optimizer.state_dict()
    other = LearnedOptimizer(others, trained())
    run(other, others, [5])
    for _ in range(times):
        other.load_state_dict(state)
    assert not other.state
    for param, value in zip(others, parameters(), strict=True):
        param.data.copy_(value.data)
    run(optimizer, params, range(2))
    run(other, others, range(2))
    assert equal(params, others)


def test_a_saved_state_brings_back_what_was_then():
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, range(2))
    state, weights = optimizer.state_dict(), [p.detach().clone() for p in params]
    for _ in range(2):
        run(optimizer, params, range(2, 5))
        want = [p.detach().clone() for p in params]
        optimizer.load_state_dict(state)
        for param, weight in zip(params, weights, strict=True):
            param.data.copy_(weight)
        run(optimizer, params, range(2, 5))
        assert equal(params, want)
        optimizer.load_state_dict(state)
        for param, weight in zip(params, weights, strict=True):
            param.data.copy_(weight)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "maximize", "rule"])
def test_options_that_a_state_lacks_are_those_of_the_optimizer(key):
    params = parameters()
    optimizer = LearnedOptimizer(params, trained(), lr=0.5, weight_decay=0.1, maximize=True)
    run(optimizer, params, [1])
    state = copy.deepcopy(optimizer.state_dict())
    want = state["param_groups"][0].pop(key)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0][key] == want
    run(optimizer, params, [2])


NUMBERS = [float, int, np.float32, np.float64, np.int64, np.array, torch.tensor]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.__name__)
def test_plain_numbers_in_a_state(number):
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, range(2))
    others, other = loaded(optimizer)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        for key in ("step", "measured"):
            entry[key] = number(float(entry[key]))
    other.load_state_dict(state)
    run(optimizer, params, [3])
    run(other, others, [3])
    assert equal(params, others)


DAMAGES = {
    "exp_avg": [float("nan"), float("inf")],
    "exp_avg_sq": [float("nan"), -1e-3, float("inf")],
    "step": [-1.0, float("nan"), float("inf"), 1.5],
    "h0": [float("nan"), -float("inf")],
    "first_norm": [float("nan"), float("inf"), -1.0],
    "running_norm": [float("nan"), -1.0],
    "first_size": [float("nan")],
    "measured": [float("nan"), -2.0],
}


@pytest.mark.parametrize(("key", "bad"), [(k, bad) for k, all_ in DAMAGES.items() for bad in all_])
def test_a_state_with_numbers_that_cannot_be_is_refused_whole(key, bad):
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, range(2))
    state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    damaged = copy.deepcopy(state)
    damaged["param_groups"][0]["lr"] = 0.25
    damaged["state"][1][key].reshape(-1)[-1:].fill_(bad)
    with pytest.raises(ValueError, match=rf"state of parameter 1: '{key}' should be .*; ") as info:
        optimizer.load_state_dict(damaged)
    assert "\n" not in str(info.value)
    assert tensors_equal(state["state"], optimizer.state_dict()["state"])
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert equal(params, weights)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3).int()), ValueError, "floating-point"),
        (lambda s: s["state"][0].update(h0=torch.ones(3, 8).bool()), ValueError, "floating-point"),
        (lambda s: s["state"][0].update(step=torch.tensor(True)), ValueError, "floating-point"),
        (lambda s: s["state"][0].update(step=1j), ValueError, r"'step' should have shape \(\)"),
        (lambda s: s["state"][0].update(exp_avg=[1.0] * 3), ValueError, "has a list"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3).cfloat()), ValueError, "floating-po"),
        (lambda s: s["state"].update({0: [1]}), ValueError, "is no dictionary"),
        (lambda s: s.update(state=[]), ValueError, "'state' of the state should be a dictionary"),
        (lambda s: s.pop("state"), ValueError, "the state lacks 'state'"),
        (lambda s: s.pop("param_groups"), ValueError, "the state lacks 'param_groups'"),
        (lambda s: s.update(param_groups={}), ValueError, "'param_groups' of the state should be"),
        (lambda s: s["param_groups"][0].pop("params"), ValueError, "'param_groups' of the state"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), ValueError, "lr must be finite"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), ValueError, "lr must be finite"),
        (lambda s: s["param_groups"][0].update(lr="1"), TypeError, "lr must be a number"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), ValueError, "number of param"),
        (lambda s: s["param_groups"][0]["params"].append(2), ValueError, "size of optimizer's"),
        (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "size of optimizer's"),
    ],
)  # fmt: skip
def test_a_state_of_another_form_is_refused_whole(change, kind, match):
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    change(state)
    with pytest.raises(kind, match=match):
        optimizer.load_state_dict(state)
    assert tensors_equal(before["state"], optimizer.state_dict()["state"])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    with pytest.raises(TypeError, match="takes a dictionary from state_dict"):
        optimizer.load_state_dict([state])


def test_a_rule_may_start_a_statistic_at_infinity():
    @dataclass(frozen=True)
    class Smallest(type(make_rule("sgd", lr=0.1))):
        def init_state(self, param_N):
            return {**super().init_state(param_N), "least": torch.full_like(param_N, torch.inf)}

        def update(self, grad_N, param_N, state):
            return -self.lr * grad_N, {**state, "least": torch.minimum(state["least"], grad_N)}

    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], Smallest())
    param.grad = torch.zeros(3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["least"].fill_(torch.inf)
    optimizer.load_state_dict(state)
    assert bool(optimizer.state[param]["least"].isinf().all())


def test_loading_does_not_share_memory():
    params, others = parameters(), parameters()
    optimizer, other = LearnedOptimizer(params, trained()), LearnedOptimizer(others, trained())
    run(optimizer, params, [1])
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.state[params[0]]["exp_avg"].clone()
    run(other, others, [2])
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], before)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: LearnedOptimizer(p, trained(inputs="raw")), "'exp_avg' .* has None"),
        (lambda p: LearnedOptimizer(p, trained(hidden=3)), r"'h0' .* has \(4, 3, 3\)"),
        (lambda p: torch.optim.Adam(p), "'h0' .* has None"),
        (lambda p: LearnedOptimizer([p[1], p[0], *p[2:]], trained()), r"has \(5,\)"),
        (lambda p: LearnedOptimizer(p[:2], trained()), "size of optimizer's group"),
        (lambda p: LearnedOptimizer(p, other_weights()), "saved with another rule"),
        (lambda p: LearnedOptimizer(p, other_scale()), "saved with another rule"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(make, match):
    params = parameters()
    source = make([nn.Parameter(p.detach().clone()) for p in params])
    run(source, source.param_groups[0]["params"], [1])
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, [1])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(source.state_dict())
    assert tensors_equal(before, optimizer.state_dict()["state"])


def test_replacing_one_tensor_of_the_state_is_seen():
    for key in ("exp_avg", "h0"):
        params, others = parameters(torch.float64), parameters(torch.float64)
        one, two = LearnedOptimizer(params, trained()), LearnedOptimizer(others, trained())
        run(one, params, [1])
        run(two, others, [1])
        zeros = torch.zeros_like(one.state[params[0]][key])
        one.state[params[0]][key] = zeros
        two.state[others[0]][key].copy_(zeros)
        run(one, params, [2])
        run(two, others, [2])
        assert equal(params, others)
        assert bool(one.state[params[0]][key].any())


def test_a_state_dropped_starts_afresh():
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, [1])
    del optimizer.state[params[0]]
    run(optimizer, params, [2])
    assert [int(optimizer.state[p]["step"]) for p in params[:2]] == [1, 2]


def test_load_hooks_may_change_the_state():
    params, others = parameters(), parameters()
    optimizer, other = LearnedOptimizer(params, trained()), LearnedOptimizer(others, trained())
    run(optimizer, params, [1])

    def doubled(optimizer, state):
        state = copy.deepcopy(state)
        state["state"][0]["exp_avg"] *= 2
        return state

    other.register_load_state_dict_pre_hook(doubled)
    other.load_state_dict(optimizer.state_dict())
    mean = optimizer.state[params[0]]["exp_avg"]
    assert torch.equal(other.state[others[0]]["exp_avg"], 2 * mean)


def test_load_hooks_still_run():
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, [1])
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post"))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append("step"))
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, [2])
    assert seen == ["post", "step"]


def test_copies_continue_alike():
    model = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.parameters(), trained())
    run(optimizer, list(model.parameters()), [1, 2])
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    run(optimizer, list(model.parameters()), [3, 4])
    run(twin_optimizer, list(twin.parameters()), [3, 4])
    assert equal(model.parameters(), twin.parameters())
    state = optimizer.state_dict()
    twin_optimizer.load_state_dict(state)
    assert tensors_equal(state["state"], twin_optimizer.state_dict()["state"])


def test_pickled_optimizers_continue_alike():
    params = parameters(torch.bfloat16)
    optimizer = LearnedOptimizer(params, trained(), lr=0.5, weight_decay=0.1, nonfinite="refuse")
    run(optimizer, params, [1, 2])
    twin = pickle.loads(pickle.dumps(optimizer))
    twins = twin.param_groups[0]["params"]
    run(optimizer, params, [3, 4])
    run(twin, twins, [3, 4])
    assert equal(params, twins)
    assert tensors_equal(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert twin.nonfinite == "refuse"


def test_state_is_plain_tensors_in_the_parameters_shape():
    params = parameters(torch.bfloat16)
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, [0])
    for param in params:
        if param.numel() == 0:
            assert not optimizer.state[param]
            continue
        state = optimizer.state[param]
        assert state["exp_avg"].shape == param.shape
        assert state["h0"].shape == (*param.shape, 8)
        assert float(state["step"]) == 1
        assert all(value.dtype == torch.float32 for value in state.values())


def test_parameters_without_gradients_wait():
    """Gradients that come late or with gaps: each parameter fares as if alone."""
    pattern = [[0], [0, 1], [0, 2], [1, 2], [0, 1, 2], [0, 1, 2]]
    together = [nn.Parameter(torch.ones(3) * (i + 1)) for i in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    rule = trained(scaling="absolute")
    one = LearnedOptimizer(together, rule)
    each = [LearnedOptimizer([p], rule) for p in alone]
    for seed, active in enumerate(pattern):
        for params in (together, alone):
            feed(params, seed)
            for i in range(3):
                if i not in active:
                    params[i].grad = None
        one.step()
        for optimizer in each:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert [int(one.state[p]["step"]) for p in together] == [5, 4, 4]


def test_groups_of_mixed_dtypes():
    params = [nn.Parameter(torch.ones(3, dtype=d)) for d in DTYPES]
    run(LearnedOptimizer(params, trained()), params, range(3))
    for param, dtype in zip(params, DTYPES, strict=True):
        assert param.dtype == dtype
        assert bool(param.isfinite().all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_parameters_on_several_devices():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="cuda"))]
    optimizer = LearnedOptimizer(params, trained())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(params[0], params[1].cpu())


def test_a_group_added_later():
    params, late = parameters(), parameters(seed=5)
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, [1])
    optimizer.add_param_group({"params": late, "lr": 0.1})
    run(optimizer, params + late, [2])
    assert float(optimizer.state[params[0]]["step"]) == 2
    assert float(optimizer.state[late[0]]["step"]) == 1


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.ones(2, dtype=torch.cfloat)]},
        {"params": [torch.ones(2)], "lr": float("nan")},
        {"params": [torch.ones(2)], "weight_decay": -1.0},
    ],
)
def test_a_refused_group_leaves_no_trace(group):
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    with pytest.raises(ValueError, match="LearnedOptimizer: "):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    run(optimizer, params, [1])


def test_compiled_models():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    inputs = torch.randn(8, 3)
    for model in (plain, compiled):
        optimizer = LearnedOptimizer(model.parameters(), trained())
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_grad_scaler_skips_a_step_without_advancing():
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], trained())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(value: float) -> None:
        optimizer.zero_grad()
        scaler.scale((param * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    kept, state = param.detach().clone(), optimizer.state[param]["exp_avg"].clone()
    step(float("inf"))
    assert torch.equal(param, kept)
    assert torch.equal(optimizer.state[param]["exp_avg"], state)
    assert optimizer.skipped_steps == 0  # the scaler never called us
    step(1.0)
    assert float(optimizer.state[param]["step"]) == 2


def test_gradient_accumulation_is_the_summed_batch():
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    first, second = LearnedOptimizer([one], trained()), LearnedOptimizer([two], trained())
    for value in (1.0, 2.0):
        (one * value).sum().backward()
    first.step()
    (two * 3.0).sum().backward()
    second.step()
    assert torch.equal(one, two)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], trained())
    run(optimizer, [param], [0])
    optimizer.zero_grad(set_to_none=to_none)
    assert (param.grad is None) == to_none
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == (1 if to_none else 2)


def test_maximize_is_minimising_the_negated_loss():
    up, down = parameters(torch.float64), parameters(torch.float64)
    one = LearnedOptimizer(up, trained(), maximize=True)
    two = LearnedOptimizer(down, trained())
    for seed in range(3):
        feed(up, seed)
        feed(down, seed)
        for param in down:
            param.grad.neg_()
        one.step()
        two.step()
    assert equal(up, down)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_gradients_skip_the_whole_step(bad):
    params = parameters()
    optimizer = LearnedOptimizer(params, trained())
    run(optimizer, params, [0])
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    feed(params, 1)
    params[1].grad[2] = bad
    with pytest.warns(RuntimeWarning, match="nan or infinite; the whole step is skipped"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once
    assert optimizer.skipped_steps == 2
    assert equal(before, params)
    assert tensors_equal(state["state"], optimizer.state_dict()["state"])


def test_nonfinite_gradients_can_be_refused_or_ignored():
    params = parameters()
    feed(params, 0)
    params[0].grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in params]
    with pytest.raises(FloatingPointError, match="refused and nothing changed"):
        LearnedOptimizer(params, trained(), nonfinite="refuse").step()
    assert equal(before, params)
    LearnedOptimizer(params, trained(), nonfinite="ignore").step()
    assert not equal(before, params)


def test_far_beyond_the_horizon_it_says_so_once():
    params = parameters()
    optimizer = LearnedOptimizer(params, trained(horizon=2))
    run(optimizer, params, range(20))  # ten times: silence, since warnings are errors here
    with pytest.warns(RuntimeWarning, match="21 steps, and rule 'toy' was meta-trained for 2"):
        run(optimizer, params, [20])
    run(optimizer, params, [21])


def test_a_coordinate_never_touched_does_not_move():
    param = nn.Parameter(torch.randn(6))
    start = param.detach().clone()
    optimizer = LearnedOptimizer([param], trained("l2o_dm"))
    for seed in range(5):
        feed([param], seed)
        param.grad[::2] = 0
        optimizer.step()
    assert torch.equal(param[::2], start[::2])
    assert not torch.equal(param[1::2], start[1::2])


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda p: LearnedOptimizer(p, trained(), lr=-1.0), ValueError, "lr must be finite"),
        (lambda p: LearnedOptimizer(p, trained(), lr=float("nan")), ValueError, "lr must"),
        (lambda p: LearnedOptimizer(p, trained(), weight_decay=-1), ValueError, "weight_decay"),
        (lambda p: LearnedOptimizer([], trained()), ValueError, "empty parameter list"),
        (lambda p: LearnedOptimizer(p, trained(), nonfinite="no"), ValueError, "skip, refuse"),
        (lambda p: LearnedOptimizer(p, trained(), backend="gpu"), ValueError, "unknown backend"),
        (lambda p: LearnedOptimizer(p, make_rule("joined")), ValueError, "meta-train it"),
        (lambda p: LearnedOptimizer(p, "mlp-mnits"), ValueError, "Did you mean 'mlp-mnist'"),
        (lambda p: LearnedOptimizer(p, "no/such.safetensors"), CheckpointError, "no such file"),
        (lambda p: LearnedOptimizer(p, 3), TypeError, "got int"),
        (lambda p: LearnedOptimizer([nn.Parameter(torch.ones(2, dtype=torch.cfloat))], trained()),
         ValueError, "complex"),
    ],
)  # fmt: skip
def test_bad_arguments(make, kind, match):
    with pytest.raises(kind, match=match):
        make(parameters())


@pytest.mark.parametrize("dense_first", [False, True])
def test_sparse_gradients_are_refused_before_anything_changes(dense_first):
    table = nn.Embedding(5, 3, sparse=True)
    dense = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([dense, *table.parameters()], trained())
    if dense_first:
        feed(table.parameters(), 0)
        optimizer.step()
        optimizer.zero_grad()
    (table(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))


def test_a_finite_gradient_whose_sum_overflows_is_no_reason_to_skip():
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 3e38)
    optimizer = LearnedOptimizer([param], trained(scaling="absolute"))
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert param.detach().any()


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float64])
def test_a_state_saved_in_another_dtype_is_cast(saved):
    params, others = parameters(torch.float32), parameters(torch.float32)
    first, second = LearnedOptimizer(params, trained()), LearnedOptimizer(others, trained())
    run(first, params, range(3))
    state = first.state_dict()
    for entry in state["state"].values():
        for key in entry:
            entry[key] = entry[key].to(saved)
    second.load_state_dict(state)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    run(first, params, range(3, 5))
    run(second, others, range(3, 5))
    for param, other in zip(params, others, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(other, param, rtol=0, atol=5e-3)
    kinds = {value.dtype for entry in second.state.values() for value in entry.values()}
    assert kinds == {torch.float32}


def test_a_carry_in_bfloat16():
    params, others = parameters(torch.float32), parameters(torch.float32)
    narrow = LearnedOptimizer(params, trained(), carry_dtype=torch.bfloat16)
    run(narrow, params, range(4))
    run(LearnedOptimizer(others, trained()), others, range(4))
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=5e-3)
        kinds = {key: value.dtype for key, value in narrow.state.get(param, {}).items()}
        if not kinds:  # an empty parameter has no state
            continue
        assert kinds["h0"] == kinds["c0"] == torch.bfloat16
        assert kinds["exp_avg"] == torch.float32
    again = LearnedOptimizer(params, trained(), carry_dtype=torch.bfloat16)
    again.load_state_dict(narrow.state_dict())
    for param, entry in narrow.state.items():
        for key, value in entry.items():
            assert value.dtype == again.state[param][key].dtype
            assert torch.equal(value, again.state[param][key])


def test_a_carry_in_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"carry_dtype must be torch.float32, torch.bfloat16"):
        LearnedOptimizer(parameters(torch.float32), trained(), carry_dtype=torch.float16)


def test_distributed_tensors_are_refused():
    distributed = pytest.importorskip("torch.distributed")
    tensors = pytest.importorskip("torch.distributed.tensor")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        param = torch.nn.Parameter(tensors.distribute_tensor(torch.ones(4), mesh))
        with pytest.raises(ValueError, match="distributed tensors"):
            LearnedOptimizer([param], "mlp-mnist")
    finally:
        distributed.destroy_process_group()
