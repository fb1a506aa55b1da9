"""The contract of an update rule: features -> network -> step.

Shape letters: N = coordinates of one flattened tensor, F = features, O = outputs of the network,
K = channels of one carried tensor. Channels come first and coordinates last, because one channel
of many coordinates is then contiguous, which is what vector units and cache lines want.

The three parts are separate because everything else treats them differently:

* `features` runs statistics and normalisation. It is never differentiated in meta-training.
* `network` is the learned part, recurrent per coordinate; the only part that is differentiated.
* `step` scales the output; differentiable and coordinatewise.

All three are pure: they write to no argument and read no global, clock or device.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stepsmith.rules.units import RelativeUnits

Weights = Mapping[str, Tensor]
"""The learned numbers phi of a rule, by name."""

State = dict[str, Tensor]
"""Running statistics. Plain tensors under plain keys, so that they stack, shard and save."""

Carry = dict[str, Tensor]
"""The recurrent state of the network, one (K, N) tensor a key."""

Coupling = Literal["none", "features", "network"]


@dataclass(frozen=True)
class Rule(ABC):
    """A rule's definition: hyper-parameters in frozen fields, pure functions, no weights inside.

    Class attributes:
        coupling: which part mixes the coordinates of a tensor. `"none"`: nothing does, so that all
            tensors and all copies of an optimizee may be handled as one long vector. `"features"`:
            statistics are per tensor (a root mean square, say); meta-training may still sample
            coordinates, since features are constants there. `"network"`: network or step mix
            coordinates; a sampled replay would be biased, and meta-training refuses to sample.
        reads_param: whether `features` reads the parameter; where not, it may be handed anything
            of the right shape, which saves a copy.
        per_tensor: keys of `init_state` that hold one number a tensor (shape ()), such as the step
            count, which every rule keeps as `step`. All other keys hold one number a coordinate
            (shape (N,)). Where `coupling` is `"none"`, per-tensor numbers may depend on nothing but
            the number of steps.
    """

    coupling: ClassVar[Coupling] = "none"
    reads_param: ClassVar[bool] = True
    per_tensor: ClassVar[frozenset[str]] = frozenset({"step"})

    @property
    def learned(self) -> bool:
        """Whether the rule has weights to learn (the classic rules have none)."""
        return True

    @property
    def units(self) -> RelativeUnits | None:
        """What gradients and steps are measured in; None: as they are."""
        return None

    @abstractmethod
    def init(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw fresh weights (float32, CPU)."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights, of which a file's are held against the first before the
        next is asked for, and before anything of such a size is made.

        From `init` on PyTorch's meta device, which makes nothing. A rule whose `init` cannot run
        there makes its weights for it, and should say their shapes itself where they may be large.
        """
        try:
            with torch.device("meta"):
                made = self.init()
        except Exception:  # whatever a user's own code says there, it says again here
            made = self.init(torch.Generator().manual_seed(0))
        for name, value in made.items():
            yield name, tuple(value.shape)

    @abstractmethod
    def init_state(self, param_N: Tensor) -> State:
        """Statistics before the first step.

        Args:
            param_N: (N,) parameter, in the dtype of the statistics (float32 or float64).

        Returns:
            (N,) tensors, and () tensors for the keys in `per_tensor`.
        """

    @abstractmethod
    def init_carry(
        self, n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Carry:
        """Recurrent state before the first step: (K, n) tensors, the same for every coordinate."""

    @abstractmethod
    def features(
        self, grad_N: Tensor, param_N: Tensor, state: State, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None, State]:
        """Turn one gradient into the network's inputs.

        A rule with `coupling == "none"` must be elementwise: the engine then calls it on tensors
        with any leading dimensions, per-tensor statistics broadcasting against the last one.

        Args:
            grad_N: (N,) gradient, loss units per parameter unit.
            param_N: (N,) parameter.
            state: the statistics so far.
            shape: the tensor's own shape, for rules that read rows and columns.

        Returns:
            (F, N) features, an optional (N,) scale handed to `step`, and the new statistics.
        """

    @abstractmethod
    def network(self, weights: Weights, features_FN: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """The learned part: (F, N) features to (O, N) output, and the new carry."""

    @abstractmethod
    def step(self, output_ON: Tensor, scale_N: Tensor | None) -> Tensor:
        """Turn the output into the step (N,), parameter units; it is *added* to the parameter."""

    def config(self) -> dict[str, Any]:
        """The fields, as JSON-able values."""
        return dataclasses.asdict(self)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float64 where the parameter is, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_positive(owner: str, **values: float) -> None:
    """Raise ValueError naming `owner` and the first of `values` that is not a finite number > 0."""
    for name, value in values.items():
        if not (0 < value < float("inf")):
            raise ValueError(f"{owner}: {name} must be a finite number > 0, got {value!r}")


def require_choice(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError listing `choices` where `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(choices)}; got {value!r}")
