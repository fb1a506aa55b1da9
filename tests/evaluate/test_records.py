"""Records on disk."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stepsmith.evaluate.records import SCHEMA, Key, Records
from stepsmith.evaluate.statistics import (
    penalised,
    reach,
    score,
    smoothed,
    stability,
    summarise,
)
from stepsmith.store import CheckpointError


def some() -> Records:
    records = Records()
    rng = np.random.default_rng(0)
    for optimizer in ("adam", "learned"):
        key = Key(task="toy", optimizer=optimizer, horizon=4, hyper_parameters='{"lr": 0.1}')
        records.add(key, "train_loss", rng.random((3, 4)), seeds=[5, 6, 7], steps=range(4))
        records.add(key, "test_loss", rng.random((3, 1)), seeds=[5, 6, 7], steps=[4], split="test")
    return records


def test_round_trip(tmp_path):
    records = some()
    records.blocks[0].values[1, 2] = np.nan
    records.save(tmp_path / "records.parquet")
    loaded = Records.load(tmp_path / "records.parquet")
    assert len(loaded.blocks) == len(records.blocks)
    for block in records.blocks:
        (found,) = [b for b in loaded.blocks if (b.key, b.metric) == (block.key, block.metric)]
        np.testing.assert_array_equal(found.values, block.values)
        np.testing.assert_array_equal(found.seeds, block.seeds)
        np.testing.assert_array_equal(found.steps, block.steps)
        assert found.split == block.split


def test_rows_have_the_schema(tmp_path):
    some().save(tmp_path / "records.parquet")
    table = pq.read_table(tmp_path / "records.parquet")
    assert table.column_names == SCHEMA.names
    assert table.num_rows == 2 * (3 * 4 + 3)


def test_select():
    assert [b.key.optimizer for b in some().select("train_loss", task="toy")] == ["adam", "learned"]
    assert not list(some().select("train_loss", optimizer="sgd"))


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Records.load(tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(CheckpointError, match="not a readable Parquet"):
        Records.load(tmp_path / "torn.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(CheckpointError, match="columns recipe, scale"):
        Records.load(tmp_path / "other.parquet")


def test_empty_records_save(tmp_path):
    Records().save(tmp_path / "records.parquet")
    assert Records.load(tmp_path / "records.parquet").blocks == []


def _backwards(array: np.ndarray) -> np.ndarray:
    return array[::-1, ::-1].copy()[::-1, ::-1]


def _every_other(array: np.ndarray) -> np.ndarray:
    wide = np.zeros((2 * array.shape[0], 3 * array.shape[1]))
    wide[::2, ::3] = array
    return wide[::2, ::3]


SOURCES = {
    "C order": np.ascontiguousarray,
    "Fortran's order": np.asfortranarray,
    "a transposed copy": lambda array: array.T.copy().T,
    "strided": _every_other,
    "seen backwards": _backwards,
    "big-endian": lambda array: array.astype(">f8"),
    "float32": lambda array: array.astype(np.float32),
    "lists": np.ndarray.tolist,
    "a torch tensor": lambda array: torch.from_numpy(array.T.copy()).T,
    "read-only": lambda array: np.frombuffer(array.tobytes()).reshape(array.shape),
}


def _measured(arrange, order: np.ndarray) -> Records:
    """Three optimizers' runs, laid out in memory by `arrange`, their seeds in an order."""
    rng, records = np.random.default_rng(3), Records()
    steps = 131
    for name, kind in (("adam", "baseline"), ("nag", "baseline"), ("mine", "learned")):
        key = Key(task="toy", optimizer=name, kind=kind, horizon=steps, tuned_for="mean,final")
        losses = np.exp(rng.normal(size=(len(order), steps)) - np.linspace(0, 2, steps))
        losses[:, 0] = 4.0
        losses[5] *= 20 if name == "nag" else 1
        accuracy = rng.random((len(order), 4))
        seeds = 5 + order
        records.add(key, "train_loss", arrange(losses[order]), seeds=seeds, steps=range(steps))
        records.add(key, "test_accuracy", arrange(accuracy[order]), seeds=seeds,
                    steps=[90, 100, 120, 131], split="test")  # fmt: skip
    return records


