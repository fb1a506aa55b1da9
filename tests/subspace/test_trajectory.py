"""Principal components of a run: against the singular value decomposition; every bad input."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tests.subspace.runs import flat, network, recorded, seeded
from tests.subspace.test_basis import dense
from torch import nn

from stepsmith import CheckpointError
from stepsmith.subspace import Snapshots, from_trajectory, per_layer

NAMES = [name for name, _ in network().named_parameters()]


def drawn(count: int, rank: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[dict]:
    """Snapshots in an affine space of this rank around random weights, directions of falling
    size."""
    generator = seeded(seed)
    start = {"w": (30, 7), "b": (7,), "scalar": ()}
    center = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in start.items()}
    moves = [
        {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in start.items()}
        for _ in range(rank)
    ]
    found = []
    for _ in range(count):
        weights = torch.randn(
            rank, generator=generator, dtype=torch.float64
        ) * 2.0 ** -torch.arange(rank)
        found.append(
            {
                k: (center[k] + sum(w * m[k] for w, m in zip(weights, moves, strict=True))).to(
                    dtype
                )
                for k in start
            }
        )
    return found


def matrix(states: list[dict]) -> torch.Tensor:
    return torch.stack([flat(state.values()) for state in states])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("block", [5, 2**18])
def test_components_are_the_singular_vectors(centred, block):
    states = drawn(9, 6)
    rows = matrix(states)
    made = from_trajectory(states, 4, centred=centred, block=block)
    _, values, vectors = torch.linalg.svd(rows - rows.mean(0) if centred else rows, False)
    cosines = (dense(made) * vectors[:4]).sum(1)
    torch.testing.assert_close(cosines.abs(), torch.ones(4, dtype=torch.float64))
    shares = (values**2 / (values**2).sum())[:4]
    torch.testing.assert_close(torch.tensor(made.explained, dtype=torch.float64), shares)
    assert made.deviation() < 1e-12
    assert torch.equal(made.origin, rows[0])
    # Signs: the last snapshot lies on the positive side of every direction.
    assert bool((made.coefficients(states[-1]) >= 0).all())
    assert made.info["centred"] is centred
    assert made.info["snapshots"] == 9


def test_all_of_the_trajectory_lies_in_the_subspace_of_full_rank():
    states = drawn(5, 4, torch.float32)
    made = from_trajectory(states, 4)
    for state in states:
        again = made.parameters(made.coefficients(state))
        torch.testing.assert_close(again, state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weak_directions_are_orthonormal_too(dtype):
    """Variances 1e12 apart: the last components are rounding's prey without a second look."""
    generator = seeded()
    base = torch.randn(4000, generator=generator, dtype=torch.float64)
    moves = torch.randn(6, 4000, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([1e3, 1e1, 1e-1, 1e-2, 1e-3, 0])
    states = [
        {"w": base + (sizes * torch.randn(6, generator=generator)).double() @ moves}
        for _ in range(9)
    ]
    made = from_trajectory(states, 5, dtype=dtype)
    assert made.blocks[0].dtype == dtype
    assert made.deviation() < (1e-6 if dtype == torch.float32 else 1e-3)


def test_files_folders_and_state_dicts_give_the_same(tmp_path):
    model = network()
    snapshots = recorded(tmp_path / "run", model)
    states = []
    for path in snapshots.paths():
        with torch.no_grad():
            from safetensors.torch import load_file

            states.append(load_file(path))
    one = from_trajectory(snapshots, 5)
    others = [
        from_trajectory(tmp_path / "run", 5),
        from_trajectory(str(tmp_path / "run"), 5),
        from_trajectory(snapshots.paths(), 5),
        from_trajectory(iter(states), 5, params=model),
        from_trajectory(states, 5, params=NAMES),
    ]
    for other in others:
        assert torch.equal(one.blocks[0], other.blocks[0])
        assert torch.equal(one.origin, other.origin)
    assert one.layout.names == tuple(NAMES)


def test_buffers_of_the_start_come_along(tmp_path):
    model = network()
    start = {name: value.clone() for name, value in model.named_buffers()}
    snapshots = recorded(tmp_path, model)
    with_model = from_trajectory(snapshots.paths(), 5, params=model)
    for made in (from_trajectory(snapshots, 5), with_model):
        assert made.buffers.keys() == start.keys()
        assert all(torch.equal(made.buffers[key], start[key]) for key in start)
    assert from_trajectory(snapshots, 5, params=NAMES[:2]).layout.names == tuple(NAMES[:2])


def test_another_origin(tmp_path):
    states = drawn(6, 4)
    made = from_trajectory(states[1:], 3, origin=states[0])
    assert torch.equal(made.origin, flat(states[0].values()))
    assert torch.equal(made.blocks[0], from_trajectory(states[1:], 3).blocks[0])


def test_per_layer_is_each_layers_own_trajectory(tmp_path):
    snapshots = recorded(tmp_path, network())
    whole = per_layer(snapshots, 3)
    assert [tuple(block.shape) for block in whole.blocks] == [(3, 35), (3, 10), (3, 18)]
    start = 0
    for prefix, block, shares in zip("013", whole.blocks, whole.info["explained"], strict=True):
        own = from_trajectory(snapshots, 3, params=[n for n in NAMES if n.startswith(prefix)])
        torch.testing.assert_close(block, own.blocks[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(shares, own.explained)
        start += block.shape[1]
    assert whole.dim == 9
    assert len(whole.explained) == 9


def test_per_layer_by_tensor_and_by_function(tmp_path):
    snapshots = recorded(tmp_path, network())
    match = r"all the same in 0.bias \(rank 0\).*bias before a normalisation never moves"
    with pytest.raises(ValueError, match=match):
        per_layer(snapshots, 2, by="tensor")
    tensors = per_layer(drawn(6, 3), 2, by="tensor")
    assert [tuple(block.shape) for block in tensors.blocks] == [(2, 210), (2, 7), (1, 1)]
    ends = per_layer(snapshots, 2, by=lambda name: name.rpartition(".")[2])
    assert ends.layout.names == tuple(sorted(NAMES, key=lambda n: n.endswith("bias")))
    assert [block.shape[1] for block in ends.blocks] == [50, 13]
    grads = {name: torch.randn_like(p) for name, p in network().named_parameters()}
    want = dense(ends) @ flat(grads[name] for name in ends.layout.names)
    torch.testing.assert_close(ends.project(grads), want)


def test_a_layer_that_did_not_move_is_named():
    states = drawn(5, 3)
    for state in states:
        state["b"] = states[0]["b"]
    with pytest.raises(ValueError, match=r"all the same in b \(rank 0"):
        per_layer(states, 2, by="tensor")


@pytest.mark.parametrize(("centred", "least"), [(True, 5), (False, 4)])
def test_too_few_checkpoints(centred, least):
    states = drawn(3, 3)
    match = f"3 checkpoints are too few for d = 4 directions, which need at least {least}"
    with pytest.raises(ValueError, match=match):
        from_trajectory(states, 4, centred=centred)
    with pytest.raises(ValueError, match="needs at least 2 checkpoints, got 1"):
        from_trajectory(states[:1], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identical_checkpoints(dtype):
    (state,) = drawn(1, 1, dtype)
    with pytest.raises(ValueError, match=r"checkpoints are all the same .*parameters$"):
        from_trajectory([{k: v.clone() for k, v in state.items()} for _ in range(6)], 2)
    with pytest.raises(ValueError, match=r"the same .* gives the live tensors: copy them"):
        from_trajectory([dict(state) for _ in range(6)], 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_more_directions_than_the_rank(dtype):
    states = drawn(9, 3, dtype)
    with pytest.raises(ValueError, match=r"span only 3 .*lower d to 3"):
        from_trajectory(states, 4)
    assert from_trajectory(states, 3).dim == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", [5, 2**18])
def test_a_checkpoint_that_is_not_finite_is_named(bad, block, tmp_path):
    states = drawn(5, 3)
    states[3]["b"][6] = bad
    with pytest.raises(ValueError, match=r"checkpoint 3 is not finite .*'b'"):
        from_trajectory(states, 2, block=block)
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint 3 \(.*3.safetensors\) is not finite"):
        from_trajectory(sorted(tmp_path.iterdir()), 2, block=block)
    good = drawn(5, 3)
    with pytest.raises(ValueError, match=r"the origin is not finite \(.* in 'b'\)"):
        from_trajectory(good, 2, origin=states[3])


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("centred", [True, False])
def test_directions_point_to_where_training_went(d, centred):
    for seed in range(8):  # about half of them would not by chance
        states = drawn(6, 3, seed=seed)
        made = from_trajectory(states, d, centred=centred)
        moved = made.coefficients(states[-1]) - made.coefficients(states[0])
        assert torch.all(moved >= 0)


def test_folders_without_snapshots(tmp_path):
    with pytest.raises(ValueError, match=r"typo: does not exist; pass the folder that Snapshots"):
        from_trajectory(tmp_path / "typo", 2)
    save_file(drawn(1, 1)[0], tmp_path / "epoch_01.safetensors")
    with pytest.raises(ValueError, match=r"holds no snapshot-\*.safetensors; .* a list of"):
        from_trajectory(str(tmp_path), 2)


def test_checkpoints_of_different_networks():
    states = drawn(4, 3)
    renamed = {("v" if key == "w" else key): value for key, value in states[0].items()}
    with pytest.raises(ValueError, match="checkpoint 4: has no tensor 'w'"):
        from_trajectory([*states, renamed], 2)
    with pytest.raises(ValueError, match="the origin: has no tensor 'w'"):
        from_trajectory(states, 2, origin=renamed)
    turned = {**states[0], "b": torch.zeros(8, dtype=torch.float64)}
    match = r"checkpoint 4: tensor 'b' has shape \(8,\) .* in the first checkpoint \(7,\)"
    with pytest.raises(ValueError, match=match):
        from_trajectory([*states, turned], 2)
    with pytest.raises(ValueError, match=r"checkpoint 0 has no tensor 'nothing'"):
        from_trajectory(states, 2, params=["w", "nothing"])


def test_order_within_a_checkpoint_does_not_matter():
    states = drawn(5, 4)
    turned = [states[0], *(dict(reversed(state.items())) for state in states[1:])]
    assert torch.equal(from_trajectory(states, 3).blocks[0], from_trajectory(turned, 3).blocks[0])


def test_state_dicts_with_buffers_need_to_say_what_is_a_parameter():
    states = [network(seed).state_dict() for seed in range(4)]
    with pytest.raises(ValueError, match=r"'1.running_mean' looks like a buffer.*params=model"):
        from_trajectory(states, 2)
    assert from_trajectory(states, 2, params=network()).layout.names == tuple(NAMES)


def test_tied_parameters_in_a_state_dict():
    states = []
    for _ in range(4):
        embed, head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        head.weight = embed.weight
        states.append(nn.ModuleDict({"embed": embed, "head": head}).state_dict())
    with pytest.raises(ValueError, match=r"'embed.weight' and 'head.weight' are one tied"):
        from_trajectory(states, 2)
    model = nn.ModuleDict({"embed": embed, "head": head})
    assert from_trajectory(states, 2, params=model).layout.names == ("embed.weight",)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].weight.requires_grad_(False)
    states = [network(seed).state_dict() for seed in range(4)]
    assert "0.weight" not in from_trajectory(states, 2, params=model).layout.names


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"d": 0}, ValueError, "d must be a whole number, at least 1, got 0"),
        ({"d": 2.0}, ValueError, "d must be a whole number, at least 1, got 2.0"),
        ({"block": 0}, ValueError, "block must be a whole number, at least 1"),
        ({"dtype": torch.int32}, ValueError, "dtype must be one of"),
    ],
)
def test_bad_arguments(arguments, kind, match):
    with pytest.raises(kind, match=match):
        from_trajectory(drawn(4, 3), **{"d": 2, **arguments})


