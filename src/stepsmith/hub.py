"""Trained rules: the rule, its weights and how they came to be, in one file; the bundled ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepsmith import store
from stepsmith.names import unknown
from stepsmith.rules import Rule, Weights, rule_from_config
from stepsmith.store import CheckpointError
from stepsmith.version import __version__

BUNDLED = ("quadratic", "mlp-mnist", "mlp-mnist-1000", "convnet-mnist", "general-warmed")
"""Rules that come with the package, named after the task they were meta-trained on, for 100 steps
(the quadratic's for 300) or as many as the name says; the general one was on a dozen tasks."""


@dataclass(frozen=True)
class TrainedRule:
    """A rule with weights, and where they come from.

    Args:
        rule: the definition.
        weights: by name, float32.
        manifest: JSON-able: `meta_training` (configuration), `tasks`, `horizon` (steps an episode
            lasted), `validation`, `seconds`, `core_seconds`, `machine` (that it ended on),
            `licence`, `version`, `name`; `changed_afterwards`: fields of the rule that were other
            when it was meta-trained and validated.

    Raises:
        CheckpointError: weights missing, superfluous, of the wrong shape for the rule, not
            floating-point or not finite.
    """

    rule: Rule
    weights: Weights
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        want = {key: tuple(value.shape) for key, value in self.rule.init(_seeded()).items()}
        have = {key: tuple(value.shape) for key, value in self.weights.items()}
        for key in sorted(want.keys() | have.keys()):
            if want.get(key) != have.get(key):
                raise CheckpointError(
                    f"weights do not fit {type(self.rule).__name__}: {key!r} should have shape "
                    f"{want.get(key)}, has {have.get(key)}; load them with the rule they were "
                    "trained for"
                )
        for key, value in self.weights.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                found = "nan or infinite" if value.is_floating_point() else str(value.dtype)
                raise CheckpointError(
                    f"weights of {type(self.rule).__name__}: {key!r} should be finite "
                    f"floating-point numbers, is {found}; the file is damaged, or meta-training "
                    "diverged"
                )

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.weights.values())
        return f"TrainedRule({self.name!r}, {self.rule!r}, {count:,} weights)"

    @property
    def name(self) -> str:
        """Name for tables and records."""
        return str(self.manifest.get("name", type(self.rule).__name__))

    @property
    def horizon(self) -> int | None:
        """Steps an episode lasted in meta-training, where known."""
        return self.manifest.get("horizon")

    @property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return store.fingerprint(self.weights)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with the manifest inside; see `save`."""
        return save(self, path)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def save(trained: TrainedRule, path: str | Path) -> Path:
    """Write a trained rule as one safetensors file with its JSON manifest inside, atomically.

    Args:
        trained: the rule and its weights.
        path: the file; `.safetensors` is added where it has no suffix.

    Returns:
        The path written.

    Raises:
        CheckpointError: the disk refuses.
        TypeError: the manifest holds something that JSON does not know.
    """
    path = store.suffixed(path)
    manifest = {
        "licence": "Apache-2.0",
        "version": __version__,
        **trained.manifest,
        "kind": "rule",
        "rule": {"class": type(trained.rule).__name__, "config": trained.rule.config()},
    }
    store.write(path, trained.weights, manifest)
    return path


def load(name_or_path: str | Path) -> TrainedRule:
    """Load a bundled rule by name, or a saved one by path. Needs no network.

    Args:
        name_or_path: one of `BUNDLED`, a file that `save` wrote, or the folder of a meta-training
            that has ended.

    Raises:
        CheckpointError: missing, corrupted or foreign file, or weights that do not fit the rule.
        ValueError: a name that is neither bundled nor a file.

    >>> load("mlp-mnist").horizon
    100
    """
    path = Path(name_or_path)
    if str(name_or_path) in BUNDLED and not path.is_file():
        source = resources.files("stepsmith") / "data" / "rules" / f"{name_or_path}.safetensors"
        with resources.as_file(source) as bundled:
            return _load_file(bundled)
    if path.suffix != ".safetensors" and not path.exists():
        if re.fullmatch(r"[\w.-]+", str(name_or_path)):
            raise unknown("bundled rule", str(name_or_path), BUNDLED)
        raise CheckpointError(f"{path}: no such file")
    return _load_file(path / "rule.safetensors" if path.is_dir() else path)


def _load_file(path: Path) -> TrainedRule:
    tensors, manifest = store.read(path, "rule")
    try:
        described = manifest["rule"]
        rule = rule_from_config(described["class"], described["config"])
        return TrainedRule(rule, tensors, manifest)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the manifest lacks or garbles {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def as_trained(rule: Rule | TrainedRule | str | Path) -> TrainedRule:
    """Accept a trained rule, a name or path, or a rule without weights.

    Raises:
        TypeError: something else.
        ValueError: a learned rule without its weights.
    """
    if isinstance(rule, TrainedRule):
        return rule
    if isinstance(rule, str | Path):
        return load(rule)
    if not isinstance(rule, Rule):
        raise TypeError(
            f"expected a rule, a TrainedRule, a name or a path; got {type(rule).__name__}"
        )
    if rule.learned:
        raise ValueError(
            f"{type(rule).__name__} has weights to learn: meta-train it with stepsmith.meta_train, "
            "or load a trained one with stepsmith.load"
        )
    weights: dict[str, Tensor] = {}
    return TrainedRule(rule, weights, {"name": type(rule).__name__.lower()})
