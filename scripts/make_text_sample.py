"""Draw the sample of the E2E set that comes with the package.

    python scripts/make_text_sample.py --data-dir DIR

DIR holds the whole set as ``e2e/train*.parquet`` and ``e2e/test*.parquet``, with columns
``meaning_representation`` and ``human_reference``. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COUNTS = {"train": 4000, "test": 500}
SEED = 20170628
LIMIT = 2**20  # bytes a file
TARGET = Path(__file__).resolve().parents[1] / "src" / "stepsmith" / "data" / "text"
COLUMNS = ["meaning_representation", "human_reference"]


def draw(meanings: list[str], references: list[str], count: int, seed: int) -> np.ndarray:
    """Rows of a sample: `count` meanings, each once, with one of its references, none twice."""
    # RandomState, unlike default_rng, promises the same stream in every release of numpy.
    random = np.random.RandomState(seed)
    rows, seen = [], set()
    for row in random.permutation(len(meanings)):
        # As loaded, equal sentences are one: white space does not tell them apart.
        pair = {" ".join(text.split()) for text in (meanings[row], references[row])}
        if not pair & seen:
            seen |= pair
            rows.append(row)
    if len(rows) < count:
        raise ValueError(f"{count} distinct meanings wanted, {len(rows)} there")
    return np.array(rows[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the package's sample of the E2E set.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(COUNTS.items()):
        files = sorted((arguments.data_dir / "e2e").glob(f"{split}*.parquet"))
        if not files:
            parser.error(f"no {split}*.parquet in {arguments.data_dir / 'e2e'}")
        whole = pa.concat_tables([pq.ParquetFile(path).read(columns=COLUMNS) for path in files])
        index = draw(*(whole[name].to_pylist() for name in COLUMNS), count, SEED + number)
        small = whole.take(pa.array(index)).combine_chunks()
        small = small.append_column("index", pa.array(index, pa.int64()))
        target = arguments.out / f"e2e_{split}.parquet"
        pq.write_table(
            small.replace_schema_metadata(None),
            target,
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
        )
        size = target.stat().st_size
        if size >= LIMIT:
            raise RuntimeError(f"{target}: {size} bytes, the limit is {LIMIT}")
        print(f"{target.name}: {count} rows, {size} bytes")


if __name__ == "__main__":
    main()
