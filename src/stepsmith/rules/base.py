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
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
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


def is_number(value: Any) -> bool:
    """Whether it is an int, a float or a scalar of NumPy's; bools and tensors are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral)


LARGEST_NUMBER = torch.finfo(torch.float32).max
"""What float32 holds: larger arguments would be infinite where they are used."""


def require_number(
    owner: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Check an argument that is a finite number.

    Args:
        owner, name: whose it is and what it is called, for messages.
        value: an int, a float or a NumPy scalar.
        above, least: it must be greater than the one, not less than the other.
        below, most: it must be less than the one, not greater than the other.

    Returns:
        The number, a NumPy scalar as one of Python's, which JSON knows.

    Raises:
        TypeError: no number (bools and tensors are none).
        ValueError: not finite, beyond what float32 holds, or out of range.
    """
    if not is_number(value):
        raise TypeError(f"{owner}: {name} must be a number, got {_shown(value)}")
    number = value if type(value) in (int, float) else _plain(value)
    outside = (
        (above is not None and number <= above) or (least is not None and number < least)
        or (below is not None and number >= below) or (most is not None and number > most)
    )  # fmt: skip
    if outside or not -LARGEST_NUMBER <= number <= LARGEST_NUMBER:
        low, high = above if least is None else least, below if most is None else most
        if low is not None and high is not None:
            bounds = f"{'[' if above is None else '('}{low}, {high}{']' if below is None else ')'}"
            raise ValueError(f"{owner}: {name} must lie in {bounds}, got {_short(value)}")
        sides = [(">", above), (">=", least), ("<", below), ("<=", most)]
        bounds = "".join(f" {sign} {bound}" for sign, bound in sides if bound is not None)
        raise ValueError(f"{owner}: {name} must be a finite number{bounds}, got {_short(value)}")
    return number


def require_count(
    owner: str, name: str, value: Any, *, least: int = 1, most: int = 2**63 - 1
) -> int:
    """Check an argument that is a whole number.

    Args:
        owner, name: whose it is and what it is called, for messages.
        value: an int or a NumPy integer.
        least, most: the smallest and the largest allowed.

    Returns:
        The number, as one of Python's.

    Raises:
        TypeError: no number (bools and tensors are none).
        ValueError: not whole, or out of range.
    """
    if not is_number(value):
        raise TypeError(f"{owner}: {name} must be a whole number, got {_shown(value)}")
    if not _is_whole(value):
        raise ValueError(f"{owner}: {name} must be at least {least} and whole, got {_short(value)}")
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{owner}: {name} must be {bound}, got {_short(value)}")
    return int(value)


def require_flag(owner: str, name: str, value: Any) -> bool:
    """Check an argument that is True or False; returns it as Python's.

    Raises:
        TypeError: neither.
    """
    # NumPy's is no bool, and no module of this package needs NumPy.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{owner}: {name} must be True or False, got {_shown(value)}")
    return bool(value)


def require_kind(owner: str, name: str, value: Any, kind: Any, hint: str = "") -> None:
    """Raise TypeError where `value` is no instance of `kind`, a class or a union of classes; `hint`
    says what to pass."""
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", str(kind))
        said = f"; {hint}" if hint else ""
        raise TypeError(f"{owner}: {name} must be of type {wanted}, got {_shown(value)}{said}")


def require_positive(owner: str, **values: Any) -> None:
    """Raise ValueError naming `owner` and the first of `values` that is not a finite number > 0,
    TypeError where it is no number at all."""
    for name, value in values.items():
        require_number(owner, name, value, above=0)


def require_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError listing `choices` where `value` is none of them, TypeError where it is no
    text."""
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} must be one of {', '.join(choices)}; got {_shown(value)}")
    if value not in choices:
        raise ValueError(
            f"{owner}: {name} must be one of {', '.join(choices)}; got {_short(value)}"
        )


def set_checked(frozen: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is made: numbers of NumPy's become Python's."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def _plain(value: Any) -> float:
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:  # a fraction beyond all floats
        return math.inf


def _shown(value: Any) -> str:
    """A value for a message, with its type."""
    return f"{_short(value)} ({type(value).__name__})"


def _short(value: Any) -> str:
    """A value for a message: short, and on one line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
