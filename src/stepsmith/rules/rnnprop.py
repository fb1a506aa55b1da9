"""RNNprop, in the form of SL2O.

Source: Lv, Jiang & Li 2017, arXiv:1703.03633; one LSTM of 8 on the Adam-normalised pair with a
bounded step: Chen et al., "Scalable Learning to Optimize", ECCV 2022, supplement.
"""

from stepsmith.rules.base import require_flag
from stepsmith.rules.lstm import LSTMRule


def rnnprop(
    hidden: int = 8,
    layers: int = 1,
    inputs: str = "adam",
    step_scale: float = 0.1,
    faithful: bool = False,
) -> LSTMRule:
    """One LSTM on m~ and g~, a head without bias, tanh: every step is bounded by `step_scale`.

    Args:
        hidden: units of each cell.
        layers: number of cells.
        inputs: feature set; published: `adam`.
        step_scale: bound of a step in parameter units; published: 1.0 in a subspace of 40
            coefficients, 1e-4 on low-rank factors.
        faithful: as published, a coordinate whose gradient has always been zero drifts by the
            cells' biases. Off by default: such a coordinate is held still.

    Returns:
        The rule. Raises ValueError and TypeError as `LSTMRule` does.
    """
    frame = "none" if require_flag("rnnprop", "faithful", faithful) else "hold"
    return LSTMRule(hidden, layers, inputs, "tanh", step_scale, frame, bias=False)
