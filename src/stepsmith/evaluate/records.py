"""Records: every measurement of the library as a row of one fixed schema.

Statistics, tables, figures and reports read records and nothing else.

Shape letters: S = seeds, T = steps.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stepsmith.store import CheckpointError, write_bytes

SCHEMA = pa.schema(
    [
        (name, pa.dictionary(pa.int32(), pa.string()))
        for name in (
            "recipe", "scale", "protocol", "purpose", "task", "network", "data", "optimizer",
            "kind", "tuned_for", "rule", "meta_task", "checkpoint", "hyper_parameters",
        )
    ]
    + [("horizon", pa.int32())]
    + [("split", pa.dictionary(pa.int32(), pa.string()))]
    + [("metric", pa.dictionary(pa.int32(), pa.string()))]
    + [("seed", pa.int64()), ("step", pa.int32()), ("value", pa.float64())]
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What a block of measurements is about.

    Args:
        recipe, scale: the experiment, and `full`, `hundred`, `small` or `quick`.
        protocol: `corrected` or `as-published`.
        purpose: `tuning`, `test`, `cost` (seconds), `meta` (meta-training itself) or `spent` (what
            the measuring took).
        task, network, data: what was optimised.
        optimizer: name for tables.
        kind: `learned` or `baseline`.
        tuned_for: criteria a baseline's rate was tuned for, joined by commas.
        rule, meta_task, checkpoint: of a learned rule class, tasks of meta-training (commas between
            and no space), and weights' hash.
        hyper_parameters: JSON.
        horizon: T.
    """

    recipe: str = ""
    scale: str = ""
    protocol: str = "corrected"
    purpose: str = "test"
    task: str = ""
    network: str = ""
    data: str = ""
    optimizer: str = ""
    kind: str = "learned"
    tuned_for: str = ""
    rule: str = ""
    meta_task: str = ""
    checkpoint: str = ""
    hyper_parameters: str = "{}"
    horizon: int = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters, decoded."""
        return json.loads(self.hyper_parameters)


@dataclass(frozen=True)
class Block:
    """Values of one metric for some seeds at some steps.

    Args:
        key: what they are about.
        split: of the data: one of `stepsmith.tasks.base.SPLITS`, or empty.
        metric: `train_loss` (before each step), `final_loss` (its mean over the last tenth),
            `test_loss`, `test_accuracy`, `update_1`, ... (of single directions of a subspace),
            `seconds_per_step`, `gradient_seconds`, `core_seconds_per_step`, `subspace_seconds`
            (before each training), `meta_training_seconds`, `meta_training_core_seconds` (both as
            the rule's manifest says, and with `_here` as timed again beside the steps),
            `meta_training_subspace_seconds` (of a subspace that served meta-training alone),
            `parent_core_seconds` (the part spent on a rule it went on from, whose `checkpoint` the
            key has), `validation_score`, `core_seconds` (processor time of tuning and testing).
        seeds: (S,) int64, each once; kept in ascending order.
        steps: (T,) int32, each once; kept in ascending order.
        values: (S, T) float64.

    The arrays are copied into one layout, whatever they come in: sums depend on the layout of the
    memory in their last bits, and statistics may not depend on where an array comes from.

    Raises:
        ValueError: a seed or a step twice, or values of another shape.
        TypeError: seeds or steps that are not whole numbers, or values that are not real numbers.
    """

    key: Key
    split: str
    metric: str
    seeds: np.ndarray
    steps: np.ndarray
    values: np.ndarray

    def __post_init__(self):
        seeds, by_seed = _ascending(self.metric, "seeds", self.seeds, np.int64)
        steps, by_step = _ascending(self.metric, "steps", self.steps, np.int32)
        values = contiguous(self.values)
        if values.shape != (len(seeds), len(steps)):
            raise ValueError(
                f"Block: {self.metric}: {len(seeds)} seeds and {len(steps)} steps need values of "
                f"shape {(len(seeds), len(steps))}, got {values.shape}"
            )
        values = np.array(values[np.ix_(by_seed, by_step)], order="C")
        for name, array in (("seeds", seeds), ("steps", steps), ("values", values)):
            object.__setattr__(self, name, array)


def contiguous(values: Any) -> np.ndarray:
    """The numbers as float64 in C order, whose sums then depend on the numbers alone.

    Raises:
        TypeError: they are not real numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"records hold real numbers, got an array of {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float64).reshape(array.shape)


def _ascending(
    metric: str, what: str, numbers: np.ndarray, dtype: type[np.integer]
) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers in ascending order, and the places they came from."""
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"Block: {metric}: {what} must be whole numbers in one row, got {array.dtype} of shape "
            f"{array.shape}"
        )
    ordered, places = np.unique(array, return_index=True)
    if len(ordered) < len(array):
        raise ValueError(f"Block: {metric}: {what} must each be there once, got {array.tolist()}")
    limits = np.iinfo(dtype)
    if len(ordered) and not limits.min <= int(ordered[0]) <= int(ordered[-1]) <= limits.max:
        raise ValueError(
            f"Block: {metric}: {what} must fit {np.dtype(dtype)}, got up to {ordered[-1]}"
        )
    return ordered.astype(dtype), places


@dataclass
class Records:
    """Blocks of measurements, saved as one Parquet file of single rows."""

    blocks: list[Block] = field(default_factory=list)

    def add(
        self,
        key: Key,
        metric: str,
        values: Any,
        *,
        seeds: Sequence[int],
        steps: Sequence[int],
        split: str = "",
    ) -> None:
        """Add (S, T) values; an axis of length 1 may be left out.

        Raises:
            ValueError, TypeError: as `Block`.
        """
        array, shape = contiguous(values), (len(seeds), len(steps))
        if [n for n in array.shape if n != 1] == [n for n in shape if n != 1]:
            array = array.reshape(shape)
        self.blocks.append(Block(key, split, metric, np.asarray(seeds), np.asarray(steps), array))

    def extend(self, other: Records) -> None:
        """Add another's blocks."""
        self.blocks += other.blocks

    def select(self, metric: str | None = None, **wanted: Any) -> Iterator[Block]:
        """Blocks whose metric and key fields equal those given."""
        for block in self.blocks:
            if metric is not None and block.metric != metric:
                continue
            if all(getattr(block.key, name) == value for name, value in wanted.items()):
                yield block

    def table(self) -> pa.Table:
        """All measurements as rows of `SCHEMA`."""
        tables = []
        for block in self.blocks:
            seeds, steps = block.values.shape
            count = seeds * steps
            columns: dict[str, Any] = {}
            for name, value in [*asdict(block.key).items(), ("split", block.split)]:
                if name != "horizon":
                    indices = pa.array(np.zeros(count, np.int32))
                    columns[name] = pa.DictionaryArray.from_arrays(indices, [str(value)])
            columns["metric"] = pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(count, np.int32)), [block.metric]
            )
            columns["horizon"] = pa.array(np.full(count, block.key.horizon, np.int32))
            columns["seed"] = pa.array(np.repeat(block.seeds, steps))
            columns["step"] = pa.array(np.tile(block.steps, seeds))
            columns["value"] = pa.array(block.values.reshape(-1))
            tables.append(pa.table({f.name: columns[f.name] for f in SCHEMA}, schema=SCHEMA))
        if not tables:
            return SCHEMA.empty_table()
        return pa.concat_tables(tables).unify_dictionaries()

    def save(self, path: str | Path) -> None:
        """Write Parquet, atomically. Raises CheckpointError where the disk refuses."""
        sink = io.BytesIO()
        pq.write_table(
            self.table(),
            sink,
            compression="zstd",
            compression_level=9,
            write_page_checksum=True,
            use_dictionary=[name for name in SCHEMA.names if name != "value"],  # pyright: ignore[reportArgumentType]
            use_byte_stream_split=["value"],  # pyright: ignore[reportArgumentType]
        )
        write_bytes(Path(path), sink.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Records:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, corrupted or without the schema's columns.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: not a readable Parquet file ({first})") from None
        missing = [name for name in SCHEMA.names if name not in table.column_names]
        if missing:
            raise CheckpointError(f"{path}: no records; columns {', '.join(missing)} are missing")
        return cls(list(_blocks(table)))


def _blocks(table: pa.Table) -> Iterator[Block]:
    names = [f.name for f in fields(Key)] + ["split", "metric"]
    columns, codes = {}, []
    for name in names:
        values, inverse = np.unique(
            table[name].to_numpy(zero_copy_only=False).astype(str), return_inverse=True
        )
        columns[name] = values
        codes.append(inverse)
    stacked = np.stack(codes, axis=1)
    groups, first, inverse = np.unique(stacked, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    seeds, steps, values = (table[name].to_numpy() for name in ("seed", "step", "value"))
    for group in np.argsort(first):
        rows = np.flatnonzero(inverse == group)
        named = {
            name: str(columns[name][code]) for name, code in zip(names, groups[group], strict=True)
        }
        split, metric = named.pop("split"), named.pop("metric")
        key = Key(**{**named, "horizon": int(named["horizon"])})  # type: ignore[arg-type]
        own_seeds, seed_at = np.unique(seeds[rows], return_inverse=True)
        own_steps, step_at = np.unique(steps[rows], return_inverse=True)
        matrix = np.full((len(own_seeds), len(own_steps)), np.nan)
        matrix[seed_at, step_at] = values[rows]
        yield Block(key, split, metric, own_seeds, own_steps, matrix)
