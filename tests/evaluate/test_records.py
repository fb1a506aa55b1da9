"""Records on disk."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stepsmith.evaluate.records import SCHEMA, Key, Records
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
