"""The LSTM rules' network, fused by hand: one step in place, a whole sequence with its gradient.

Mirrors `stepsmith.rules.lstm.LSTMRule.network`, its reference. Two facts make it fast on a CPU:
coordinates are innermost, so that each gate is one contiguous slab, and every tanh is taken as
2 sigmoid(2x) - 1, since the vectorised sigmoid costs a fifth of the tanh; the factor 2 is folded
into the candidate gate's weights, so that one sigmoid call serves all four gates.

Shape letters: N = coordinates, S = sampled coordinates, T = steps, F = features, H = hidden units,
O = outputs.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from stepsmith.rules.base import Carry, Weights
from stepsmith.rules.lstm import LSTMRule

CHUNK = 8192
"""Coordinates handled at once by a step on a CPU: the gates of a chunk then stay in the cache."""


def require_weights(rule: LSTMRule, weights: Weights) -> None:
    """Check that a rule's weights have the shapes that its fused forms read.

    Raises:
        ValueError: one is missing or of another shape.
    """
    high, inputs = 4 * rule.hidden, rule.feature_set.count
    want: dict[str, tuple[int, ...]] = {}
    for layer in range(rule.layers):
        want[f"lstm{layer}.weight"] = (high, inputs + rule.hidden)
        want[f"lstm{layer}.bias"] = (high,)
        inputs = rule.hidden
    want["head.weight"] = (1, rule.hidden)
    if rule.bias:
        want["head.bias"] = (1,)
    for name, shape in want.items():
        have = tuple(weights[name].shape) if name in weights else None
        if have != shape:
            raise ValueError(
                f"weights do not fit {type(rule).__name__}: {name!r} should have shape {shape}, "
                f"has {have}; give the weights of this rule"
            )


def pack(rule: LSTMRule, weights: Weights, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights ready for `step_`: cast, on the device, biases as columns, candidates doubled."""
    packed = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().to(device=device, dtype=dtype)
        if name.startswith("lstm"):
            tensor = _doubled_candidates(tensor, rule.hidden)
        packed[name] = tensor[:, None] if name.endswith("bias") else tensor
    return packed


def _doubled_candidates(tensor: Tensor, hidden: int) -> Tensor:
    return torch.cat([tensor[: 3 * hidden], 2 * tensor[3 * hidden :]])


@torch.no_grad()
def step_(rule: LSTMRule, packed: Weights, features_FN: Tensor, carry: Carry) -> Tensor:
    """One step for all coordinates; the carry is updated in place.

    Args:
        rule: the rule.
        packed: what `pack` returned.
        features_FN: (F, N), coordinates contiguous.
        carry: (H, N) tensors, overwritten.

    Returns:
        (O, N) output.
    """
    n = features_FN.shape[1]
    chunk = CHUNK if features_FN.device.type == "cpu" else max(n, 1)
    output_ON = features_FN.new_empty(1, n)
    for start in range(0, n, chunk):
        span = slice(start, min(start + chunk, n))
        inputs_N = features_FN[:, span]
        for layer in range(rule.layers):
            hidden_HN, cell_HN = carry[f"h{layer}"][:, span], carry[f"c{layer}"][:, span]
            gates_N = torch.addmm(
                packed[f"lstm{layer}.bias"],
                packed[f"lstm{layer}.weight"],
                torch.cat([inputs_N, hidden_HN]),
            ).sigmoid_()
            enter_HN, forget_HN, leave_HN, candidate_HN = gates_N.chunk(4)
            # enter * tanh(z) = enter * (2 sigmoid(2 z) - 1)
            cell_HN.mul_(forget_HN).addcmul_(enter_HN, candidate_HN, value=2).sub_(enter_HN)
            half_HN = torch.mul(cell_HN, 2, out=candidate_HN).sigmoid_()
            torch.mul(leave_HN, half_HN, out=hidden_HN)
            inputs_N = hidden_HN.mul_(2).sub_(leave_HN)
        torch.mm(packed["head.weight"], inputs_N, out=output_ON[:, span])
    if rule.bias:
        output_ON += packed["head.bias"]
    return output_ON


def sequence(rule: LSTMRule, weights: Weights, features_TFS: Tensor, carry: Carry) -> Tensor:
    """The network over T steps, differentiable with respect to the weights only.

    Args:
        rule: the rule.
        weights: its weights, requiring gradients.
        features_TFS: (T, F, S) features, constants.
        carry: (H, S) tensors at the window's start, constants.

    Returns:
        (T, O, S) outputs.
    """
    inputs_TS = features_TFS
    for layer in range(rule.layers):
        inputs_TS = _LSTMLayer.apply(
            inputs_TS,
            weights[f"lstm{layer}.weight"],
            weights[f"lstm{layer}.bias"],
            carry[f"h{layer}"],
            carry[f"c{layer}"],
        )
    output_TOS = torch.matmul(weights["head.weight"], inputs_TS)
    return output_TOS + weights["head.bias"][:, None] if rule.bias else output_TOS


