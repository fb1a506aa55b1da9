"""Stepsmith's own default: both published feature sets, seen in the frame of the momentum's sign.

The joined features are those of L2O-DM (log/sign, here of the gradient and of the momentum) and of
RNNprop (the Adam-normalised pair).
"""

from stepsmith.rules.lstm import LSTMRule


def joined(
    hidden: int = 8,
    layers: int = 1,
    inputs: str = "joined",
    step_scale: float | None = None,
    frame: str = "momentum",
    start: float = 0.1,
    scaling: str = "relative",
) -> LSTMRule:
    """A small LSTM on six features with a bounded step that is odd in the gradient.

    Args:
        hidden: units of each cell.
        layers: number of cells.
        inputs: feature set.
        step_scale: bound of a step: 3 in units of the loss by default; of an absolute one 0.1, in
            parameter units.
        frame: `momentum` (odd by construction), `hold` or `none`, see `FeatureSet`.
        start: the head's first bias; 0.1 makes the fresh rule signed descent along the momentum
            with steps near 0.1 * step_scale.
        scaling: `relative`, so that the rule may be taken to other networks, `absolute` or
            `warmed`, see `LSTMRule`.

    Returns:
        The rule. Raises ValueError and TypeError as `LSTMRule` does.
    """
    if step_scale is None:
        step_scale = 0.1 if scaling == "absolute" else 3.0
    return LSTMRule(hidden, layers, inputs, "tanh", step_scale, frame, start=start, scaling=scaling)
