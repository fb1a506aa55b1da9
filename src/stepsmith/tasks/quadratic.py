"""Random quadratics, the smallest task of the papers.

Shape letters: D = dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepsmith.tasks.base import Batch, Buffers, Metrics, Params, Task


class Quadratic(Task):
    """sum((W x - y)^2) with W (D, D) and y (D,) standard normal, x from zero.

    Args:
        dimensions: D.
        device: where everything runs.
        dtype: of all tensors.

    Raises:
        ValueError: dimensions below 1.

    Source: Andrychowicz et al. 2016, arXiv:1606.04474, section 3.1; from zero and with D = 10 as in
    Daduryan, "Transferring Learned Optimizers".
    """

    has_test = False
    name = "quadratic"

    def __init__(
        self,
        dimensions: int = 10,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, got {dimensions!r}")
        self.dimensions = dimensions
        self.device = torch.device(device)
        self.dtype = dtype

    @property
    def data_name(self) -> str:
        """Where the instances come from."""
        return "random normal"

    def init(self, generator: torch.Generator) -> tuple[Params, Buffers]:
        """x = 0, and a fresh instance W, y as buffers."""
        d = self.dimensions
        drawn = torch.randn(d, d + 1, generator=generator, device=generator.device)
        drawn = drawn.to(device=self.device, dtype=self.dtype)
        start = torch.zeros(d, device=self.device, dtype=self.dtype)
        return {"x": start}, {"W": drawn[:, :d].contiguous(), "y": drawn[:, d].contiguous()}

    def batch(self, generator: torch.Generator, split: str) -> Batch:
        """Nothing is drawn: the instance is fixed."""
        return ()

    def loss(
        self,
        params: Params,
        buffers: Buffers,
        batch: Batch,
        generator: torch.Generator | None,
        train: bool,
    ) -> tuple[Tensor, Buffers, Metrics]:
        """The sum of squares."""
        residual = buffers["W"] @ params["x"] - buffers["y"]
        return residual.square().sum(), buffers, {}
