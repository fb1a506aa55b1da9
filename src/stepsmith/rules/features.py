"""Features a rule reads from gradients: functions, and the named sets built from them.

Shape letters: N = coordinates (any leading dimensions may stand before it), F = features.
Features are stacked along a new first dimension: (F, ..., N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stepsmith.rules.base import (
    State,
    require_choice,
    require_kind,
    require_number,
    set_checked,
)

LARGEST_GRADIENT = 1e18
"""Gradients are clamped to this magnitude: in float32 (1e30)^2 is inf, and a second moment that was
inf once never recovers."""

LARGEST_CUTOFF = 80.0
"""Of `log_sign`: float32 holds exp(p) up to here."""

_SMALLEST_SQUARE = 1e-36
"""Second moments below it count as this: nothing beside `eps`."""


def log_sign(grad_N: Tensor, p: float = 10.0) -> tuple[Tensor, Tensor]:
    """Split each gradient into a log-magnitude (even in g) and a sign (odd in g).

    Args:
        grad_N: (..., N) gradient, in loss units per parameter unit.
        p: cutoff, no unit; magnitudes below exp(-p) pass linearly.

    Returns:
        Two (..., N) tensors of `grad_N`'s dtype: log|g| / p and sign(g) where |g| >= exp(-p), else
        -1 and exp(p) * g.

    Raises:
        ValueError: `p` does not lie in (0, 80].
        TypeError: `p` is no number.

    Source: Andrychowicz et al. 2016, arXiv:1606.04474, appendix A.
    """
    if not (isinstance(p, int | float) and 0 < p <= LARGEST_CUTOFF):
        _require_cutoff("log_sign", p)
    # max(|g|, e^-p) makes the logarithm exactly -1 below the cutoff, and keeps log(0) out of it;
    # e^p g passes +-1 just where |g| passes e^-p, so that clamping it gives the sign beyond.
    log_N = grad_N.abs().clamp_min(math.exp(-p)).log().div(p).clamp_min(-1.0)
    sign_N = (grad_N * math.exp(p)).clamp(-1.0, 1.0)
    return log_N, sign_N


def _require_cutoff(owner: str, p: float) -> float:
    p = require_number(owner, "p", p)
    if not 0 < p <= LARGEST_CUTOFF:
        raise ValueError(
            f"{owner}: p must be > 0 and at most {LARGEST_CUTOFF:g} (the cutoff is exp(-p), and "
            f"exp(p) must fit float32), got {p!r}"
        )
    return p


@dataclass(frozen=True)
class Moments:
    """Adam's running moments, and the pair RNNprop reads from them.

    Source: Kingma & Ba 2015, arXiv:1412.6980; the pair m/sqrt(v), g/sqrt(v): Lv et al. 2017,
    arXiv:1703.03633, with the betas of SL2O (Chen et al., ECCV 2022, supplement).

    Raises:
        ValueError: a beta outside [0, 1), or an eps that is not finite and >= 0.
        TypeError: no numbers.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self):
        set_checked(
            self,
            beta1=require_number("Moments", "beta1", self.beta1, least=0, below=1),
            beta2=require_number("Moments", "beta2", self.beta2, least=0, below=1),
            eps=require_number("Moments", "eps", self.eps, least=0),
        )

    def init(self, param_N: Tensor) -> State:
        """Zero moments and a step count of zero."""
        zeros = torch.zeros_like(param_N)
        step = torch.zeros((), dtype=param_N.dtype, device=param_N.device)
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": step}

    def update(self, grad_N: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        """Advance the moments by one gradient.

        Returns:
            The bias-corrected mean, m~ = mean / (root + eps), g~ = g / (root + eps), new state.
        """
        step = state["step"] + 1
        mean_N = torch.lerp(state["exp_avg"], grad_N, 1 - self.beta1)
        square_N = state["exp_avg_sq"] * self.beta2
        square_N = torch.addcmul(square_N, grad_N, grad_N, value=1 - self.beta2)
        mean_hat_N = mean_N / (1 - self.beta1**step)
        # Not in place: the reference with second derivatives differentiates through here.
        # The root of zero has no derivative, which the exact meta-gradient asks for.
        root_N = (square_N / (1 - self.beta2**step)).clamp_min(_SMALLEST_SQUARE).sqrt()
        inverse_N = (root_N + self.eps).reciprocal()
        new = {"exp_avg": mean_N, "exp_avg_sq": square_N, "step": step}
        return mean_hat_N, mean_hat_N * inverse_N, grad_N * inverse_N, new


FEATURE_SETS = ("raw", "log_sign", "adam", "joined")
FRAMES = ("none", "hold", "momentum")


@dataclass(frozen=True)
class FeatureSet:
    """A named set of features, seen in a frame that decides what an untouched coordinate does.

    Args:
        name: `"raw"` (the gradient; 1 feature), `"log_sign"` (2), `"adam"` (m~ and g~; 2) or
            `"joined"` (m~, g~, log/sign of the gradient and of the momentum; 6).
        frame: `"none"`: as published; a coordinate whose gradient has always been zero still moves
            by the network's bias. `"hold"`: such coordinates are held still. `"momentum"`:
            features odd in the gradient are multiplied by the sign of the momentum and so is the
            step, so that step(-g) = -step(g) by construction, which also leaves untouched
            coordinates where they are and halves what has to be learned. Sets without moments take
            the sign of the gradient itself.

    Raises:
        ValueError: unknown name or frame, or a cutoff outside (0, 80].
        TypeError: an argument of another type.
    """

    name: str
    frame: str
    moments: Moments = Moments()
    p: float = 10.0

    def __post_init__(self):
        require_choice("FeatureSet", "name", self.name, FEATURE_SETS)
        require_choice("FeatureSet", "frame", self.frame, FRAMES)
        require_kind("FeatureSet", "moments", self.moments, Moments)
        set_checked(self, p=_require_cutoff("FeatureSet", self.p))

    @property
    def count(self) -> int:
        """Number of features, F."""
        return {"raw": 1, "log_sign": 2, "adam": 2, "joined": 6}[self.name]

    @property
    def has_moments(self) -> bool:
        """Whether the set keeps Adam's moments."""
        return self.name in ("adam", "joined")

    def init_state(self, param_N: Tensor) -> State:
        """Statistics before the first gradient."""
        if self.has_moments:
            return self.moments.init(param_N)
        step = torch.zeros((), dtype=param_N.dtype, device=param_N.device)
        if self.frame == "hold":
            return {"touched": torch.zeros_like(param_N), "step": step}
        return {"step": step}

    def __call__(self, grad_N: Tensor, state: State) -> tuple[Tensor, Tensor | None, State]:
        """Features (F, ..., N), the factor on the step or None, and the new statistics."""
        grad_N = grad_N.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT)
        if self.has_moments:
            mean_N, m_N, g_N, state = self.moments.update(grad_N, state)
            odd, even = [m_N, g_N], []
            if self.name == "joined":
                grad_log_N, grad_sign_N = log_sign(grad_N, self.p)
                mean_log_N, mean_sign_N = log_sign(mean_N, self.p)
                odd, even = [m_N, g_N, grad_sign_N, mean_sign_N], [grad_log_N, mean_log_N]
            direction_N, touched_N = mean_N, mean_N
        else:
            state = {**state, "step": state["step"] + 1}
            if self.name == "raw":
                odd, even = [grad_N], []
            else:
                log_N, sign_N = log_sign(grad_N, self.p)
                odd, even = [sign_N], [log_N]
            direction_N = grad_N
            touched_N = grad_N
            if self.frame == "hold":
                touched_N = torch.maximum(state["touched"], (grad_N != 0).to(grad_N.dtype))
                state["touched"] = touched_N
        if self.frame == "none":
            return torch.stack(odd + even), None, state
        if self.frame == "hold":
            return torch.stack(odd + even), (touched_N != 0).to(grad_N.dtype), state
        sign_N = direction_N.sign()
        return torch.stack([feature * sign_N for feature in odd] + even), sign_N, state
