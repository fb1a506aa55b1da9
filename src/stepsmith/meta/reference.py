"""The slow reference: autograd through the whole unrolled graph.

What `adjoint_window` is tested against and timed beside: the usual retain-graph loop, one copy at a
time, keeping the graph of every step.

Shape letters: P = parameters of the optimizee, N = coordinates of one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepsmith.meta.adjoint import LossTimes, require_window
from stepsmith.meta.losses import meta_loss
from stepsmith.rules.base import Carry, Rule, State, Weights, require_flag
from stepsmith.rules.units import norms
from stepsmith.unroll import Copies


def reference_window(
    copies: Copies,
    rule: Rule,
    weights: Weights,
    steps: int,
    *,
    kind: str = "mean",
    losses: LossTimes = "after",
    second_order: bool = False,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    split: str = "meta_train",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The meta-loss of one window from fresh starts, and its gradient by back-propagation.

    Args:
        copies: the optimizees; their generators move on, their parameters do not.
        rule: the rule.
        weights: phi, requiring gradients.
        steps: T.
        kind, losses, split: as in `adjoint_window`.
        second_order: keep dg/dtheta, so that the gradient is exact (and needs the memory and time
            of second derivatives); otherwise gradients are constants, as in the adjoint engine.
        lr, weight_decay: as for `RuleStepper`.

    Returns:
        J, the mean over copies, and dJ/dphi by weight name.

    Raises:
        ValueError: fewer than one step, or an unknown choice.
        TypeError: an argument of another type.
    """
    steps = require_window("reference_window", copies, steps, kind, losses)
    second_order = require_flag("reference_window", "second_order", second_order)
    values = []
    total = {key: torch.zeros_like(value) for key, value in weights.items()}
    for copy in range(len(copies)):
        value = _one_copy(
            copies, copy, rule, weights, steps, kind, losses, second_order, lr, weight_decay, split
        )
        for key, gradient in zip(
            weights, torch.autograd.grad(value, list(weights.values())), strict=True
        ):
            total[key] += gradient / len(copies)
        values.append(value.detach())
    return torch.stack(values).mean(), total


def _one_copy(
    copies: Copies,
    copy: int,
    rule: Rule,
    weights: Weights,
    steps: int,
    kind: str,
    losses: LossTimes,
    second_order: bool,
    lr: float,
    weight_decay: float,
    split: str,
) -> Tensor:
    task, layout, generator = copies.task, copies.layout, copies.generators[copy]
    buffers = {key: value[copy] for key, value in copies.buffers.items()}
    theta_P = copies.theta[copy].clone().requires_grad_()
    # A rule that couples nothing sees all tensors as one, which is faster here too.
    parts = (
        [(slice(0, layout.total), (layout.total,))]
        if rule.coupling == "none"
        else list(zip(layout.spans, layout.shapes, strict=True))
    )
    states: list[State] = [rule.init_state(theta_P.detach()[span]) for span, _ in parts]
    carries: list[Carry] = [
        rule.init_carry(span.stop - span.start, dtype=theta_P.dtype, device=theta_P.device)
        for span, _ in parts
    ]
    units = rule.units
    measures = units.init(1, dtype=theta_P.dtype, device=theta_P.device) if units else {}
    counted = []
    for step in range(steps + (1 if losses == "after" else 0)):
        (batch,) = [
            tuple(part[0] for part in task.batches([generator], split)),
        ]
        loss, buffers, _ = task.loss(layout.views(theta_P), buffers, batch, generator, True)
        if losses == "before" or step > 0:
            counted.append(loss)
        if step == steps:
            break
        (grad_P,) = torch.autograd.grad(loss, theta_P, create_graph=second_order, retain_graph=True)
        gain = 1.0
        if units is not None:
            with torch.set_grad_enabled(second_order):
                seen, gain, measures = units.measure(norms(grad_P[None]), layout.total, measures)
                grad_P = grad_P * seen
        deltas = []
        for part, (span, shape) in enumerate(parts):
            with torch.set_grad_enabled(second_order):
                features_FN, scale_N, states[part] = rule.features(
                    grad_P[span],
                    theta_P[span] if second_order else theta_P.detach()[span],
                    states[part],
                    shape,
                )
            output_ON, carries[part] = rule.network(weights, features_FN, carries[part])
            deltas.append(rule.step(output_ON, scale_N))
        theta_P = theta_P * (1 - lr * weight_decay) + lr * gain * torch.cat(deltas)
    losses_T = torch.stack(counted)[:, None]
    places_T = torch.arange(1, steps + 1, device=losses_T.device)[:, None]
    return meta_loss(kind, losses_T, places_T, steps)[0].sum()
