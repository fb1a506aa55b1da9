"""`make bench`: every benchmark, one table each."""

from benchmarks import memory, meta_training, stacking

for benchmark in (meta_training, memory, stacking):
    benchmark.main()
