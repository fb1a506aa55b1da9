"""Trust in a rule's steps: its bounds, what it makes of slopes, and every path that applies it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stepsmith import LearnedOptimizer, TrainedRule, load, make_rule
from stepsmith.evaluate.run import by_rule
from stepsmith.layout import Layout
from stepsmith.rules.trust import Held, Trust, usual_trust
from stepsmith.tasks import Task
from stepsmith.unroll import Copies, TrustedStepper, roll

BUNDLED = ("quadratic", "mlp-mnist", "mlp-mnist-1000", "convnet-mnist", "general-warmed")


def met(*params: torch.Tensor, trust: Trust | None = None, fresh: bool = True) -> Held:
    held = Held()
    held.meet(trust or Trust(), params, fresh=fresh)
    return held


def random(*shape: int, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_limit_is_where_the_product_of_changes_is_the_bound(scale):
    one, two = random(20, 30, scale=scale), random(8, 4, 3, scale=scale)
    limit = met(one, two, torch.ones(5) * scale).limit
    product = 1.0
    for param, rows, columns in ((one, 20, 30), (two, 8, 12)):
        usual = float(param.square().mean().sqrt()) * (rows**0.5 + columns**0.5)
        product *= 1 + limit * (rows * columns) ** 0.5 / usual
    assert product == pytest.approx(Trust().change, rel=1e-4)


def test_vectors_alone_are_bounded_by_their_own_size():
    held = met(torch.full((4,), 2.0))
    assert held.limit == pytest.approx(Trust().far * 2)
    assert held.notable == pytest.approx((Trust().notable - 1) * 2)


def test_what_starts_at_zero_is_bounded_as_pytorch_would_have_started_it():
    assert met(torch.zeros(10, 12)).careful == pytest.approx(
        met(torch.full((10, 12), 1 / 36**0.5)).careful, rel=1e-4
    )


@pytest.mark.parametrize("shape", [(64, 784), (10, 64), (16, 8, 3, 3), (300, 16)])
@pytest.mark.parametrize(
    "start", [nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_]
)
def test_a_random_start_is_home_and_a_trained_one_is_not(shape, start):
    torch.manual_seed(0)
    fresh = start(torch.empty(shape))
    assert met(fresh).foreign == 0
    direction = torch.outer(torch.randn(shape[0]), torch.randn(fresh[0].numel())).view(shape)
    trained = fresh + 1.5 * fresh.square().mean().sqrt() * direction
    held = met(trained)
    assert held.foreign == 1
    assert held.share == Trust().start
    # One that goes on has been met before.
    assert met(trained, fresh=False).foreign == 0


def test_a_first_step_beyond_the_limit_is_made_carefully():
    held = met(random(20, 30))
    size = 2 * held.limit
    factor = held.factor(Trust(), size, -1.0, 1.0, first=True)
    assert factor * size <= held.careful * (1 + 1e-9)
    assert held.foreign == 1


def test_a_later_step_beyond_the_limit_is_cut():
    held = met(random(20, 30))
    assert held.factor(Trust(), held.limit / 2, -1.0, 1.0) == 1
    assert held.factor(Trust(), 4 * held.limit, -1.0, 1.0) == pytest.approx(0.25)
    assert held.foreign == 0


def judged(slopes, *, size: float = 1.0, held: Held | None = None) -> tuple[Held, list[bool]]:
    held = held or Held(limit=10.0, careful=1.0, notable=0.1)
    told = []
    for slope in slopes:
        held.predicted, held.size = 1.0, size
        told.append(held.judge(Trust(), slope))
    return held, told


def test_a_step_that_overshot_tenfold_is_taken_back():
    assert judged([9.9])[1] == [False]
    held, told = judged([11.0])
    assert told == [True]
    assert held.share == pytest.approx(1 / 11)
    assert judged([math.inf])[0].share == Trust().start
    # A step too small to be noted is not why gradients grew.
    assert judged([11.0], size=0.01)[1] == [False]


def test_no_step_no_judgement():
    held = Held(limit=1.0)
    assert not held.judge(Trust(), 1e9)
    held, told = judged([math.nan])
    assert told == [False]
    assert held.slope == 0


def test_slopes_that_stay_up_shrink_the_steps_and_slopes_that_stay_down_let_them_grow():
    held, _ = judged([0.8] * 50)
    assert held.share < 0.2
    judged([-0.8] * 50, held=held)
    assert held.share == 1
    # Around zero, where a tuned optimizer is, nothing changes.
    held, _ = judged([0.3, -0.2] * 50)
    assert held.share == 1


def test_where_it_is_not_at_home_a_step_must_go_down_its_own_gradient():
    held = Held(limit=1.0, careful=1.0, foreign=1.0)
    assert held.factor(Trust(), 0.1, -0.5, 1.0) > 0
    assert held.factor(Trust(), 0.1, -0.05, 1.0) == 0
    assert held.factor(Trust(), 0.1, 0.5, 1.0) == 0
    assert Held(limit=1.0, careful=1.0).factor(Trust(), 0.1, 0.5, 1.0) == 1


@pytest.mark.parametrize(
    "values",
    [{"change": 0.5}, {"start": 0.0}, {"start": 2.0}, {"undershot": 0.1}, {"reject": math.nan},
     {"grow": 0.9}, {"decay": 1.5}, {"downhill": -1.0}],
)  # fmt: skip
def test_bounds_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match="Trust"):
        Trust(**values)


def test_what_is_trusted_by_default():
    for name in BUNDLED:
        trained = load(name)
        assert usual_trust(trained.rule, trained.manifest) is not None
    assert usual_trust(make_rule("adam", lr=0.1), {}) is None
    assert usual_trust(make_rule("rnnprop"), {}) is None  # coordinatewise, on shards too
    assert usual_trust(make_rule("rnnprop"), {"trust": {"change": 2.0}}) == Trust(change=2.0)
    with pytest.raises(ValueError, match="fields of Trust"):
        usual_trust(make_rule("rnnprop"), {"trust": {"chnage": 2.0}})


def leaping() -> TrainedRule:
    """A rule in relative units whose steps are ten times as bold as a bundled one's."""
    trained = load("mlp-mnist")
    weights = dict(trained.weights)
    return TrainedRule(make_rule("joined", step_scale=30.0), weights, {"name": "leaping"})


