"""The LSTM rules compiled for the CPU by numba, in float32: one pass over memory a step.

Numba is optional (the extra `fast`); importing this package without it fails. What it
compiles is cached on disk where there is a place to write.

- `tiles.py`: products of small matrices, at the speed of the machine's multiply-adds;
- `maths.py`: tanh, sigmoid and logarithm as vector instructions, memory, entry points;
- `features.py`: the feature sets; `step.py`: a whole step; `replay.py`: forward and backward;
- `team.py`: running one compiled function on all of torch's threads.
"""

from stepsmith.kernels.native.features import sample_features
from stepsmith.kernels.native.replay import replay
from stepsmith.kernels.native.step import NativeAdvance

__all__ = ["NativeAdvance", "replay", "sample_features"]
