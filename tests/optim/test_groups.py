"""State goes with its parameter, whatever is done to groups, parameters and `state` between steps.

The classic rules equal `torch.optim`'s to float64 rounding: what AdamW's relatives do is the truth.
"""

from __future__ import annotations

import copy
import io
import random
import subprocess
import sys
import warnings
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from stepsmith import LearnedOptimizer, make_rule

SHAPES = [(3,), (4, 2), (), (2, 3, 2), (1,), (5,)]
TWINS = {
    "adam": (make_rule("adam", lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "momentum": (make_rule("momentum", lr=0.01), lambda p: torch.optim.SGD(p, 0.01, 0.9)),
}
STATISTIC = {"adam": "exp_avg", "momentum": "momentum_buffer"}


class Pair:
    """The same parameters under a rule and under PyTorch's own, through the same changes."""

    def __init__(self, name: str, *sizes: int):
        rule, theirs = TWINS[name]
        self.twins: list[tuple[nn.Parameter, nn.Parameter]] = []
        groups = [[self.new() for _ in range(size)] for size in sizes]
        one, two = ([{"params": [p[k] for p in group]} for group in groups] for k in (0, 1))
        self.optimizers = LearnedOptimizer(one, rule), theirs(two)
        self.name = name

    def new(self) -> tuple[nn.Parameter, nn.Parameter]:
        seed = len(self.twins)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(SHAPES[seed % len(SHAPES)], generator=generator, dtype=torch.float64)
        self.twins.append((nn.Parameter(drawn), nn.Parameter(drawn.clone())))
        return self.twins[-1]

    def groups(self):
        return [optimizer.param_groups for optimizer in self.optimizers]

    def entries(self, place: int):
        """`state[p]` of the parameter at a place of the first group, twice."""
        return [o.state[o.param_groups[0]["params"][place]] for o in self.optimizers]

    def step(self, seed: int, share: float = 1.0) -> None:
        draw = random.Random(seed)
        for place, twins in enumerate(self.twins):
            generator = torch.Generator().manual_seed(1000 * seed + place)
            grad = torch.randn(twins[0].shape, generator=generator, dtype=torch.float64)
            if draw.random() < share:
                for param in twins:
                    param.grad = grad.clone()
            elif draw.random() < 0.7:  # else the old gradient stays
                for param in twins:
                    param.grad = None
        for optimizer in self.optimizers:
            optimizer.step()
        for one, two in self.twins:
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)

    def __call__(self, change: str, draw: random.Random) -> None:
        getattr(self, "_" + change)(draw)

    def _nothing(self, draw):
        pass

    def _reverse(self, draw):
        for groups in self.groups():
            groups.reverse()

    def _new_lists(self, draw):
        for groups in self.groups():
            for group in groups:
                group["params"] = list(group["params"])

    def _shuffle(self, draw):
        seed = draw.random()
        for groups in self.groups():
            random.Random(seed).shuffle(groups[0]["params"])

    def _swap(self, draw):
        for groups in self.groups():
            first, last = groups[0]["params"], groups[-1]["params"]
            if first and last:
                first[0], last[-1] = last[-1], first[0]

    def _move(self, draw):
        for groups in self.groups():
            if len(groups[0]["params"]) > 1:
                groups[-1]["params"].append(groups[0]["params"].pop(0))

    def _replace(self, draw):
        if self.groups()[0][0]["params"]:
            for groups, param in zip(self.groups(), self.new(), strict=True):
                groups[0]["params"][0] = param

    def _remove(self, draw):
        for groups in self.groups():
            del groups[0]["params"][:1]

    def _remove_group(self, draw):
        for groups in self.groups():
            if len(groups) > 1:
                del groups[0]

    def _come_back(self, draw):
        held = {id(p) for group in self.groups()[0] for p in group["params"]}
        left = [twins for twins in self.twins if id(twins[0]) not in held]
        if left:
            for groups, param in zip(self.groups(), draw.choice(left), strict=True):
                groups[-1]["params"].insert(0, param)

    def _add(self, draw):
        for optimizer, param in zip(self.optimizers, self.new(), strict=True):
            optimizer.add_param_group({"params": [param]})

    def _split(self, draw):
        for groups in self.groups():
            if len(groups[0]["params"]) > 1:
                groups.append({**groups[0], "params": [groups[0]["params"].pop()]})

    def _merge(self, draw):
        for groups in self.groups():
            if len(groups) > 1:
                groups[0]["params"] += groups.pop()["params"]

    def _delete_state(self, draw):
        seed = draw.random()
        for optimizer in self.optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if params:
                optimizer.state.pop(random.Random(seed).choice(params), None)

    def _clear_state(self, draw):
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def _copy_state(self, draw):
        for optimizer in self.optimizers:
            optimizer.state = defaultdict(dict, optimizer.state)

    def _write_state(self, draw):
        for entry in self.entries(0) if self.groups()[0][0]["params"] else ():
            if STATISTIC[self.name] in entry:
                entry[STATISTIC[self.name]].mul_(2)

    def _write_step(self, draw):
        for entry in self.entries(0) if self.groups()[0][0]["params"] else ():
            if self.name == "adam" and "step" in entry:
                entry["step"].add_(3)

    def _replace_state(self, draw):
        for entry in self.entries(-1) if self.groups()[0][0]["params"] else ():
            if STATISTIC[self.name] in entry:
                entry[STATISTIC[self.name]] = entry[STATISTIC[self.name]] + 1

    def _new_data(self, draw):
        one, two = draw.choice(self.twins)
        one.data = one.data.flip(0) if one.dim() else one.data + 1
        two.data = one.data.clone()

    def _rate(self, draw):
        for groups, rate in zip(self.groups(), (0.5, 0.005), strict=True):
            groups[-1]["lr"] = rate

    def _reload(self, draw):
        for optimizer in self.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for param in [p for p in optimizer.state if id(p) not in held]:
                del optimizer.state[param]  # PyTorch's own cannot save these
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [name[1:] for name in vars(Pair) if name.startswith("_") and not name.startswith("__")]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("change", CHANGES)
def test_state_goes_with_its_parameter(name, change):
    pair = Pair(name, 3, 2)
    for seed in range(8):
        pair.step(seed)
        if seed in (1, 3, 4):
            pair(change, random.Random(seed))


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("seed", range(6))
def test_state_goes_with_its_parameter_through_many_changes(name, seed):
    pair, draw = Pair(name, 3, 2), random.Random(seed)
    for turn in range(25):
        pair(draw.choice(CHANGES), draw)
        pair.step(100 * seed + turn, share=0.8)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def feed(params, seed: int = 0) -> None:
    for place, param in enumerate(params):
        generator = torch.Generator().manual_seed(10 * seed + place)
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(optimizer, params, seeds) -> None:
    for seed in seeds:
        feed(params, seed)
        optimizer.step()


@pytest.mark.parametrize("how", ["group", "list", "del"])
def test_what_left_the_groups_is_not_trained_and_counts_for_nothing(how):
    """Its stale gradient does not enter the units of those that stay."""
    params, others = parameters((3,), (4,)), parameters((3,), (4,))
    groups = [{"params": [p]} for p in params] if how == "group" else params
    optimizer = LearnedOptimizer(groups, "general-warmed")
    other = LearnedOptimizer(others, "general-warmed")
    run(optimizer, params, [1])
    run(other, others, [1])
    if how == "group":
        del optimizer.param_groups[0]
    elif how == "list":
        optimizer.param_groups[0]["params"] = params[1:]
    else:
        del optimizer.param_groups[0]["params"][0]
    before = params[0].detach().clone()
    params[0].grad.fill_(1e6)
    others[0].grad = None  # what AdamW makes of a frozen parameter
    for seed in range(2, 6):
        feed(params[1:], seed)
        feed(others[1:], seed)
        optimizer.step()
        other.step()
    assert torch.equal(params[0], before)
    # Sums over one bucket and over two are rounded in other places.
    torch.testing.assert_close(params[1], others[1])
    # Saved are those that are there.
    assert list(optimizer.state_dict()["state"]) == [0]
    # What is left of the other keeps no more than its own memory.
    assert optimizer.state[params[0]]["exp_avg"].untyped_storage().nbytes() == 3 * 4


def test_the_units_of_parameters_that_stay_are_kept():
    params = parameters((3,), (4,), (5,))
    optimizer = LearnedOptimizer([{"params": [p]} for p in params], "general-warmed")
    run(optimizer, params, range(3))
    first = float(optimizer.state[params[2]]["first_norm"])
    optimizer.param_groups.pop(0)
    optimizer.param_groups.reverse()
    run(optimizer, params, [3])
    assert float(optimizer.state[params[2]]["measured"]) == 4
    assert float(optimizer.state[params[2]]["first_norm"]) == first


def test_other_parameters_start_afresh():
    """Nothing of those before them is left, the units neither."""
    params, others, alone = (parameters((3,), (4,)) for _ in range(3))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, range(3))
    optimizer.param_groups[0]["params"] = others
    run(optimizer, others, range(5, 8))
    run(LearnedOptimizer(alone, "general-warmed"), alone, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(others, alone, strict=True))