def valley(dtype=torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)
    return module, torch.randn(64, 8, dtype=dtype)


def feed(param: nn.Parameter, optimizer: LearnedOptimizer, grad: float) -> torch.Tensor:
    """A step of a gradient that is the same everywhere; returns how far it went."""
    before = param.detach().clone()
    param.grad = torch.full_like(param, grad)
    optimizer.step()
    return param.detach() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"lr": 0.5}, {"weight_decay": 1e-3}])
def test_a_leap_is_taken_back_and_counted(dtype, options):
    sign = -1 if options.get("maximize") else 1
    param = nn.Parameter(torch.full((6,), 0.1, dtype=dtype))
    optimizer = LearnedOptimizer([param], "mlp-mnist", **options)
    went = feed(param, optimizer, sign * 1.0)
    assert bool((went < 0).all())
    kept = {
        key: value.clone() for key, value in optimizer.state[param].items() if key != "last_step"
    }
    back = feed(param, optimizer, sign * -100.0)  # far beyond the valley
    torch.testing.assert_close(back, -went, rtol=0.02, atol=1e-3)
    assert optimizer.rejected_steps == 1
    assert optimizer.param_groups[0]["trust_share"] < 0.1
    # The rule has not seen the gradient beyond the valley.
    for key, value in kept.items():
        assert torch.equal(optimizer.state[param][key], value)
    assert not optimizer.state[param]["last_step"].any()
    # From where it was it goes on, with a smaller step.
    again = feed(param, optimizer, sign * 1.0)
    assert float(again.abs().max()) < 0.2 * float(went.abs().max())
    assert optimizer.rejected_steps == 1


