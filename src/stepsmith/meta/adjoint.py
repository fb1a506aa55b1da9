"""Coordinate-sampled adjoint back-propagation: the meta-gradient in the memory of deployment.

The optimizee's gradient g_t enters the network as a constant (Andrychowicz et al. 2016), so that
the parameters theta_t depend on the rule's weights phi only through the sum of earlier steps u_s:

    theta_t+1 = (1 - d) theta_t + lr u_t          d = lr * weight decay
    J         = sum_t w_t L_t(theta_t)
    dJ/dphi   = lr sum_s <lambda_s, du_s/dphi>
    lambda_s  = w_s+1 g_s+1 + discount (1 - d) lambda_s+1

Roll forward with no graph, keeping the gradients of a sample of coordinates; form lambda by suffix
sums; replay the network on the sample and back-propagate through it. With every coordinate sampled
this equals back-propagation through the whole unrolled graph without second derivatives; otherwise
it is an unbiased estimate of it.

Shape letters: T = steps of the window, C = copies, P = parameters of one optimizee, S = sampled
coordinates (of all C * P), F = features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepsmith import kernels
from stepsmith.layout import Layout
from stepsmith.meta.losses import meta_loss
from stepsmith.rules.base import Rule, State, Weights
from stepsmith.unroll import Copies, RuleStepper, Start, roll
from stepsmith.unroll.steppers import coupled_spans

LossTimes = Literal["after", "before"]


@dataclass(frozen=True)
class Window:
    """What one window gave.

    Attributes:
        gradients: dJ/dphi by weight name, J being the mean over the copies that stayed finite.
        value: J.
        losses_TC: (T, C) losses before each step.
        finite_C: (C,) whether all of a copy's losses and gradients were finite.
    """

    gradients: dict[str, Tensor]
    value: float
    losses_TC: Tensor
    finite_C: Tensor


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


def adjoint_window(
    copies: Copies,
    stepper: RuleStepper,
    weights: Weights,
    steps: int,
    *,
    kind: str = "mean",
    losses: LossTimes = "after",
    fraction: float = 1.0,
    discount: float = 1.0,
    ages: list[int] | None = None,
    horizon: int | None = None,
    generator: torch.Generator | None = None,
    split: str = "meta_train",
) -> Window:
    """Roll the copies one window forward and return the meta-gradient.

    Args:
        copies: moved in place.
        stepper: the rule's statistics and carry, moved in place; it must step by `weights`.
        weights: phi, requiring gradients.
        steps: T.
        kind: meta-loss, one of `META_LOSSES`.
        losses: `"after"` counts L_1..L_T, at the price of one more gradient; `"before"` counts
            L_0..L_{T-1}, as both papers do, and gives the last step no signal.
        fraction: share of the coordinates replayed, in (0, 1].
        discount: gamma in the recursion of lambda.
        ages: steps each copy has made so far; by default none.
        horizon: steps of an episode; by default T.
        generator: draws the sample; needed where `fraction` < 1.
        split: where batches come from.

    Raises:
        ValueError: a fraction outside (0, 1], or below 1 without a generator or for a rule whose
            network couples coordinates (the estimate would be biased).
    """
    rule, layout = stepper.rule, stepper.layout
    require_fraction(rule, fraction, generator)
    index_S, weight_S = sample_coordinates(
        layout, len(copies), fraction, generator or torch.Generator().manual_seed(0)
    )
    device, dtype = copies.theta.device, copies.theta.dtype
    index_S, weight_S = index_S.to(device), weight_S.to(device=device, dtype=dtype)
    carry = {key: value[:, index_S] for key, value in stepper.carry.items()}
    record = Record(stepper, copies, index_S, steps)
    losses_TC = roll(copies, record, steps, split=split, hook=record.keep)
    if losses == "after":
        # The window's last step is judged on a batch of its own; no step follows it.
        final_C, grad_CP = copies.gradients(copies.batches(split))
        record.keep(Start(steps, final_C, grad_CP))
        counted_TC = torch.cat([losses_TC[1:], final_C[None]])
    else:
        counted_TC = losses_TC
    ages_C = torch.tensor(ages or [0] * len(copies), device=device)
    places_TC = ages_C + torch.arange(1, steps + 1, device=device)[:, None]
    value_C, w_TC = meta_loss(kind, counted_TC, places_TC, horizon or steps)

    finite_C = counted_TC.isfinite().all(0) & losses_TC.isfinite().all(0)
    owner_S = index_S // layout.total
    lambda_TS = torch.zeros(steps, len(index_S), device=device, dtype=dtype)
    if losses == "after":
        torch.mul(w_TC.index_select(1, owner_S), record.grads_TS[1:], out=lambda_TS)
    else:
        torch.mul(w_TC[1:].index_select(1, owner_S), record.grads_TS[1:-1], out=lambda_TS[:-1])
    _sum_suffixes_(lambda_TS, discount * (1 - stepper.lr * stepper.weight_decay))
    finite_C = finite_C & finite_by_copy(lambda_TS, owner_S, len(copies))
    alive = max(1, int(finite_C.sum()))
    lambda_TS *= weight_S * (stepper.lr / alive)
    if record.gains_TC is not None:
        lambda_TS *= record.gains_TC.index_select(1, owner_S)
    lambda_TS.masked_fill_(~finite_C[owner_S], 0.0)
    gradients = replay_sample(stepper, weights, record, carry, lambda_TS, finite_C[owner_S])
    value = float(value_C[finite_C].mean()) if finite_C.any() else float("nan")
    return Window(gradients, value, losses_TC, finite_C)


def require_fraction(rule: Rule, fraction: float, generator: torch.Generator | None) -> None:
    """Check a share of coordinates to be replayed.

    Raises:
        ValueError: outside (0, 1], or below 1 without what draws them, or for a rule whose network
            couples coordinates.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction!r}")
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


