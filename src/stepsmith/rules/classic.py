"""Hand-designed optimizers as rules, equal to `torch.optim` to float64 rounding.

They check the wrapper and the engine, and serve as teachers. All the work stands in `features`,
which is never differentiated; the network is the identity.

Shape letters: N = coordinates of one tensor.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepsmith.rules.base import (
    Carry,
    Rule,
    State,
    Weights,
    require_flag,
    require_number,
    set_checked,
)


@dataclass(frozen=True)
class ClassicRule(Rule):
    """A rule with nothing to learn: subclasses write `update`.

    Raises:
        ValueError: a number that is not finite and >= 0, or a decay that is not below 1.
        TypeError: no number, or no bool where one belongs.
    """

    _decays: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that must lie in [0, 1)."""

    lr: float
    weight_decay: float

    def __post_init__(self):
        owner = type(self).__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("bool", bool):
                value = require_flag(owner, field.name, value)
            elif field.type in ("float", float):
                below = 1.0 if field.name in self._decays else None
                value = require_number(owner, field.name, value, least=0, below=below)
            set_checked(self, **{field.name: value})

    @property
    def learned(self) -> bool:
        """False: there are no weights."""
        return False

    @abstractmethod
    def update(self, grad_N: Tensor, param_N: Tensor, state: State) -> tuple[Tensor, State]:
        """The step to add, and the new statistics; `state["step"]` counts this update."""

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """No weights."""
        return {}

    def init_state(self, param_N: Tensor) -> State:
        """The step count alone; subclasses add their moments."""
        return {"step": torch.zeros((), dtype=param_N.dtype, device=param_N.device)}

    def init_carry(
        self, n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Carry:
        """No recurrent state."""
        return {}

    def features(
        self, grad_N: Tensor, param_N: Tensor, state: State, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None, State]:
        """The finished step as the only feature."""
        state = {**state, "step": state["step"] + 1}
        delta_N, state = self.update(grad_N, param_N, state)
        return delta_N[None], None, state

    def network(self, weights: Weights, features_FN: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """The identity."""
        return features_FN, carry

    def step(self, output_ON: Tensor, scale_N: Tensor | None) -> Tensor:
        """The only output."""
        return output_ON[0]

    def _decayed(self, grad_N: Tensor, param_N: Tensor) -> Tensor:
        """The gradient with the L2 penalty's added (coupled weight decay)."""
        return grad_N + self.weight_decay * param_N if self.weight_decay else grad_N


@dataclass(frozen=True)
class SGD(ClassicRule):
    """Gradient descent, with momentum, dampening and Nesterov's form (`torch.optim.SGD`).

    Args:
        lr: rate, parameter units squared per loss unit.
        momentum: decay of the velocity; 0 keeps none.
        dampening: share of later gradients kept out of the velocity.
        weight_decay: coupled L2 penalty.
        nesterov: look ahead along the velocity.

    Source: Sutskever et al. 2013 for the momentum forms, as `torch.optim.SGD` writes them.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError("SGD: nesterov needs momentum > 0 and dampening = 0")

    def init_state(self, param_N: Tensor) -> State:
        """The velocity, where there is momentum."""
        state = super().init_state(param_N)
        if self.momentum:
            state["momentum_buffer"] = torch.zeros_like(param_N)
        return state

    def update(self, grad_N: Tensor, param_N: Tensor, state: State) -> tuple[Tensor, State]:
        """-lr times the (looked-ahead) velocity."""
        grad_N = self._decayed(grad_N, param_N)
        if not self.momentum:
            return -self.lr * grad_N, state
        # The first velocity is the gradient itself, whatever the dampening.
        kept = 1 - self.dampening * (state["step"] > 1).to(grad_N.dtype)
        velocity_N = self.momentum * state["momentum_buffer"] + kept * grad_N
        ahead_N = grad_N + self.momentum * velocity_N if self.nesterov else velocity_N
        return -self.lr * ahead_N, {**state, "momentum_buffer": velocity_N}


@dataclass(frozen=True)
class Adam(ClassicRule):
    """Adam (`torch.optim.Adam`), and AdamW where `decoupled`.

    Args:
        lr: rate, parameter units per step.
        weight_decay: L2 penalty added to the gradient, or decoupled shrinkage by lr * weight_decay.
        beta1, beta2: decay of the moments.
        eps: added to the root.
        decoupled: AdamW's weight decay.

    Source: Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decoupled: bool = False

    _decays: ClassVar[tuple[str, ...]] = ("beta1", "beta2")

    def init_state(self, param_N: Tensor) -> State:
        """Both moments."""
        zeros = torch.zeros_like(param_N)
        return {**super().init_state(param_N), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def update(self, grad_N: Tensor, param_N: Tensor, state: State) -> tuple[Tensor, State]:
        """-lr * corrected mean / (corrected root + eps)."""
        if not self.decoupled:
            grad_N = self._decayed(grad_N, param_N)
        step = state["step"]
        mean_N = torch.lerp(state["exp_avg"], grad_N, 1 - self.beta1)
        square_N = self.beta2 * state["exp_avg_sq"] + (1 - self.beta2) * grad_N * grad_N
        root_N = (square_N / (1 - self.beta2**step)).sqrt() + self.eps
        delta_N = -self.lr * (mean_N / (1 - self.beta1**step)) / root_N
        if self.decoupled and self.weight_decay:
            # AdamW shrinks first; the step itself does not depend on the parameter.
            delta_N = delta_N - self.lr * self.weight_decay * param_N
        return delta_N, {**state, "exp_avg": mean_N, "exp_avg_sq": square_N}


@dataclass(frozen=True)
class RMSprop(ClassicRule):
    """RMSprop (`torch.optim.RMSprop`).

    Args:
        lr: rate.
        weight_decay: coupled L2 penalty.
        alpha: decay of the second moment.
        eps: added to the root.
        momentum: decay of the velocity of normalised gradients; 0 keeps none.
        centered: subtract the squared mean from the second moment.

    Source: Tieleman & Hinton 2012, lecture 6.5; centred form: Graves 2013, arXiv:1308.0850.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    _decays: ClassVar[tuple[str, ...]] = ("alpha",)

    def init_state(self, param_N: Tensor) -> State:
        """The second moment, and what momentum and centring need."""
        state = {**super().init_state(param_N), "square_avg": torch.zeros_like(param_N)}
        if self.momentum:
            state["momentum_buffer"] = torch.zeros_like(param_N)
        if self.centered:
            state["grad_avg"] = torch.zeros_like(param_N)
        return state

    def update(self, grad_N: Tensor, param_N: Tensor, state: State) -> tuple[Tensor, State]:
        """-lr * gradient / (root + eps), through the velocity where there is one."""
        grad_N = self._decayed(grad_N, param_N)
        square_N = self.alpha * state["square_avg"] + (1 - self.alpha) * grad_N * grad_N
        new = {**state, "square_avg": square_N}
        if self.centered:
            mean_N = torch.lerp(state["grad_avg"], grad_N, 1 - self.alpha)
            new["grad_avg"] = mean_N
            square_N = square_N - mean_N * mean_N
        normal_N = grad_N / (square_N.sqrt() + self.eps)
        if self.momentum:
            normal_N = self.momentum * state["momentum_buffer"] + normal_N
            new["momentum_buffer"] = normal_N
        return -self.lr * normal_N, new


@dataclass(frozen=True)
class Adagrad(ClassicRule):
    """Adagrad (`torch.optim.Adagrad`).

    Args:
        lr: rate.
        weight_decay: coupled L2 penalty.
        lr_decay: the rate at step t is lr / (1 + (t - 1) * lr_decay).
        initial_accumulator_value: where the sum of squares starts.
        eps: added to the root.

    Source: Duchi, Hazan & Singer 2011.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def init_state(self, param_N: Tensor) -> State:
        """The sum of squares."""
        total_N = torch.full_like(param_N, self.initial_accumulator_value)
        return {**super().init_state(param_N), "sum": total_N}

    def update(self, grad_N: Tensor, param_N: Tensor, state: State) -> tuple[Tensor, State]:
        """-lr_t * gradient / (root of the sum + eps)."""
        grad_N = self._decayed(grad_N, param_N)
        total_N = state["sum"] + grad_N * grad_N
        rate = self.lr / (1 + (state["step"] - 1) * self.lr_decay)
        return -rate * grad_N / (total_N.sqrt() + self.eps), {**state, "sum": total_N}


def sgd(lr: float = 1e-2, weight_decay: float = 0.0) -> SGD:
    """Plain gradient descent."""
    return SGD(lr, weight_decay)


def momentum(lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 0.0) -> SGD:
    """Gradient descent with heavy-ball momentum."""
    return SGD(lr, weight_decay, momentum)


def nesterov(lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 0.0) -> SGD:
    """Nesterov's accelerated gradient (NAG)."""
    return SGD(lr, weight_decay, momentum, nesterov=True)


def adamw(lr: float = 1e-3, weight_decay: float = 1e-2) -> Adam:
    """Adam with decoupled weight decay."""
    return Adam(lr, weight_decay, decoupled=True)