def test_a_leap_of_one_group_takes_all_back():
    params = [nn.Parameter(torch.full((6,), 0.1)) for _ in range(3)]
    optimizer = LearnedOptimizer([{"params": [p]} for p in params], "mlp-mnist")
    starts = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.ones(6)
    optimizer.step()
    params[0].grad = torch.full((6,), -100.0)
    params[1].grad, params[2].grad = torch.zeros(6), None
    optimizer.step()
    for param, start in zip(params, starts, strict=True):
        torch.testing.assert_close(param.detach(), start)


def test_without_trust_steps_are_made_as_they_are():
    param = nn.Parameter(torch.full((6,), 0.1))
    optimizer = LearnedOptimizer([param], "mlp-mnist", trust=False)
    feed(param, optimizer, 1.0)
    feed(param, optimizer, -100.0)
    assert optimizer.rejected_steps == 0
    assert "last_step" not in optimizer.state[param]


def test_a_resumed_run_judges_the_step_before_it():
    param, again = (nn.Parameter(torch.full((6,), 0.1)) for _ in range(2))
    optimizer = LearnedOptimizer([param], "mlp-mnist")
    feed(param, optimizer, 1.0)
    resumed = LearnedOptimizer([again], "mlp-mnist")
    with torch.no_grad():
        again.copy_(param)
    resumed.load_state_dict(optimizer.state_dict())
    for grad in (-100.0, 1.0, 0.5):
        feed(param, optimizer, grad)
        feed(again, resumed, grad)
        assert torch.equal(param, again)
    assert resumed.rejected_steps == 1


def test_a_state_from_before_there_was_trust_goes_on():
    param = nn.Parameter(torch.full((6,), 0.1))
    optimizer = LearnedOptimizer([param], "mlp-mnist")
    feed(param, optimizer, 1.0)
    state = optimizer.state_dict()
    del state["state"][0]["last_step"]
    for key in [key for key in state["param_groups"][0] if key.startswith("trust_")]:
        del state["param_groups"][0][key]
    resumed = LearnedOptimizer([param], "mlp-mnist")
    resumed.load_state_dict(state)
    went = feed(param, resumed, 1.0)
    assert bool((went < 0).all())
    assert resumed.param_groups[0]["trust_foreign"] == 0


def test_deployment_trusts_as_evaluation_does():
    """The same starts, batches and gradients: the same steps, taken back at the same times."""
    _, x = valley()
    trained = leaping()
    task = Task.from_module(lambda: valley()[0], nn.functional.mse_loss, (x, x), batch_size=64)
    copies = Copies(task, [3, 4])
    start = copies.layout.views(copies.theta[0].clone())
    grads: list[torch.Tensor] = []
    stepper = by_rule(trained)(copies)
    roll(copies, stepper, 40, hook=lambda s: grads.append(s.grad_CP[0].clone()))
    params = {key: nn.Parameter(value.clone()) for key, value in start.items()}
    optimizer = LearnedOptimizer(params.values(), trained)
    for grad_P in grads:
        for key, grad in copies.layout.views(grad_P).items():
            params[key].grad = grad.clone()
        optimizer.step()
    after = copies.layout.flatten({key: value.detach() for key, value in params.items()})
    torch.testing.assert_close(after, copies.theta[0], rtol=1e-3, atol=1e-4)
    held = stepper.held[0]
    for name, value in vars(held).items():
        told = optimizer.param_groups[0][f"trust_{name}"]
        assert told == pytest.approx(value, rel=1e-2, abs=1e-3), name


@pytest.mark.parametrize("wrong", ["yes", 1, {"change": 2.0}])
def test_trust_of_another_kind_is_refused(wrong):
    with pytest.raises(TypeError, match="trust"):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], "mlp-mnist", trust=wrong)


