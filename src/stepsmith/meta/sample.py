"""A sample of the coordinates: drawn before a window, kept while it rolls, replayed after it.

Shape letters: T = steps of the window, C = copies, P = parameters of one optimizee, S = sampled
coordinates (of all C * P), F = features, N = all coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.layout import Layout
from stepsmith.rules.base import Rule, State, Weights, require_kind, require_number
from stepsmith.unroll import Copies, RuleStepper, Start
from stepsmith.unroll.steppers import coupled_spans


def sample_coordinates(
    layout: Layout, copies: int, fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw coordinates of every tensor of every copy, at least one of each.

    A tensor of n coordinates is cut into k = ceil(fraction * n) equal strata and one coordinate is
    drawn from each: every coordinate is expected k / n times, in O(k) work.

    Args:
        layout: of one optimizee.
        copies: C.
        fraction: share to draw, in (0, 1].
        generator: source of randomness.

    Returns:
        (S,) indices into C * P, ascending, and (S,) weights n / k.
    """
    indices, weights = [], []
    for span, size in zip(layout.spans, layout.sizes, strict=True):
        if size == 0:
            continue
        count = size if fraction >= 1 else max(1, -(-size * fraction // 1))
        count = int(count)
        if count == size:
            place_CK = torch.arange(size).expand(copies, size)
        else:
            jitter_CK = torch.rand(copies, count, generator=generator, dtype=torch.float64)
            place_CK = (torch.arange(count) + jitter_CK) * (size / count)
            place_CK = place_CK.long().clamp_max(size - 1)
        indices.append(place_CK + span.start + torch.arange(copies)[:, None] * layout.total)
        weights.append(torch.full((copies, count), size / count, dtype=torch.float64))
    # Copy by copy, so that gathering walks through memory in order.
    return torch.cat(indices, dim=1).reshape(-1), torch.cat(weights, dim=1).reshape(-1)


def require_fraction(rule: Rule, fraction: float, generator: torch.Generator | None) -> None:
    """Check a share of coordinates to be replayed.

    Raises:
        ValueError: outside (0, 1], or below 1 without what draws them, or for a rule whose network
            couples coordinates.
    """
    require_number("a window", "fraction", fraction, above=0, most=1)
    require_kind("a window", "generator", generator, torch.Generator | None)
    if fraction < 1 and rule.coupling == "network":
        raise ValueError(
            f"{type(rule).__name__} couples coordinates in its network: a sampled replay would be "
            "biased. Meta-train it with fraction=1."
        )
    if fraction < 1 and generator is None:
        raise ValueError(
            f"a fraction of {fraction} is drawn: pass a generator, the same at every window, or "
            "each replays the same coordinates"
        )


class Sample:
    """Coordinates drawn from all copies: a stepper that keeps what their replay needs, and replays.

    Of a rule that couples no coordinates, gradients and the state at the window's start are
    enough: features follow from them. Of any other, the features themselves.

    Args:
        copies: to be rolled.
        stepper: the rule's, at the window's start; makes the steps.
        steps: T.
        fraction: share of the coordinates, in (0, 1].
        generator: draws them; needed where `fraction` < 1.

    Attributes:
        index_S: (S,) places among all C * P coordinates.
        owner_S: (S,) whose they are.
        grads_TS: (T + 1, S); the last row is the final gradient, where it is judged.

    Raises:
        ValueError: as `require_fraction`.
    """

    def __init__(
        self,
        copies: Copies,
        stepper: RuleStepper,
        steps: int,
        fraction: float,
        generator: torch.Generator | None,
    ):
        require_fraction(stepper.rule, fraction, generator)
        index_S, weight_S = sample_coordinates(
            stepper.layout, len(copies), fraction, generator or torch.Generator()
        )
        index_S = index_S.to(copies.theta.device)
        self.index_S, self.owner_S = index_S, index_S // stepper.layout.total
        self._weight_S = weight_S.to(copies.theta)
        self._carry = {key: value[:, index_S] for key, value in stepper.carry.items()}
        self._stepper, self._steps = stepper, steps
        self._whole = len(index_S) == copies.theta.numel()
        self._copies = len(copies)
        self._step = 0
        self.grads_TS = copies.theta.new_zeros(steps + 1, len(index_S))
        self._keeps_params = stepper.rule.reads_param and stepper.uncoupled
        self._params_TS = self.grads_TS[:-1]  # anything of the shape, where not read
        if self._keeps_params:
            self._params_TS = copies.theta.new_empty(steps, len(index_S))
        self._state: State = {}
        if stepper.uncoupled:
            self._state = {
                key: value.clone()
                if key in stepper.rule.per_tensor
                else self._sampled(value).view(self._copies, -1)
                for key, value in stepper.state.items()
            }
        self._features_TFS = self._scale_TS = None
        self._gains_TC = self._seen_TC = None
        if stepper.rule.units is not None:
            self._gains_TC = copies.theta.new_zeros(steps, len(copies))
            self._seen_TC = self._gains_TC.clone()

    def _sampled(self, value_CP: Tensor) -> Tensor:
        flat = value_CP.reshape(-1)
        return flat.clone() if self._whole else flat.index_select(0, self.index_S)

    def keep(self, start: Start) -> None:
        """Keep the gradient before a step."""
        self.grads_TS[start.step] = self._sampled(start.grad_CP)

    def _keep_features(self, features_FN: Tensor, scale_N: Tensor | None) -> None:
        if self._features_TFS is None:
            # Reserved at once: growing lists would double the memory when they are joined.
            sampled = len(self.index_S)
            self._features_TFS = features_FN.new_empty(self._steps, len(features_FN), sampled)
            self._scale_TS = None if scale_N is None else scale_N.new_empty(self._steps, sampled)
        self._features_TFS[self._step] = features_FN.index_select(1, self.index_S)
        if scale_N is not None and self._scale_TS is not None:
            self._scale_TS[self._step] = scale_N.index_select(0, self.index_S)

    def __call__(self, theta_CP: Tensor, grad_CP: Tensor) -> None:
        """Make one step."""
        if self._keeps_params:
            self._params_TS[self._step] = self._sampled(theta_CP)
        self._stepper(theta_CP, grad_CP, self._keep_features)
        for kept_TC, factor_C in (
            (self._gains_TC, self._stepper.gain), (self._seen_TC, self._stepper.seen)
        ):  # fmt: skip
            if kept_TC is not None and factor_C is not None:
                kept_TC[self._step] = factor_C
        self._step += 1

    def _features(self) -> tuple[Tensor, Tensor | None]:
        """(T, F, S) features, and (T, S) scales or None where the rule has none."""
        stepper = self._stepper
        if self._features_TFS is not None:
            return self._features_TFS, self._scale_TS
        grads_TCS, params_TCS = (
            value.view(self._steps, self._copies, -1)
            for value in (self.grads_TS[:-1], self._params_TS)
        )
        if self._seen_TC is not None:
            grads_TCS = grads_TCS * self._seen_TC[:, :, None]
        return kernels.sample_features(
            stepper.rule, grads_TCS, params_TCS, self._state, stepper.backend
        )

    def replay(
        self, weights: Weights, adjoint_TS: Tensor, finite_C: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Back-propagate sum <adjoint, u> through the network on the sampled coordinates, u the
        rule's steps as they change the parameters: a mean over the copies that count.

        Args:
            weights: phi.
            adjoint_TS: (T, S), written over.
            finite_C: (C,) copies that may count; of these those do whose adjoints are all finite.

        Returns:
            gradients by weight name, and (C,) which copies counted.
        """
        stepper, owner_S = self._stepper, self.owner_S
        finite_C = finite_C & self._finite(adjoint_TS)
        alive_S = finite_C[owner_S]
        adjoint_TS *= self._weight_S * (stepper.lr / max(1, int(finite_C.sum())))
        if self._gains_TC is not None:
            adjoint_TS *= self._gains_TC.index_select(1, owner_S)
        adjoint_TS.masked_fill_(~alive_S, 0.0)
        features_TFS, scale_TS = self._features()
        carry = self._carry
        if not bool(alive_S.all()):
            features_TFS = torch.where(alive_S, features_TFS, 0.0)
            scale_TS = None if scale_TS is None else torch.where(alive_S, scale_TS, 0.0)
            carry = {key: torch.where(alive_S, value, 0.0) for key, value in carry.items()}
        spans = [slice(0, len(owner_S))]
        if stepper.rule.coupling == "network":
            spans = coupled_spans(stepper.layout, self._copies)
        parts = [
            kernels.replay(
                stepper.rule,
                weights,
                features_TFS[..., span],
                {key: value[:, span] for key, value in carry.items()},
                adjoint_TS[:, span],
                None if scale_TS is None else scale_TS[:, span],
                stepper.backend,
            )
            for span in spans
        ]
        gradients = {
            key: sum((part[key] for part in parts[1:]), parts[0][key]).to(weight)
            for key, weight in weights.items()
        }
        return gradients, finite_C

    def _finite(self, adjoint_TS: Tensor) -> Tensor:
        """(C,) whether all numbers of a copy's sampled coordinates are finite."""
        bad_S = (~adjoint_TS.isfinite()).any(0).to(torch.int64)
        zeros = torch.zeros(self._copies, dtype=torch.int64, device=bad_S.device)
        return zeros.index_add_(0, self.owner_S, bad_S) == 0
