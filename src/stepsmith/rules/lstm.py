"""The coordinatewise LSTM that the published rules share.

Shape letters: N = coordinates, F = features, H = hidden units of a layer, O = outputs.

Weights: `lstm{l}.weight` (4H, inputs + H) acts on [inputs; hidden], gates in the order input,
forget, output, candidate; `lstm{l}.bias` (4H,); `head.weight` (1, H); `head.bias` (1,).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from stepsmith.rules.base import (
    Carry,
    Rule,
    State,
    Weights,
    require_choice,
    require_count,
    require_flag,
    require_number,
    set_checked,
)
from stepsmith.rules.features import FeatureSet, Moments
from stepsmith.rules.units import RelativeUnits

UNITS: dict[str, RelativeUnits | None] = {
    "absolute": None, "relative": RelativeUnits(), "warmed": RelativeUnits(warmup=5),
}  # fmt: skip
"""What the choices of `scaling` stand for."""

MOST_HIDDEN, MOST_LAYERS = 2**16, 1000
"""Beyond these no machine holds the weights, and to draw them would take for ever."""


@dataclass(frozen=True)
class LSTMRule(Rule):
    """Stacked LSTM cells over each coordinate's features, a linear head, a scaled step.

    Args:
        hidden: H, units of each layer.
        layers: number of LSTM layers.
        inputs: feature set: `raw`, `log_sign`, `adam` or `joined`.
        output: `linear` or `tanh`, which bounds every step by `step_scale`.
        step_scale: factor on the step, parameter units.
        frame: what an untouched coordinate does: `none`, `hold` or `momentum` (`FeatureSet`).
        bias: whether the head has one.
        start: value the head's bias starts from; with a bounded, sign-framed step the fresh rule
            is then sign descent along the momentum, a sane place to begin meta-training.
        beta1, beta2: decay of the moments, where the feature set keeps them.
        scaling: `absolute`; `relative`: gradients and steps in `RelativeUnits`, and `step_scale`
            in units of the loss; or `warmed`: the same, with a warm-up of five steps.

    Raises:
        ValueError: a size below 1, a scale not positive, a decay outside [0, 1), an unknown choice.
        TypeError: an argument of another type.
    """

    reads_param: ClassVar[bool] = False

    hidden: int = 8
    layers: int = 1
    inputs: str = "joined"
    output: str = "tanh"
    step_scale: float = 0.1
    frame: str = "momentum"
    bias: bool = True
    start: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    scaling: str = "absolute"

    def __post_init__(self):
        owner = "LSTMRule"
        moments = Moments(self.beta1, self.beta2)
        set_checked(
            self,
            hidden=require_count(owner, "hidden", self.hidden, most=MOST_HIDDEN),
            layers=require_count(owner, "layers", self.layers, most=MOST_LAYERS),
            step_scale=require_number(owner, "step_scale", self.step_scale, above=0),
            bias=require_flag(owner, "bias", self.bias),
            start=require_number(owner, "start", self.start),
            beta1=moments.beta1, beta2=moments.beta2,
        )  # fmt: skip
        require_choice(owner, "output", self.output, ("linear", "tanh"))
        require_choice(owner, "scaling", self.scaling, tuple(UNITS))
        _ = self.feature_set  # its own checks

    @cached_property
    def feature_set(self) -> FeatureSet:
        """The features this rule reads."""
        return FeatureSet(self.inputs, self.frame, Moments(self.beta1, self.beta2))

    @property
    def units(self) -> RelativeUnits | None:
        """Relative units where `scaling` says so."""
        return UNITS[self.scaling]

    @property
    def carry_keys(self) -> list[str]:
        """Names of the carried tensors: each layer's hidden state, then its cell state."""
        return [f"{kind}{layer}" for layer in range(self.layers) for kind in "hc"]

    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Uniform in +-1/sqrt(H), as `torch.nn.LSTM`; the head's bias is `start`."""
        bound = self.hidden**-0.5
        weights = {}
        for name, shape in self.shapes():
            if name == "head.bias":
                weights[name] = torch.full(shape, self.start)
            else:
                weights[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        return weights

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Layer by layer, then the head."""
        inputs = self.feature_set.count
        for layer in range(self.layers):
            yield f"lstm{layer}.weight", (4 * self.hidden, inputs + self.hidden)
            yield f"lstm{layer}.bias", (4 * self.hidden,)
            inputs = self.hidden
        yield "head.weight", (1, self.hidden)
        if self.bias:
            yield "head.bias", (1,)

    def init_state(self, param_N: Tensor) -> State:
        """Moments where the feature set has them, and the step count."""
        return self.feature_set.init_state(param_N)

    def init_carry(
        self, n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Carry:
        """`h{l}` and `c{l}`, (H, n) zeros."""
        return {
            key: torch.zeros(self.hidden, n, dtype=dtype, device=device) for key in self.carry_keys
        }

    def features(
        self, grad_N: Tensor, param_N: Tensor, state: State, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None, State]:
        """The feature set's features; the scale is its frame's factor on the step."""
        return self.feature_set(grad_N, state)

    def network(self, weights: Weights, features_FN: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """One step of every layer and the head. The reference; `stepsmith.kernels` mirrors it."""
        new: Carry = {}
        inputs_N = features_FN
        for layer in range(self.layers):
            joined_N = torch.cat([inputs_N, carry[f"h{layer}"]])
            gates_N = torch.addmm(
                weights[f"lstm{layer}.bias"][:, None], weights[f"lstm{layer}.weight"], joined_N
            )
            enter_HN, forget_HN, leave_HN, candidate_HN = gates_N.chunk(4)
            cell_HN = forget_HN.sigmoid() * carry[f"c{layer}"]
            cell_HN = cell_HN + enter_HN.sigmoid() * candidate_HN.tanh()
            inputs_N = leave_HN.sigmoid() * cell_HN.tanh()
            new[f"h{layer}"], new[f"c{layer}"] = inputs_N, cell_HN
        output_ON = weights["head.weight"] @ inputs_N
        if self.bias:
            output_ON = output_ON + weights["head.bias"][:, None]
        return output_ON, new

    def step(self, output_ON: Tensor, scale_N: Tensor | None) -> Tensor:
        """-step_scale * output (or its tanh) * scale: a positive output descends in the frame."""
        size_N = output_ON[0].tanh() if self.output == "tanh" else output_ON[0]
        delta_N = size_N * -self.step_scale
        return delta_N if scale_N is None else delta_N * scale_N
