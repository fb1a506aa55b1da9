"""Random scaling: a task whose parameters are measured in random units, drawn at every start."""

from __future__ import annotations

import torch
from torch import Tensor

from stepsmith.rules.base import require_choice
from stepsmith.tasks.base import Batch, Buffers, Metrics, Params, Task
from stepsmith.tasks.wrapped import WrappedTask

PER = ("tensor", "coordinate")

_PREFIX = "unit of "


class RandomlyScaled(WrappedTask):
    """f(c * x) in place of f(x), started from x_0 / c, with ln c uniform in [-spread, spread].

    The optimizee computes what it did, but good steps differ from one tensor (or coordinate) to the
    next by up to exp(4 * spread), those of plain gradient descent, or exp(2 * spread), those of
    Adam: a rule meta-trained on it cannot rely on one network's scales.

    Args:
        task: any.
        spread: of ln c, > 0.
        per: `"coordinate"`, as in the source, or `"tensor"`: one c for all of a tensor's numbers.

    Raises:
        ValueError: a spread that is not above zero, or an unknown choice.

    Source: Lv, Jiang & Li 2017, "Learning Gradient Descent: Better Generalization and Longer
    Horizons", arXiv:1703.03633, section 4.1, with spread 3.
    """

    def __init__(self, task: Task, spread: float = 3.0, per: str = "coordinate"):
        if not 0 < spread < 20:
            raise ValueError(f"RandomlyScaled: spread must lie in (0, 20), got {spread!r}")
        require_choice("RandomlyScaled", "per", per, PER)
        super().__init__(task)
        self.spread, self.per = spread, per
        self.name = f"{task.name}, scaled by {per} {spread:g}"

    def init(self, generator: torch.Generator) -> tuple[Params, Buffers]:
        """The task's start in fresh units, and the units as buffers."""
        params, buffers = self.task.init(generator)
        units = {name: self._unit(param, generator) for name, param in params.items()}
        return (
            {name: param / units[name] for name, param in params.items()},
            {**buffers, **{_PREFIX + name: unit for name, unit in units.items()}},
        )

    def _unit(self, param: Tensor, generator: torch.Generator) -> Tensor:
        shape = param.shape if self.per == "coordinate" else torch.Size()
        drawn = torch.rand(shape, generator=generator, device=generator.device)
        return ((2 * drawn - 1) * self.spread).exp().to(param)

    def loss(
        self,
        params: Params,
        buffers: Buffers,
        batch: Batch,
        generator: torch.Generator | None,
        train: bool,
    ) -> tuple[Tensor, Buffers, Metrics]:
        """The task's own, at c * x."""
        units = {key: value for key, value in buffers.items() if key.startswith(_PREFIX)}
        own = {key: value for key, value in buffers.items() if key not in units}
        real = {name: param * units[_PREFIX + name] for name, param in params.items()}
        loss, moved, metrics = self.task.loss(real, own, batch, generator, train)
        return loss, {**moved, **units}, metrics