class Record:
    """A stepper that keeps what the replay needs, at the sampled coordinates.

    Of a rule that couples no coordinates, gradients and the state at the window's start are
    enough: features follow from them. Of any other, the features themselves.

    Attributes:
        grads_TS: (T + 1, S); the last row is the final gradient, where it is judged.
        gains_TC: (T, C) factors on the steps, None where the rule has no units.
    """

    def __init__(self, stepper: RuleStepper, copies: Copies, index_S: Tensor, steps: int):
        self._stepper, self._index, self._steps = stepper, index_S, steps
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
        self.gains_TC: Tensor | None = None
        if stepper.rule.units is not None:
            self.gains_TC = copies.theta.new_zeros(steps, len(copies))

    def _sampled(self, value_CP: Tensor) -> Tensor:
        flat = value_CP.reshape(-1)
        return flat.clone() if self._whole else flat.index_select(0, self._index)

    def keep(self, start: Start) -> None:
        """Keep the gradient before a step."""
        self.grads_TS[start.step] = self._sampled(start.grad_CP)

    def _keep_features(self, features_FN: Tensor, scale_N: Tensor | None) -> None:
        if self._features_TFS is None:
            # Reserved at once: growing lists would double the memory when they are joined.
            sampled = len(self._index)
            self._features_TFS = features_FN.new_empty(self._steps, len(features_FN), sampled)
            self._scale_TS = None if scale_N is None else scale_N.new_empty(self._steps, sampled)
        self._features_TFS[self._step] = features_FN.index_select(1, self._index)
        if scale_N is not None and self._scale_TS is not None:
            self._scale_TS[self._step] = scale_N.index_select(0, self._index)

    def __call__(self, theta_CP: Tensor, grad_CP: Tensor) -> None:
        """Make one step."""
        if self._keeps_params:
            self._params_TS[self._step] = self._sampled(theta_CP)
        self._stepper(theta_CP, grad_CP, self._keep_features)
        if self.gains_TC is not None and self._stepper.gain is not None:
            self.gains_TC[self._step] = self._stepper.gain
        self._step += 1

    def features(self) -> tuple[Tensor, Tensor | None]:
        """(T, F, S) features, and (T, S) scales or None where the rule has none."""
        stepper = self._stepper
        if self._features_TFS is not None:
            return self._features_TFS, self._scale_TS
        grads_TCS, params_TCS = (
            value.view(self._steps, self._copies, -1)
            for value in (self.grads_TS[:-1], self._params_TS)
        )
        if stepper.seen is not None:
            # One factor an episode, and an episode ends between windows.
            grads_TCS = grads_TCS * stepper.seen[:, None]
        return kernels.sample_features(
            stepper.rule, grads_TCS, params_TCS, self._state, stepper.backend
        )


def _sum_suffixes_(ahead_TS: Tensor, decay: float) -> None:
    """lambda_s = ahead_s + decay * lambda_s+1, where ahead_s = w_s+1 g_s+1; written over it."""
    for s in range(len(ahead_TS) - 2, -1, -1):
        ahead_TS[s].add_(ahead_TS[s + 1], alpha=decay)


def finite_by_copy(lambda_TS: Tensor, owner_S: Tensor, copies: int) -> Tensor:
    """(C,) whether all numbers (T, S) of a copy's sampled coordinates are finite; `owner_S` says
    whose they are."""
    bad_S = (~lambda_TS.isfinite()).any(0).to(torch.int64)
    zeros = torch.zeros(copies, dtype=torch.int64, device=bad_S.device)
    return zeros.index_add_(0, owner_S, bad_S) == 0


def replay_sample(
    stepper: RuleStepper,
    weights: Weights,
    record: Record,
    carry: dict[str, Tensor],
    lambda_TS: Tensor,
    alive_S: Tensor,
) -> dict[str, Tensor]:
    """Back-propagate sum <lambda, u> through the network on the sampled coordinates.

    Args:
        stepper: the rule's.
        weights: phi.
        record: of the roll.
        carry: at the roll's start, (K, S) tensors.
        lambda_TS: (T, S), every factor on the steps included.
        alive_S: (S,) coordinates that count.

    Returns:
        gradients by weight name.
    """
    rule, layout = stepper.rule, stepper.layout
    features_TFS, scale_TS = record.features()
    if not bool(alive_S.all()):
        features_TFS = torch.where(alive_S, features_TFS, 0.0)
        scale_TS = None if scale_TS is None else torch.where(alive_S, scale_TS, 0.0)
        carry = {key: torch.where(alive_S, value, 0.0) for key, value in carry.items()}
    sampled = lambda_TS.shape[1]
    spans = [slice(0, sampled)]
    if rule.coupling == "network":
        spans = coupled_spans(layout, sampled // layout.total)
    parts = [
        kernels.replay(
            rule,
            weights,
            features_TFS[..., span],
            {key: value[:, span] for key, value in carry.items()},
            lambda_TS[:, span],
            None if scale_TS is None else scale_TS[:, span],
            stepper.backend,
        )
        for span in spans
    ]
    return {
        key: sum((part[key] for part in parts[1:]), parts[0][key]).to(weight)
        for key, weight in weights.items()
    }