@pytest.mark.parametrize("shape", [(1000,), (1,), (0,), (3, 1), (2,)])
@pytest.mark.parametrize("fed", [True, False])
def test_another_size_is_an_error_as_it_is_adamws(shape, fed):
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, [0])
    neighbour, state = params[1].detach().clone(), copy.deepcopy(optimizer.state[params[1]])
    params[0].data = torch.ones(shape)
    if fed:
        feed(params, 1)
    else:
        feed(params[1:], 1)
    with pytest.raises(RuntimeError, match=rf"has shape .*{shape[0]}"):
        optimizer.step()
    assert torch.equal(params[1], neighbour)
    assert all(torch.equal(value, optimizer.state[params[1]][key]) for key, value in state.items())
    params[0].data = torch.ones(3)
    run(optimizer, params, [2])
    assert float(optimizer.state[params[0]]["step"]) == 2
    params[0].data = torch.ones(7)
    del optimizer.state[params[0]]
    run(optimizer, params, [3])
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 3]


def test_after_an_error_all_goes_on_as_if_there_had_been_none():
    """Groups were changed in the same step in which a size was wrong."""
    params, others = parameters((3,), (4,), (5,)), parameters((3,), (4,), (5,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    other = LearnedOptimizer(others, "general-warmed")
    run(optimizer, params, range(2))
    run(other, others, range(2))
    kept = params[1].data
    for own, ps in ((optimizer, params), (other, others)):
        own.param_groups[0]["params"] = ps[1:]
        own.add_param_group({"params": ps[:1]})
    params[1].data = torch.ones(9)
    feed(params, 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="has shape"):
            optimizer.step()
    params[1].data = kept
    run(optimizer, params, range(3, 5))
    run(other, others, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    for param, twin in zip(params, others, strict=True):
        assert float(optimizer.state[param]["measured"]) == 4
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, other.state[twin][key]), key


def test_memory_is_not_written_out_of_bounds():
    """The process died: in a process of its own."""
    program = """
import torch
from stepsmith import LearnedOptimizer
a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
optimizer = LearnedOptimizer([a, b], "mlp-mnist", backend="native")
a.grad, b.grad = torch.ones(3), torch.ones(3)
optimizer.step()
for size in (1000, 1000000):
    a.data = torch.ones(size)
    a.grad = torch.ones(size)
    try:
        optimizer.step()
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert [line[:59] for line in done.stdout.splitlines()] == [
        "LearnedOptimizer: a parameter has shape (1000,), its state ",
        "LearnedOptimizer: a parameter has shape (1000000,), and its",
    ]


def test_a_parameter_without_a_gradient_may_have_any_size():
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, [0])
    params[0].data, params[0].grad = torch.ones(0), None
    run(optimizer, params[1:], [1, 2])
    optimizer.param_groups[0]["params"] = params[::-1]  # which makes the buckets anew
    run(optimizer, params[1:], [3])
    params[0].data = torch.ones(3)
    run(optimizer, params, [4])
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 5]


@pytest.mark.parametrize("known", [True, False])
def test_a_gradient_of_another_shape(known):
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    if known:
        run(optimizer, params, [0])
    feed(params, 1)
    before = [p.detach().clone() for p in params]
    params[1].grad.data = torch.ones(9)
    with pytest.raises(RuntimeError, match=r"gradient has shape \(9,\) .* call zero_grad\(\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_that_is_cast_goes_on(start, dtype):
    model = nn.Linear(4, 3).to(start)
    optimizer = LearnedOptimizer(model.parameters(), make_rule("adam", lr=0.01))
    run(optimizer, list(model.parameters()), range(2))
    entry = {key: value.clone() for key, value in optimizer.state[model.weight].items()}
    model.to(dtype)
    optimizer.zero_grad()
    optimizer.step()
    run(optimizer, list(model.parameters()), [2])
    want = torch.float64 if dtype == torch.float64 else torch.float32
    state = optimizer.state[model.weight]
    assert model.weight.dtype == dtype
    assert {value.dtype for value in state.values()} == {want}
    assert float(state["step"]) == 3
    mean = torch.lerp(entry["exp_avg"].to(want), model.weight.grad.to(want), 0.1)
    torch.testing.assert_close(state["exp_avg"], mean, rtol=1e-3, atol=1e-4)


def test_one_parameter_cast_leaves_its_neighbours_alone():
    params, others = parameters((3,), (4,), (5,)), parameters((3,), (4,), (5,))
    rule = make_rule("adam", lr=0.01)
    optimizer, other = LearnedOptimizer(params, rule), LearnedOptimizer(others, rule)
    for own, ps in ((optimizer, params), (other, others)):
        run(own, ps, range(2))
        if own is optimizer:
            ps[1].data = ps[1].data.double()
            ps[1].grad = None
        run(own, ps, range(2, 4))
    for one, two in zip(params, others, strict=True):
        torch.testing.assert_close(one, two.to(one.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["channels last", "transposed", "strided", "offset"])
def test_the_layout_of_data_and_gradients_does_not_matter(kind):
    plain = nn.Parameter(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))

    def laid(value):
        if kind == "channels last":
            return value.to(memory_format=torch.channels_last)
        if kind == "transposed":
            return value.transpose(0, 3).contiguous().transpose(0, 3)
        if kind == "strided":
            return torch.stack([value, value], -1)[..., 0]
        return torch.cat([value[:1], value])[1:]

    odd = nn.Parameter(laid(plain.detach().clone()))
    one, two = LearnedOptimizer([plain], "mlp-mnist"), LearnedOptimizer([odd], "mlp-mnist")
    for seed in range(3):
        feed([plain], seed)
        odd.grad = laid(plain.grad.clone())
        one.step()
        two.step()
        if seed == 1:
            odd.data = laid(odd.data.clone())
    assert torch.equal(plain, odd)


def test_stale_gradients_of_frozen_parameters_train_as_adamws_do():
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, [0])
    params[0].requires_grad_(False)
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 2
    params[0].grad = None
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 3]


def test_a_parameter_of_two_groups_is_refused():
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, [0])
    before = [p.detach().clone() for p in params]
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": params[:1]})
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is in groups 0 and 1"):
        run(optimizer, params, [1])
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_parameter_listed_twice_steps_twice_as_adams_does():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of duplicates
        pair = Pair("adam", 2)
        for groups in pair.groups():
            groups[0]["params"].append(groups[0]["params"][0])
        for seed in range(4):
            pair.step(seed)
            if seed == 2:
                pair("reload", random.Random(0))
    assert float(pair.entries(0)[0]["step"]) == 8


def test_complex_parameters_do_not_get_in_by_the_list():
    params = parameters((3,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.cfloat)))
    with pytest.raises(ValueError, match="complex parameters are not supported"):
        run(optimizer, params, [0])


def test_parameters_that_share_memory_all_move_it():
    one = nn.Parameter(torch.ones(3))
    two = nn.Parameter(one.data)
    optimizer = LearnedOptimizer([one, two], "mlp-mnist")
    run(optimizer, [one, two], range(2))
    assert torch.equal(one, two)
    assert [float(optimizer.state[p]["step"]) for p in (one, two)] == [2, 2]


def test_tied_parameters_are_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = LearnedOptimizer(model.parameters(), "mlp-mnist")
    model(torch.ones(2, 3)).square().mean().backward()
    optimizer.step()
    assert float(optimizer.state[model[0].weight]["step"]) == 1
    assert len(optimizer.state) == 3


def test_inference_mode():
    """Steps within and without it go as without it; parameters made in it step within it."""
    params, others = parameters((3,), (4,)), parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    for seed in range(4):
        feed(params, seed)
        with torch.inference_mode(seed % 2 == 0):
            optimizer.step()
    run(LearnedOptimizer(others, "general-warmed"), others, range(4))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    with torch.inference_mode():
        made = parameters((3,), (4,))
        run(LearnedOptimizer(made, "general-warmed"), made, range(4))
    assert all(torch.equal(a, b) for a, b in zip(made, others, strict=True))


@pytest.mark.parametrize("key", ["first_norm", "running_norm", "measured"])
@pytest.mark.parametrize("replaced", [True, False])
def test_what_is_written_into_the_units_counts(key, replaced):
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, range(2))
    loaded = copy.deepcopy(optimizer.state_dict())
    for param, entry in zip(params, loaded["state"].values(), strict=True):
        entry[key] *= 3
        if replaced:
            optimizer.state[param][key] = optimizer.state[param][key] * 3
        else:
            optimizer.state[param][key].mul_(3)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = LearnedOptimizer(others, "general-warmed")
    other.load_state_dict(loaded)
    run(optimizer, params, [2])
    run(other, others, [2])
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert torch.equal(optimizer.state[params[0]][key], other.state[others[0]][key])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda entry: entry.pop("exp_avg"), r"'exp_avg' should have shape \(3,\), has None"),
        (lambda entry: entry.update(h0=torch.ones(3)), r"'h0' should have shape \(3, 8\), has"),
        (lambda entry: entry.update(exp_avg=1.0), r"'exp_avg' should have shape \(3,\), has a fl"),
        (lambda entry: entry.update(exp_avg=torch.ones(3).int()), "should hold floating-point"),
        (lambda entry: entry.update(step=torch.ones(2)), r"'step' should have shape \(\), has"),
    ],
)
def test_a_state_that_no_longer_fits_is_said_and_nothing_moves(change, match):
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, [0])
    before = [p.detach().clone() for p in params]
    change(optimizer.state[params[0]])
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    del optimizer.state[params[0]]
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 2]


def test_state_may_be_a_plain_dictionary_and_hold_what_is_not_ours():
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    optimizer.state = {params[1]: {"note": "mine"}}
    run(optimizer, params, range(2))
    held = optimizer.state[params[1]]["exp_avg"]
    optimizer.state[params[1]]["note"] = "other"
    run(optimizer, params, [2])
    assert optimizer.state[params[1]]["exp_avg"] is held  # nothing was made anew for a note
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, [3])
    assert optimizer.state[params[1]]["note"] == "other"
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 4]


def test_a_plain_number_may_be_set_for_the_step():
    params = parameters((3,), (4,))
    optimizer = LearnedOptimizer(params, "general-warmed")
    run(optimizer, params, [0])
    optimizer.state[params[0]]["step"] = 7
    run(optimizer, params, [1])
    assert [float(optimizer.state[p]["step"]) for p in params] == [8, 2]


@pytest.mark.parametrize("rule", ["mlp-mnist", "quadratic", "general-warmed"])
def test_saved_tensors_are_contiguous_and_share_no_memory(rule):
    params = parameters((100, 100), (3,), (2, 3, 4))
    optimizer = LearnedOptimizer(params, rule)
    run(optimizer, params, [0])
    state = optimizer.state_dict()["state"]
    flat = {f"{key}.{name}": v for key, entry in state.items() for name, v in entry.items()}
    assert load_tensors(save_tensors(flat)).keys() == flat.keys()
    file = io.BytesIO()
    torch.save(state[1], file)
    assert file.tell() < 10_000
    before = flat["1.exp_avg"].clone()
    run(optimizer, params, [1])
    assert torch.equal(flat["1.exp_avg"], before)  # a snapshot