def platform_sequence(
    rule: LSTMRule, weights: Weights, features_TFS: Tensor, carry: Carry
) -> Tensor:
    """As `sequence`, by the platform's own LSTM (cuDNN on NVIDIA GPUs)."""
    flat, order = [], [0, 1, 3, 2]  # its gates: enter, forget, candidate, leave
    inputs = rule.feature_set.count
    for layer in range(rule.layers):
        gates = weights[f"lstm{layer}.weight"].view(4, rule.hidden, -1)[order].flatten(0, 1)
        bias = weights[f"lstm{layer}.bias"].view(4, rule.hidden)[order].flatten()
        # cuDNN takes whole tensors alone.
        own, carried = (part.contiguous() for part in gates.split([inputs, rule.hidden], dim=1))
        flat += [own, carried, bias, torch.zeros_like(bias)]
        inputs = rule.hidden
    h_LSH, c_LSH = (
        torch.stack([carry[f"{kind}{layer}"].t() for layer in range(rule.layers)]).contiguous()
        for kind in "hc"
    )
    with warnings.catch_warnings():
        # cuDNN asks for weights in one piece; these are small, and its copy of them costs nothing.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")
        # Training mode even where autograd is off: cuDNN then keeps what its backward pass needs.
        hidden_TSH = torch.lstm(
            features_TFS.transpose(1, 2).contiguous(), (h_LSH, c_LSH), flat,
            True, rule.layers, 0.0, True, False, False,
        )[0]  # fmt: skip
    output_TOS = (hidden_TSH @ weights["head.weight"].t()).transpose(1, 2)
    return output_TOS + weights["head.bias"][:, None] if rule.bias else output_TOS


class _LSTMLayer(torch.autograd.Function):
    """One layer over T steps with its back-propagation through time written out."""

    @staticmethod
    def forward(
        ctx: Any, inputs_TIS: Tensor, weight: Tensor, bias: Tensor, h_HS: Tensor, c_HS: Tensor
    ) -> Tensor:
        steps, inputs, count = inputs_TIS.shape
        hidden = h_HS.shape[0]
        packed = _doubled_candidates(weight, hidden)
        from_inputs, from_hidden = packed[:, :inputs], packed[:, inputs:].contiguous()
        gates_TGS = torch.matmul(from_inputs, inputs_TIS)
        gates_TGS += _doubled_candidates(bias, hidden)[:, None]
        hidden_THS = inputs_TIS.new_empty(steps + 1, hidden, count)
        cell_THS = inputs_TIS.new_empty(steps + 1, hidden, count)
        tanh_THS = inputs_TIS.new_empty(steps, hidden, count)
        hidden_THS[0], cell_THS[0] = h_HS, c_HS
        for t in range(steps):
            gates_GS = gates_TGS[t].addmm_(from_hidden, hidden_THS[t]).sigmoid_()
            enter_HS, forget_HS, leave_HS, candidate_HS = gates_GS.chunk(4)
            candidate_HS.mul_(2).sub_(1)
            cell_HS = torch.mul(forget_HS, cell_THS[t], out=cell_THS[t + 1])
            cell_HS.addcmul_(enter_HS, candidate_HS)
            torch.mul(cell_HS, 2, out=tanh_THS[t]).sigmoid_().mul_(2).sub_(1)
            torch.mul(leave_HS, tanh_THS[t], out=hidden_THS[t + 1])
        ctx.save_for_backward(inputs_TIS, weight, gates_TGS, hidden_THS, cell_THS, tanh_THS)
        return hidden_THS[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs_TIS, weight, gates_TGS, hidden_THS, cell_THS, tanh_THS = ctx.saved_tensors
        (outer_THS,) = grads
        steps, inputs, _ = inputs_TIS.shape
        hidden = hidden_THS.shape[1]
        from_hidden = weight[:, inputs:]
        to_hidden = from_hidden.t().contiguous()
        enter_THS, forget_THS, leave_THS, candidate_THS = gates_TGS.chunk(4, dim=1)
        # Derivatives of the gates' nonlinearities, and all factors known without recursion.
        tanh_slope_THS = leave_THS * (1 - tanh_THS * tanh_THS)
        leave_slope_THS = tanh_THS * leave_THS * (1 - leave_THS)
        delta_TGS = torch.empty_like(gates_TGS)
        slope_TGS = delta_TGS  # the recursion multiplies it by the cell's or the output's gradient
        torch.mul(candidate_THS * enter_THS, 1 - enter_THS, out=slope_TGS[:, :hidden])
        torch.mul(cell_THS[:-1] * forget_THS, 1 - forget_THS, out=slope_TGS[:, hidden : 2 * hidden])
        slope_TGS[:, 2 * hidden : 3 * hidden] = leave_slope_THS
        torch.mul(enter_THS, 1 - candidate_THS * candidate_THS, out=slope_TGS[:, 3 * hidden :])
        hidden_grad_HS = torch.zeros_like(outer_THS[0])
        cell_grad_HS = torch.zeros_like(outer_THS[0])
        for t in range(steps - 1, -1, -1):
            hidden_grad_HS = hidden_grad_HS + outer_THS[t]
            cell_grad_HS.addcmul_(hidden_grad_HS, tanh_slope_THS[t])
            for gate, grad_HS in enumerate(
                (cell_grad_HS, cell_grad_HS, hidden_grad_HS, cell_grad_HS)
            ):
                delta_TGS[t, gate * hidden : (gate + 1) * hidden].mul_(grad_HS)
            cell_grad_HS.mul_(forget_THS[t])
            if t:
                hidden_grad_HS = to_hidden @ delta_TGS[t]
        weight_grad = torch.cat(
            [
                torch.bmm(delta_TGS, inputs_TIS.transpose(1, 2)).sum(0),
                torch.bmm(delta_TGS, hidden_THS[:-1].transpose(1, 2)).sum(0),
            ],
            dim=1,
        )
        inputs_grad = None
        if ctx.needs_input_grad[0]:
            inputs_grad = torch.matmul(weight[:, :inputs].t(), delta_TGS)
        return inputs_grad, weight_grad, delta_TGS.sum((0, 2)), None, None
