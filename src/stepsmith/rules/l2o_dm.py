"""L2O-DM: learning to learn by gradient descent by gradient descent.

Source: Andrychowicz et al. 2016, arXiv:1606.04474; two cells of 20 and the scales 1.0 (quadratic)
and 0.1 (networks) as in Daduryan, "Transferring Learned Optimizers".
"""

from stepsmith.rules.base import require_flag
from stepsmith.rules.lstm import LSTMRule


def l2o_dm(
    hidden: int = 20,
    layers: int = 2,
    inputs: str = "log_sign",
    step_scale: float = 0.1,
    faithful: bool = False,
) -> LSTMRule:
    """Two LSTM cells on the gradient (`inputs="raw"`) or its log/sign pair, a linear head.

    Args:
        hidden: units of each cell.
        layers: number of cells.
        inputs: feature set; published: `raw` for quadratics, `log_sign` for networks.
        step_scale: published: 1.0 for quadratics, 0.1 for networks.
        faithful: as published, a coordinate whose gradient has always been zero drifts by the
            head's bias. Off by default: such a coordinate is held still.

    Returns:
        The rule. Raises ValueError and TypeError as `LSTMRule` does.
    """
    frame = "none" if require_flag("l2o_dm", "faithful", faithful) else "hold"
    return LSTMRule(hidden, layers, inputs, "linear", step_scale, frame)