def test_clipping_leaves_the_judgement_as_it_is():
    """Slopes are those before clipping, both of them."""
    torch.manual_seed(0)
    x, slopes = torch.randn(32, 10), []
    for largest in (1e9, 0.01):
        torch.manual_seed(1)
        module = nn.Linear(10, 3)
        optimizer = LearnedOptimizer(module.parameters(), "general-warmed")
        for _ in range(30):
            optimizer.zero_grad()
            (module(x) - x[:, :3]).square().mean().backward()
            optimizer.clip_grad_norm_(largest)
            optimizer.step()
            slopes.append(optimizer.param_groups[0]["trust_slope"])
        assert optimizer.rejected_steps == 0
    assert slopes[35] == pytest.approx(slopes[5], abs=0.3)


def test_what_was_clipped_is_forgotten_with_the_gradients():
    param = nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([param], "mlp-mnist")
    param.grad = torch.full((2,), 100.0)
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    assert optimizer._clipped == 1


def test_a_step_of_long_ago_is_not_taken_back():
    param = nn.Parameter(torch.full((6,), 0.1))
    states = [LearnedOptimizer([param], "mlp-mnist").state_dict()]
    for trust in (True, False, True):
        optimizer = LearnedOptimizer([param], "mlp-mnist", trust=trust)
        optimizer.load_state_dict(states[-1])
        if len(states) < 3:
            feed(param, optimizer, 1.0)
        states.append(optimizer.state_dict())
    feed(param, optimizer, -100.0)
    assert optimizer.rejected_steps == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("trust_share", math.nan), ("trust_share", 0.0), ("trust_share", "x"), ("trust_limit", -1.0),
     ("trust_predicted", math.inf), ("trust_share", 2.0)],
)  # fmt: skip
def test_a_saved_trust_that_cannot_be_is_refused(option, value):
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], "mlp-mnist")
    feed(param, optimizer, 1.0)
    state = optimizer.state_dict()
    state["param_groups"][0][option] = value
    with pytest.raises(ValueError, match=option):
        optimizer.load_state_dict(state)


def test_groups_that_come_later_share_the_trust():
    params = [nn.Parameter(torch.full((6,), 0.1)) for _ in range(3)]
    optimizer = LearnedOptimizer(params[:1], "mlp-mnist")
    feed(params[0], optimizer, 1.0)
    feed(params[0], optimizer, -100.0)
    share = optimizer.param_groups[0]["trust_share"]
    optimizer.add_param_group({"params": params[1:2]})
    optimizer.param_groups.reverse()
    optimizer.param_groups.insert(
        0, {"params": params[2:], "lr": 1.0, "weight_decay": 0.0, "maximize": False}
    )
    for param in params:
        param.grad = torch.ones(6)
    optimizer.step()
    assert optimizer.param_groups[0]["trust_share"] == pytest.approx(share, rel=0.3)


def test_a_cleared_state_starts_trust_afresh():
    param = nn.Parameter(torch.full((6,), 0.1))
    optimizer = LearnedOptimizer([param], "mlp-mnist")
    feed(param, optimizer, 1.0)
    feed(param, optimizer, -100.0)
    assert optimizer.param_groups[0]["trust_share"] < 1
    optimizer.state.clear()
    feed(param, optimizer, 1.0)
    assert optimizer.param_groups[0]["trust_share"] == 1


def test_a_manifest_with_another_trust_is_refused_when_the_rule_is_made():
    rule = make_rule("joined")
    weights = rule.init(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="fields of Trust"):
        TrainedRule(rule, weights, {"trust": {"chnage": 2.0}})


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_and_rejected_steps_agree_with_evaluation(decay):
    trained = load("mlp-mnist")
    param = nn.Parameter(torch.full((6,), 0.1))
    optimizer = LearnedOptimizer([param], trained, weight_decay=decay)
    theta = torch.full((1, 6), 0.1)
    stepper = TrustedStepper(
        trained.rule, trained.weights, theta, Layout(("p",), ((6,),)), weight_decay=decay,
        trust=Trust(),
    )  # fmt: skip
    for grad in (1.0, -100.0, 1.0, 0.5):
        feed(param, optimizer, grad)
        stepper(theta, torch.full((1, 6), grad))
        torch.testing.assert_close(param.detach(), theta[0], rtol=1e-4, atol=1e-6)
    assert optimizer.rejected_steps == 1