def test_what_is_no_trajectory(tmp_path):
    with pytest.raises(TypeError, match="got one state dict"):
        from_trajectory(drawn(1, 1)[0], 1)
    with pytest.raises(TypeError, match="checkpoint 1: expected a state dict or the path"):
        from_trajectory([drawn(1, 1)[0], 3], 1)
    with pytest.raises(CheckpointError, match="no such file"):
        from_trajectory([tmp_path / "gone.safetensors"] * 3, 1)
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        from_trajectory([tmp_path / "file"] * 3, 1)
    with pytest.raises(ValueError, match="is a file; pass the folder"):
        from_trajectory(tmp_path / "file", 1)


def test_more_directions_than_numbers():
    states = [{"a": torch.randn(2, generator=seeded(seed))} for seed in range(9)]
    with pytest.raises(ValueError, match="d = 5 directions asked for, but the model has only 2"):
        from_trajectory(states, 5)
    assert per_layer(states, 5).dim == 2  # of a small layer, as many as it has


def test_what_a_checkpoint_holds_beside_tensors():
    states = [{"state_dict": state, "epoch": 1} for state in drawn(4, 3)]
    with pytest.raises(ValueError, match="'state_dict' is no tensor but dict; pass the state dict"):
        from_trajectory(states, 2)
    with pytest.raises(ValueError, match="'a' is no tensor but ndarray"):
        from_trajectory([{"a": torch.ones(2).numpy()}] * 3, 1)
    with pytest.raises(TypeError, match="tensors go by names, but one is called 0"):
        from_trajectory([{0: torch.ones(2)}] * 3, 1)
    # A module may have extra state, which is no parameter.
    extra = [{**network(seed).state_dict(), "0._extra_state": {"scale": 1}} for seed in range(4)]
    assert from_trajectory(extra, 2, params=network()).dim == 2


