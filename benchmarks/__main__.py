"""`make bench`: every benchmark's ratios in one table, each written to `benchmarks/results/`."""

from benchmarks import (
    carry_dtype,
    convnet,
    memory,
    meta_training,
    networks,
    replay,
    scaling,
    stacking,
    step,
    subspace,
)
from benchmarks.common import summary

for benchmark in (
    step, replay, meta_training, memory, stacking, networks, convnet, scaling, carry_dtype,
    subspace,
):  # fmt: skip
    benchmark.main()
summary()
