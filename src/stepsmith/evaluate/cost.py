"""What a step costs: seconds of the gradient and of each optimizer, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stepsmith.rules.base import require_count, require_kind
from stepsmith.tasks.base import Task
from stepsmith.tasks.plain import require_graph, require_number

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class StepTime(NamedTuple):
    """Seconds of a training step.

    Attributes:
        whole: by the clock, gradient and optimizer.
        gradient: the part of `whole` before the optimizer's step.
        core: processor time of all threads; of a GPU's work only what the host spends on it.
    """

    whole: float
    gradient: float
    core: float


def seconds_per_step(
    task: Task,
    optimizers: Mapping[str, MakeOptimizer],
    *,
    rounds: int = 15,
    steps: int = 5,
    seed: int = 0,
) -> dict[str, list[StepTime]]:
    """Time whole training steps of one optimizee, as a user would run them.

    The optimizers take turns within each round, so that a slow moment of a shared machine hits all
    of them; compare medians, or ratios within rounds.

    Args:
        task: the optimizee; one copy, ordinary autograd.
        optimizers: name -> callable of parameters.
        rounds: timings of each, after one round of warming up.
        steps: training steps of a timing.
        seed: of the start and the batches.

    Returns:
        name -> `rounds` times of a step, each the mean of `steps`.

    Raises:
        ValueError: fewer than one round or step, or a seed below 0.
        TypeError: an argument of another type.
    """
    require_kind("seconds_per_step", "optimizers", optimizers, Mapping, "a callable by name")
    placed = {name: (task, make) for name, make in optimizers.items()}
    return seconds_in_turn(placed, rounds=rounds, steps=steps, seed=seed)


def seconds_in_turn(
    optimizers: Mapping[str, tuple[Task, MakeOptimizer]],
    *,
    rounds: int = 15,
    steps: int = 5,
    seed: int = 0,
) -> dict[str, list[StepTime]]:
    """`seconds_per_step` for optimizers each of which has a task of its own, such as a subspace's.

    Args:
        optimizers: name -> (the optimizee, callable of parameters).
        rounds, steps, seed: as there.

    Returns:
        As there.

    Raises:
        ValueError, TypeError: as there.
    """
    owner = "seconds_per_step"
    rounds, steps = require_count(owner, "rounds", rounds), require_count(owner, "steps", steps)
    seed = require_count(owner, "seed", seed, least=0)
    for name, (task, make) in optimizers.items():
        require_kind(owner, "task", task, Task, "stepsmith.make_task makes one of a name")
        require_kind(owner, f"optimizers[{name!r}]", make, Callable, "of parameters")
    trainers = {name: _Trainer(task, make, seed) for name, (task, make) in optimizers.items()}
    times: dict[str, list[StepTime]] = {name: [] for name in optimizers}
    for round_ in range(rounds + 1):
        for name, trainer in trainers.items():
            task = optimizers[name][0]
            gradient = step = 0.0
            begun_cores = time.process_time()
            for _ in range(steps):
                begun = _now(task)
                trainer.gradient()
                middle = _now(task)
                trainer.optimizer.step()
                gradient += middle - begun
                step += _now(task) - middle
            cores = time.process_time() - begun_cores
            if round_:
                times[name].append(
                    StepTime((gradient + step) / steps, gradient / steps, cores / steps)
                )
    return times


def _now(task: Task) -> float:
    if task.device.type == "cuda":
        torch.cuda.synchronize(task.device)
    return time.perf_counter()


class _Trainer:
    """An ordinary training loop."""

    def __init__(self, task: Task, make: MakeOptimizer, seed: int):
        self._task = task
        self._generator = torch.Generator().manual_seed(seed)
        params, self._buffers = task.init(self._generator)
        self._params = {key: torch.nn.Parameter(value) for key, value in params.items()}
        self.optimizer = make(self._params.values())

    def gradient(self) -> None:
        self.optimizer.zero_grad()
        batch = self._task.batch(self._generator, "train")
        params: dict[str, Tensor] = dict(self._params)
        loss, self._buffers, _ = self._task.loss(
            params, self._buffers, batch, self._generator, True
        )
        owner = type(self._task).__name__
        require_number(owner, loss)
        require_graph(owner, loss)
        self._buffers = {key: value.detach() for key, value in self._buffers.items()}
        loss.backward()
