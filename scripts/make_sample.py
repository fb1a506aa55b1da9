"""Draw the sample of MNIST and Fashion-MNIST that comes with the package.

    python scripts/make_sample.py --data-dir DIR

DIR holds the whole sets as ``mnist/train*.parquet``, ``mnist/test*.parquet`` and the same under
``fashion_mnist/``, in their original order. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SETS = ("mnist", "fashion_mnist")
PER_CLASS = {"train": 1000, "test": 200}
SEED = 20160614
LIMIT = 6 * 2**20  # bytes a file
TARGET = Path(__file__).resolve().parents[1] / "src" / "stepsmith" / "data"


def draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows of a sample with `per_class` images of every class, in shuffled order."""
    # RandomState, unlike default_rng, promises the same stream in every release of numpy.
    random = np.random.RandomState(seed)
    rows = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < per_class:
            raise ValueError(f"class {label}: {per_class} images wanted, {len(of_class)} there")
        rows.append(random.choice(of_class, per_class, replace=False))
    return random.permutation(np.concatenate(rows))


def sample(table: pa.Table, per_class: int, seed: int) -> pa.Table:
    """The sample of `table`, with the column `index` and its entry in the features' metadata."""
    index = draw(table["label"].to_numpy(), per_class, seed)
    small = table.select(["image", "label"]).take(pa.array(index)).combine_chunks()
    meta = json.loads(table.schema.metadata[b"huggingface"])
    kept = {k: meta["info"]["features"][k] for k in ("image", "label")}
    kept["index"] = {"dtype": "int64", "_type": "Value"}
    small = small.append_column("index", pa.array(index, pa.int64()))
    return small.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": kept}}, sort_keys=True)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the package's sample of the image sets.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        for number, (split, per_class) in enumerate(PER_CLASS.items()):
            files = sorted((arguments.data_dir / name).glob(f"{split}*.parquet"))
            if not files:
                parser.error(f"no {split}*.parquet in {arguments.data_dir / name}")
            whole = pa.concat_tables([pq.ParquetFile(path).read() for path in files])
            target = arguments.out / f"{name}_{split}.parquet"
            pq.write_table(
                sample(whole, per_class, SEED + number),
                target,
                compression="zstd",
                compression_level=19,
                use_dictionary=False,
                row_group_size=2000,
            )
            size = target.stat().st_size
            if size >= LIMIT:
                raise RuntimeError(f"{target}: {size} bytes, the limit is {LIMIT}")
            print(f"{target.name}: {per_class} a class, {size} bytes")


if __name__ == "__main__":
    main()
