"""`make bench`: every benchmark's ratios in one table, each written to `benchmarks/results/`."""

from benchmarks import carry_dtype, memory, meta_training, networks, replay, scaling, stacking, step
from benchmarks.common import summary

for benchmark in (step, replay, meta_training, memory, stacking, networks, scaling, carry_dtype):
    benchmark.main()
summary()
