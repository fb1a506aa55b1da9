"""theta = origin + P^T c: the formulas, one pass over P, files, and what does not fit."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tests.subspace.runs import BytesRead, flat, network, seeded
from torch import nn

from stepsmith import CheckpointError, store
from stepsmith.subspace import Subspace, per_layer, products, random
from stepsmith.subspace.layout import TypedLayout, members
from stepsmith.subspace.orthonormal import orthonormal

SIZE = 63


def dense(subspace: Subspace) -> torch.Tensor:
    """P as one matrix (d, N), float64."""
    return torch.block_diag(*[block.double() for block in subspace.blocks])


@pytest.fixture(params=["dense", "per layer"])
def subspace(request) -> Subspace:
    made = random if request.param == "dense" else per_layer
    return made(network(), 4, generator=seeded(1))


def test_project_is_p_g_and_lift_its_transpose(subspace):
    params = dict(network().named_parameters())
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    want = dense(subspace) @ flat(grads.values())
    torch.testing.assert_close(subspace.project(grads), want, rtol=1e-12, atol=1e-14)
    c = torch.randn(subspace.dim, dtype=torch.float64)
    lifted = subspace.lift(c)
    assert {k: v.shape for k, v in lifted.items()} == {k: p.shape for k, p in params.items()}
    torch.testing.assert_close(flat(lifted.values()), c @ dense(subspace), rtol=1e-12, atol=1e-14)
    theta = flat(subspace.parameters(c).values())
    torch.testing.assert_close(theta, flat(params.values()) + c @ dense(subspace))


def test_coefficients_are_found_again(subspace):
    model = network()
    c = torch.randn(subspace.dim, dtype=torch.float64)
    model.load_state_dict(subspace.parameters(c), strict=False)
    torch.testing.assert_close(subspace.coefficients(model), c)


def test_names_decide_not_their_order(subspace):
    grads = {name: torch.randn_like(p) for name, p in network().named_parameters()}
    turned = dict(reversed(grads.items()))
    assert torch.equal(subspace.project(grads), subspace.project(turned))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 2**18])
def test_every_byte_of_p_is_read_once(subspace, dtype, chunk, monkeypatch):
    monkeypatch.setitem(products.CHUNK, "cpu", chunk)
    blocks = tuple(block.to(dtype) for block in subspace.blocks)
    stored = dataclasses.replace(subspace, blocks=blocks)
    grads = {name: torch.randn_like(p) for name, p in network().named_parameters()}
    whole = sum(block.numel() * block.element_size() for block in blocks)
    with BytesRead(blocks) as read:
        stored.project(grads)
    assert read.count == whole
    c = torch.randn(stored.dim, dtype=torch.float64, requires_grad=True)
    with BytesRead(blocks) as read:
        lifted = stored.lift(c)
    assert read.count == whole
    with BytesRead(blocks) as read:
        torch.autograd.grad(lifted["0.weight"].sum(), c)
    assert read.count == whole


def test_a_bfloat16_basis_sums_in_float32():
    model = nn.Linear(100_000, 1)
    exact = random(model, 3, generator=seeded())
    half = dataclasses.replace(exact, blocks=tuple(b.bfloat16() for b in exact.blocks))
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    rounded = dense(half) @ flat(grads.values())
    assert half.project(grads).dtype == torch.float32
    torch.testing.assert_close(half.project(grads).double(), rounded, rtol=1e-4, atol=1e-5)
    c = torch.randn(3)
    lifted = flat(half.lift(c).values())
    torch.testing.assert_close(lifted, c.double() @ dense(half), rtol=1e-5, atol=1e-9)
    # Both products have the rounding of the rows, and no more: 2^-9 of each number.
    assert float((rounded - dense(exact) @ flat(grads.values())).abs().max()) < 3 * 2**-9


def test_a_basis_that_moves_keeps_what_it_was_hashed_to(subspace):
    hashed = subspace.fingerprint
    assert subspace.to("cpu") is subspace
    assert subspace.to("meta").fingerprint == hashed


def test_lift_is_differentiable_twice(subspace):
    c = torch.randn(subspace.dim, dtype=torch.float64, requires_grad=True)

    def energy(c):
        return sum((value**3).sum() for value in subspace.lift(c).values())

    assert torch.autograd.gradcheck(energy, c)
    assert torch.autograd.gradgradcheck(energy, c)


def test_stacked_copies_share_several_bases():
    bases = [random(network(), 4, generator=seeded(seed)).blocks for seed in range(3)]
    index = torch.tensor([2, 0, 2, 1, 0])
    c = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    lifted = torch.func.vmap(lambda c, k: products.lift(c, bases, k))(c, index)
    want = torch.stack([one @ bases[k][0] for one, k in zip(c, index.tolist(), strict=True)])
    torch.testing.assert_close(lifted, want)
    grads = [torch.autograd.grad((v**2).sum(), c)[0] for v in (lifted, want)]
    torch.testing.assert_close(*grads)
    with BytesRead([block for basis in bases for block in basis]) as read:
        torch.func.vmap(lambda c, k: products.lift(c, bases, k))(c, index)
    assert read.count == sum(basis[0].numel() * 8 for basis in bases)


def test_project_under_vmap():
    bases = [random(network(), 4, generator=seeded(seed)).blocks for seed in range(2)]
    g = torch.randn(3, SIZE, dtype=torch.float64)
    index = torch.tensor([1, 0, 1])
    got = torch.func.vmap(lambda g, k: products.project(g, bases, k))(g, index)
    want = torch.stack([bases[k][0] @ one for one, k in zip(g, index.tolist(), strict=True)])
    torch.testing.assert_close(got, want)
    shared = torch.func.vmap(lambda g: products.project(g, bases))(g)
    torch.testing.assert_close(shared, g @ bases[0][0].t())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_files_hold_everything(subspace, tmp_path, dtype):
    path = subspace.save(tmp_path / "basis", dtype=dtype)
    assert path.name == "basis.safetensors"
    assert Subspace.load(tmp_path / "basis").fingerprint == Subspace.load(path).fingerprint
    loaded = Subspace.load(path)
    for one, two in zip(subspace.blocks, loaded.blocks, strict=True):
        assert torch.equal(one.to(dtype or one.dtype), two)
    assert torch.equal(loaded.origin, subspace.origin)
    assert loaded.layout == subspace.layout
    assert loaded.buffers.keys() == subspace.buffers.keys() != set()
    assert all(torch.equal(loaded.buffers[key], subspace.buffers[key]) for key in loaded.buffers)
    assert loaded.info == subspace.info
    if dtype is None:
        assert loaded.fingerprint == subspace.fingerprint


def test_a_bfloat16_file_is_orthonormal_to_its_rounding(tmp_path):
    made = random(nn.Linear(20_000, 1), 5, generator=seeded())
    assert made.deviation() < 1e-6
    loaded = Subspace.load(made.save(tmp_path / "half", dtype=torch.bfloat16))
    assert loaded.deviation() < 1e-4
    assert loaded.dtype == torch.float32


def test_other_files_are_refused(tmp_path):
    rule = tmp_path / "rule.safetensors"
    store.write(rule, {"a": torch.ones(2)}, {"kind": "rule"})
    with pytest.raises(CheckpointError, match="holds a 'rule', not a 'subspace'"):
        Subspace.load(rule)
    store.write(rule, {"a": torch.ones(2)}, {"kind": "subspace"})
    with pytest.raises(CheckpointError, match="lacks or garbles 'layout'"):
        Subspace.load(rule)
    with pytest.raises(CheckpointError, match="no such file"):
        Subspace.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Subspace.load(tmp_path / "text.safetensors")


def test_a_dtype_for_no_basis(subspace, tmp_path):
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch.int8"):
        subspace.save(tmp_path / "basis", dtype=torch.int8)


def test_copies_share_the_basis(subspace):
    assert copy.deepcopy(subspace) is subspace
    moved = subspace.with_origin(network(seed=3))
    assert all(a is b for a, b in zip(moved.blocks, subspace.blocks, strict=True))
    assert torch.equal(moved.origin, flat(network(seed=3).parameters()))
    assert moved.fingerprint != subspace.fingerprint
    shifted = dataclasses.replace(subspace, origin=subspace.origin + 1)
    assert shifted.fingerprint not in (subspace.fingerprint, moved.fingerprint)


def test_wrong_numbers_of_coefficients(subspace):
    with pytest.raises(ValueError, match=rf"expected \({subspace.dim},\) coefficients, got \(2,\)"):
        subspace.lift(torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blocks": ()}, "matrices"),
        ({"blocks": (torch.zeros(2, 5, dtype=torch.float64),)}, "5 columns .* hold 63 numbers"),
        ({"origin": torch.zeros(4, dtype=torch.float64)}, "hold 63 numbers"),
        ({"origin": torch.zeros(63)}, "must be torch.float64, is torch.float32"),
        ({"blocks": (torch.zeros(2, 63, dtype=torch.int64),)}, "blocks must be one of"),
        ({"blocks": (torch.full((2, 63), float("nan")).double(),)}, "the basis is not finite"),
        (
            {"blocks": (torch.tensor([[float("inf"), -float("inf"), *[0.0] * 61]]).double(),)},
            "the basis is not finite",
        ),
        ({"origin": torch.full((63,), float("nan")).double()}, "not finite .* in '0.weight'"),
    ],
)
def test_parts_that_do_not_belong_together(change, match):
    whole = random(network(), 2)
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(whole, **change)


def test_another_start_brings_its_own_buffers(subspace):
    other = network(1)
    other[1].running_mean.fill_(3)
    moved = subspace.with_origin(other)
    assert torch.equal(moved.buffers["1.running_mean"], other[1].running_mean)
    elsewhere = subspace.to("meta").with_origin(other)
    assert {value.device.type for value in elsewhere.buffers.values()} == {"meta"}


def test_rows_that_depend_on_each_other_are_refused():
    rows = torch.ones(2, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="only 1 of 2 directions are independent"):
        orthonormal(lambda: iter([(0, slice(0, 7), rows)]), [(2, 7)], torch.float64)


def test_repr_says_what_it_is():
    assert repr(random(network(), 4)) == (
        "Subspace(random, 4 directions of 63 numbers in 6 tensors, float64)"
    )
    assert "3 blocks" in repr(per_layer(network(), 4))


def layout() -> TypedLayout:
    return random(network(), 2).layout


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight


def test_a_gradient_that_there_is_not_is_named():
    grads = {name: param.grad for name, param in network().named_parameters()}
    with pytest.raises(ValueError, match=r"tensor '0.weight' is None .* zeros for a gradient"):
        random(network(), 2).project(grads)


def test_members_are_found_by_name():
    model = network()
    pairs = list(reversed(list(model.named_parameters())))
    wrapped = (torch.compile(model, backend="eager"), nn.DataParallel(model))
    for form in (model, *wrapped, pairs, dict(pairs), iter(pairs)):
        found = members(layout(), form)
        assert all(a is b for a, b in zip(found, model.parameters(), strict=True))


def test_the_first_tensor_that_differs_is_named():
    other = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(
        ValueError, match=r"'3.weight' has shape \(3, 5\), that of the model \(2, 5"
    ):
        members(layout(), other)
    with pytest.raises(ValueError, match=r"'1.weight', of shape \(5,\), is not among the model"):
        members(layout(), nn.Sequential(nn.Linear(6, 5)))
    grown = network()
    grown.add_module("more", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'more.weight', of shape \(2, 2\), requires a gradient"):
        members(layout(), grown)


def test_frozen_parameters_belong_outside():
    model = network()
    model[3].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'3.bias' is frozen in the model"):
        members(layout(), model)
    assert len(members(random(model, 2).layout, model)) == 5


def test_tied_parameters_are_one():
    model = Tied()
    made = random(model, 2)
    assert made.layout.names == ("embed.weight",)
    assert members(made.layout, model) == [model.embed.weight]
    by_other_name = random({"head.weight": model.head.weight}, 2)
    assert members(by_other_name.layout, model) == [model.embed.weight]
    both = random({"embed.weight": torch.ones(4, 4), "head.weight": torch.ones(4, 4)}, 2)
    with pytest.raises(ValueError, match=r"'embed.weight' and 'head.weight' are one tied"):
        members(both.layout, model)


def test_parameters_need_names():
    with pytest.raises(TypeError, match=r"model.named_parameters\(\), not model.parameters\(\)"):
        members(layout(), network().parameters())


def test_layouts_of_nothing_or_of_integers():
    with pytest.raises(ValueError, match="no parameter to make a subspace of"):
        TypedLayout.of({})
    with pytest.raises(ValueError, match=r"'count' is torch.int64, not floating-point"):
        TypedLayout.of({"count": torch.zeros((), dtype=torch.int64)})
    with pytest.raises(ValueError, match="'a' is named twice"):
        TypedLayout(("a", "a"), ((1,), (1,)), (torch.float32, torch.float32))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(layout=None),
        lambda m: m.update(layout=[]),
        lambda m: m["layout"].update(names="abcd"),
        lambda m: m["layout"].update(names=[1, 2, 3, 4]),
        lambda m: m["layout"]["names"].pop(),
        lambda m: m["layout"]["shapes"].__setitem__(0, [-3, -3]),
        lambda m: m["layout"]["shapes"].__setitem__(0, [2**32, 2**32]),
        lambda m: m["layout"]["shapes"].__setitem__(0, [2**70]),
        lambda m: m["layout"]["shapes"].__setitem__(0, [0, 2**62, 2**62]),
        lambda m: m["layout"]["shapes"].__setitem__(0, [3.0, 3]),
        lambda m: m["layout"]["shapes"].__setitem__(0, "33"),
        lambda m: m["layout"]["shapes"].__setitem__(0, [10**9]),
        lambda m: m["layout"]["dtypes"].__setitem__(0, "load"),
        lambda m: m["layout"]["dtypes"].__setitem__(0, "int64"),
        lambda m: m["layout"]["dtypes"].__setitem__(0, 3),
        lambda m: m.update(info=[]),
        lambda m: m.update(info={"explained": 3}),
        lambda m: m.update(info={"explained": [3]}),
        lambda m: m.update(info={"explained": [["a"]]}),
        lambda m: m.update(info={"kind": ["a"]}),
        lambda m: m.pop("info"),
    ],
)
def test_what_a_file_says_is_held_against_what_it_holds(subspace, tmp_path, change):
    path = subspace.save(tmp_path / "basis")
    tensors, manifest = store.read(path, "subspace")
    change(manifest)
    store.write(path, tensors, manifest)
    with pytest.raises(CheckpointError) as caught:
        Subspace.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a\0b"], ids=["empty", "nul"])
def test_no_path(subspace, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for give in (subspace.save, Subspace.load):
        with pytest.raises(ValueError, match="is no path"):
            give(name)
    assert not list(tmp_path.iterdir())
