"""What the deep convolutional networks share: convolutions, initial values, memory layout.

Shape letters: B = batch, X = input channels, Y = output channels.
"""

from __future__ import annotations

from torch import Tensor, nn


def convolution(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """A convolution of odd kernel.

    It maps (B, X, height, width) to (B, Y, height / stride, width / stride), rounded up.

    Args:
        inputs: X.
        outputs: Y.
        kernel: its height and width, odd.
        stride: pixels from one output to the next.
        groups: X for a depthwise convolution.
        bias: whether a bias is added; before a batch-norm it has no effect on the outputs.
    """
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def he_normal(network: nn.Module) -> None:
    """Draw weights of convolutions and linear maps from N(0, 2 / fan-in); their biases are zero.

    Scales and shifts of normalisations keep torch's ones and zeros.

    Source: He et al. 2015, arXiv:1502.01852, equation 10.
    """
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def channels_last(hidden_BYHW: Tensor) -> Tensor:
    """The same numbers, on CPUs and CUDA devices with all channels of a pixel side by side.

    Convolutions of many channels are faster in this layout, forward and backward, and hand it on to
    what follows; sums are taken in another order, so that results differ by rounding.
    It is for what a stem puts out: images of one channel have both layouts at once.
    """
    if hidden_BYHW.device.type not in ("cpu", "cuda"):
        return hidden_BYHW
    # `contiguous(memory_format=torch.channels_last)` does the same, but not under vmap.
    return hidden_BYHW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
