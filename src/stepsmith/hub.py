"""Trained rules: the rule, its weights and how they came to be, in one file; the bundled ones."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from stepsmith import store
from stepsmith.names import unknown
from stepsmith.rules import Rule, Weights, rule_from_config
from stepsmith.rules.trust import usual_trust
from stepsmith.store import CheckpointError
from stepsmith.version import __version__

BUNDLED = ("quadratic", "mlp-mnist", "mlp-mnist-1000", "convnet-mnist", "general-warmed")
"""Rules that come with the package, named after the task they were meta-trained on, for 100 steps
(the quadratic's for 300) or as many as the name says; the general one was on a dozen tasks."""


Check = Callable[[Any], str]
"""Says what is wrong with a value and where, such as `[2] should be a text, is 3`; empty where
nothing is."""

PARENTS = 256
"""Meta-trainings that a rule may have gone on from, one after another."""

_LARGEST = 2**63 - 1


def _is(what: str, fits: Callable[[Any], bool]) -> Check:
    return lambda value: "" if fits(value) else f" should be {what}, is {value!r:.60}"


def _list(check: Check) -> Check:
    def checked(value: Any) -> str:
        if not isinstance(value, list | tuple):
            return f" should be a list, is {value!r:.60}"
        wrong = ((place, check(part)) for place, part in enumerate(value))
        return next((f"[{place}]{why}" for place, why in wrong if why), "")

    return checked


def _record(fields: Mapping[str, Check], needed: tuple[str, ...] = ()) -> Check:
    """Of a mapping with these fields, some of them needed; what it has besides is let be."""

    def checked(value: Any) -> str:
        if not isinstance(value, Mapping):
            return f" should be a mapping, is {value!r:.60}"
        for name in needed:
            if name not in value:
                return f" lacks {name!r}"
        wrong = ((name, fields[name](part)) for name, part in value.items() if name in fields)
        return next((f".{name}{why}" for name, why in wrong if why), "")

    return checked


def _whole(least: int) -> Check:
    def fits(value: Any) -> bool:
        is_one = isinstance(value, Integral) and not isinstance(value, bool)
        return is_one and least <= int(value) <= _LARGEST

    return _is(f"a whole number >= {least}", fits)


def _number(value: Any) -> bool:
    is_one = isinstance(value, Real) and not isinstance(value, bool)
    return is_one and -_LARGEST <= value <= _LARGEST  # pyright: ignore[reportOperatorIssue]


def _score(value: Any) -> bool:
    return _number(value) or isinstance(value, float)  # a run that diverged has one too


def _text(value: Any) -> bool:
    # JSON can hold halves of characters, which no other file and no terminal takes.
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


_TEXT = _is("a text", _text)
_SPENT = _is("a finite number >= 0", lambda value: _number(value) and value >= 0)
_SCORE = _is("a number", _score)
_PLAIN = _is("a number or a text", lambda value: isinstance(value, str) or _number(value))
_SETTING = _is(
    "a number, a text, a list of them or nothing",
    lambda value: value is None or all(
        isinstance(part, str | bool) or _score(part)
        for part in (value if isinstance(value, list | tuple) else [value])
    ),
)  # fmt: skip


def _each(check: Check) -> Check:
    def checked(value: Any) -> str:
        if not isinstance(value, Mapping):
            return f" should be a mapping, is {value!r:.60}"
        wrong = ((name, check(part)) for name, part in value.items())
        return next((f".{name}{why}" for name, why in wrong if why), "")

    return checked


def _settings(value: Any) -> str:
    return _each(_SETTING)(value) or _record({"validation_split": _TEXT})(value)


def _parameters(value: Any) -> str:
    return (_list(_whole(0)) if isinstance(value, list | tuple) else _whole(0))(value)


_FIELDS: dict[str, Check] = {
    "name": _TEXT, "tasks": _list(_TEXT), "data": _TEXT, "horizon": _whole(1),
    "parameters": _parameters, "meta_training": _settings,
    "validation": _record({"loss": _TEXT, "score": _SCORE}),
    "validations": _list(
        _record(
            {"inner_steps": _whole(0), "score": _SCORE, "scores": _list(_SCORE),
             "seconds": _SPENT},
            ("inner_steps", "score"),
        )
    ),
    "seconds": _SPENT, "core_seconds": _SPENT, "inner_steps": _whole(0), "updates": _whole(0),
    "skipped": _whole(0), "diverged": _whole(0), "machine": _each(_PLAIN),
    "curriculum": _list(
        _record(
            {"horizon": _whole(1), "window": _whole(1), "validation_horizon": _whole(1),
             "inner_steps": _whole(0), "updates": _whole(0), "seconds": _SPENT,
             "core_seconds": _SPENT, "ended": _TEXT, "scores": _list(_SCORE),
             "fingerprint": _TEXT},
            ("horizon", "inner_steps", "ended"),
        )
    ),
    "changed_afterwards": _each(_SETTING), "trust": _each(_is("a finite number", _number)),
    "torch": _TEXT, "version": _TEXT, "licence": _TEXT,
    "fingerprint": _TEXT,
}  # fmt: skip
"""What the fields of a manifest may be. Others, of later versions, are let be."""


def _require_manifest(manifest: Any) -> None:
    """Check a manifest and those of the rules it went on from.

    Raises:
        CheckpointError: names the first field that is of another type or out of range.
    """
    where = "manifest"
    for _ in range(PARENTS + 1):
        wrong = _record(_FIELDS)(manifest)
        if wrong:
            raise CheckpointError(f"the {where}{wrong}")
        if "parent" not in manifest:
            return
        manifest, where = manifest["parent"], f"{where}.parent"
        wrong = _record({}, ("fingerprint",))(manifest)
        if wrong:
            raise CheckpointError(f"the {where}{wrong}")
    raise CheckpointError(f"the manifest has more than {PARENTS} parents, one within another")


_RULE = "rule.safetensors"


@dataclass(frozen=True)
class TrainedRule:
    """A rule with weights, and where they come from.

    Args:
        rule: the definition.
        weights: by name, float32.
        manifest: JSON-able, and each of these of its type: `meta_training` (configuration),
            `tasks`, `horizon` (steps an episode lasted), `validation`, `seconds`, `core_seconds`,
            `machine` (that it ended on),
            `licence`, `version`, `name`; `changed_afterwards`: fields of the rule that were other
            when it was meta-trained and validated.

    Raises:
        CheckpointError: weights missing, superfluous, of the wrong shape for the rule, not
            floating-point or not finite; or a field of the manifest of another type.
    """

    rule: Rule
    weights: Weights
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _require_manifest(self.manifest)
        try:
            usual_trust(self.rule, self.manifest)
        except ValueError as error:
            raise CheckpointError(f"the manifest's {error}") from None
        spare = {key: tuple(value.shape) for key, value in self.weights.items()}
        # One by one: a rule may say that it has a thousand million of them.
        for key, shape in self.rule.shapes():
            self._require_shape(key, shape, spare.pop(key, None))
        for key, shape in spare.items():
            self._require_shape(key, None, shape)
        for key, value in self.weights.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                found = "nan or infinite" if value.is_floating_point() else str(value.dtype)
                raise CheckpointError(
                    f"weights of {type(self.rule).__name__}: {key!r} should be finite "
                    f"floating-point numbers, is {found}; the file is damaged, or meta-training "
                    "diverged"
                )

    def _require_shape(
        self, key: str, want: tuple[int, ...] | None, have: tuple[int, ...] | None
    ) -> None:
        if want != have:
            raise CheckpointError(
                f"weights do not fit {type(self.rule).__name__}: {key!r} should have shape {want}, "
                f"has {have}; load them with the rule they were trained for"
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


def save(trained: TrainedRule, path: str | Path) -> Path:
    """Write a trained rule as one safetensors file with its JSON manifest inside, atomically.

    Args:
        trained: the rule and its weights.
        path: the file; `.safetensors` is added where it has no suffix. In a folder that is there,
            `rule.safetensors`, which `load` reads of it.

    Returns:
        The path written.

    Raises:
        CheckpointError: the disk refuses.
        TypeError: the manifest holds something that JSON does not know, or no path was given.
        ValueError: an empty path.
    """
    given = store.place("save", path)
    path = given / _RULE if given.is_dir() else store.suffixed(given)
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
        name_or_path: a file that `save` wrote, with or without its `.safetensors`; one of
            `BUNDLED`, where no file is called just so; or the folder of a meta-training that has
            ended.

    Raises:
        CheckpointError: missing, corrupted or foreign file, weights that do not fit the rule, or a
            manifest whose fields are not of their types.
        TypeError: neither a name nor a path.
        ValueError: a name that is neither bundled nor a file, or an empty one.

    >>> load("mlp-mnist").horizon
    100
    """
    path = store.place("load", name_or_path)
    if str(name_or_path) in BUNDLED and not path.is_file():
        source = resources.files("stepsmith") / "data" / "rules" / f"{name_or_path}.safetensors"
        with resources.as_file(source) as bundled:
            return _load_file(bundled)
    if path.suffix != ".safetensors" and not os.path.lexists(path):
        saved = store.suffixed(path)
        if saved.exists():
            return _load_file(saved)
        if re.fullmatch(r"[\w.-]+", str(name_or_path)):
            raise unknown("bundled rule", str(name_or_path), BUNDLED)
        raise CheckpointError(f"{path}: no such file")
    return _load_file(path / _RULE if path.is_dir() else path)


def _load_file(path: Path) -> TrainedRule:
    tensors, manifest = store.read(path, "rule", store.LONGEST_MANIFEST)
    try:
        described = manifest["rule"]
        rule = rule_from_config(described["class"], described["config"])
        return TrainedRule(rule, tensors, manifest)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the manifest lacks or garbles {error}") from None
    except (ValueError, OverflowError) as error:
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