def _statistics(records: Records) -> list:
    blocks = [(b.seeds.tolist(), b.steps.tolist(), b.values.tolist()) for b in records.blocks]
    return [blocks, summarise(records), stability(records, "toy", "corrected")]


@pytest.mark.parametrize(
    ("source", "seeds", "order"),
    [
        # So few seeds are not resampled, which takes a second.
        *((source, 7, "ascending") for source in SOURCES), ("Fortran's order", 7, "descending"),
        ("strided", 7, "shuffled"), ("Fortran's order", 11, "shuffled"),
    ],
)  # fmt: skip
def test_statistics_do_not_depend_on_where_an_array_comes_from(source, seeds, order, tmp_path):
    ascending = np.arange(seeds)
    orders = {
        "ascending": ascending, "descending": ascending[::-1],
        "shuffled": np.random.default_rng(0).permutation(seeds),
    }  # fmt: skip
    exact = source != "float32"
    plain = _measured(lambda array: array if exact else array.astype("f4").astype("f8"), ascending)
    want = _statistics(plain)
    records = _measured(SOURCES[source], orders[order])
    assert _statistics(records) == want
    records.save(tmp_path / "records.parquet")
    assert _statistics(Records.load(tmp_path / "records.parquet")) == want


def test_scores_do_not_depend_on_the_layout_in_memory():
    losses = np.random.default_rng(1).random((13, 101))
    for arrange in (np.asfortranarray, _every_other, _backwards):
        other = arrange(losses)
        for criterion in ("mean", "final"):
            np.testing.assert_array_equal(score(other, criterion), score(losses, criterion))
        np.testing.assert_array_equal(penalised(other).mean(0), penalised(losses).mean(0))
        np.testing.assert_array_equal(smoothed(other, 7), smoothed(losses, 7))
        assert reach(other, 0.4) == reach(losses, 0.4)


def test_a_block_keeps_an_array_of_its_own():
    losses = np.ones((2, 3))
    records = Records()
    records.add(Key(), "train_loss", losses, seeds=[0, 1], steps=range(3))
    losses[:] = 7
    assert (records.blocks[0].values == 1).all()
    assert records.blocks[0].values.flags.c_contiguous


def test_an_axis_of_one_may_be_left_out():
    records = Records()
    records.add(Key(), "test_loss", np.arange(3.0), seeds=[0, 1, 2], steps=[9])
    records.add(Key(), "core_seconds", [2.5], seeds=[0], steps=[0])
    records.add(Key(), "train_loss", np.arange(4.0), seeds=[0], steps=range(4))
    assert [b.values.shape for b in records.blocks] == [(3, 1), (1, 1), (1, 4)]


@pytest.mark.parametrize(
    ("values", "seeds", "steps", "error", "match"),
    [
        (np.ones((3, 2)), [0, 1], range(3), ValueError, r"need values of shape \(2, 3\), got"),
        (np.ones((2, 2)), [4, 4], range(2), ValueError, "seeds must each be there once"),
        (np.ones((2, 2)), [0, 1], [5, 5], ValueError, "steps must each be there once"),
        (np.ones((1, 1)), [0], [2**31], ValueError, "steps must fit int32"),
        (np.ones((2, 1)), [0.0, 1.5], [0], TypeError, "seeds must be whole numbers"),
        (np.ones((2, 1)), [False, True], [0], TypeError, "seeds must be whole numbers"),
        (np.ones((1, 1)), [0], ["last"], TypeError, "steps must be whole numbers"),
        (np.array([["low"]]), [0], [0], TypeError, "real numbers"),
        (np.array([[1j]]), [0], [0], TypeError, "real numbers"),
    ],
)
def test_blocks_that_hold_no_measurements(values, seeds, steps, error, match):
    with pytest.raises(error, match=match):
        Records().add(Key(), "train_loss", values, seeds=seeds, steps=steps)
