"""`make bench`: every benchmark's ratios in one table, each written to `benchmarks/results/`."""

from benchmarks import carry_dtype, memory, meta_training, replay, scaling, stacking, step, subspace
from benchmarks.common import summary

for benchmark in (step, replay, meta_training, memory, stacking, scaling, carry_dtype, subspace):
    benchmark.main()
summary()