def test_what_says_no_names_of_parameters():
    states = [network(seed).state_dict() for seed in range(4)]
    for params, got in (
        (network().parameters(), "a Parameter among them"),
        (network().named_parameters(), "a tuple among them"),
        ("0.weight", "one text"),
    ):
        with pytest.raises(TypeError, match=f"params must be a model or the names.*got {got}"):
            from_trajectory(states, 2, params=params)


def test_a_gap_in_a_folder_of_snapshots(tmp_path):
    model = network()
    snapshots = Snapshots(tmp_path, model)
    for seed in range(5):
        model.load_state_dict(network(seed).state_dict())
        snapshots()
    paths = snapshots.paths()
    paths[2].unlink()
    with pytest.raises(ValueError, match="of the snapshots number 2 is missing; where that"):
        from_trajectory(tmp_path, 2)
    assert from_trajectory([*paths[:2], *paths[3:]], 2).dim == 2
    paths[0].unlink()
    paths[1].unlink()
    assert from_trajectory(tmp_path, 1).dim == 1


def test_per_layer_arguments():
    with pytest.raises(ValueError, match="by must be 'layer', 'tensor' or a function"):
        per_layer(drawn(4, 3), 2, by="module")
    with pytest.raises(ValueError, match="a trajectory needs none"):
        per_layer(drawn(4, 3), 2, generator=seeded())
    with pytest.raises(ValueError, match="belong to a trajectory"):
        per_layer(network(), 2, params=NAMES)
