"""What is learned: update rules as pure functions. Needs nothing but torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from stepsmith.names import unknown
from stepsmith.rules import classic
from stepsmith.rules.base import Carry, Rule, State, Weights, require_kind, statistics_dtype
from stepsmith.rules.joined import joined
from stepsmith.rules.l2o_dm import l2o_dm
from stepsmith.rules.lstm import LSTMRule
from stepsmith.rules.rnnprop import rnnprop

LEARNED: dict[str, Callable[..., Rule]] = {"joined": joined, "l2o_dm": l2o_dm, "rnnprop": rnnprop}
"""Rules that are meta-trained, by name."""

CLASSIC: dict[str, Callable[..., Rule]] = {
    "sgd": classic.sgd,
    "momentum": classic.momentum,
    "nesterov": classic.nesterov,
    "adam": classic.Adam,
    "adamw": classic.adamw,
    "rmsprop": classic.RMSprop,
    "adagrad": classic.Adagrad,
}
"""Hand-designed optimizers as rules, by name."""

_CLASSES: dict[str, type[Rule]] = {
    cls.__name__: cls
    for cls in (LSTMRule, classic.SGD, classic.Adam, classic.RMSprop, classic.Adagrad)
}


def make_rule(name: str, **arguments: Any) -> Rule:
    """Make a rule by name.

    Args:
        name: one of `LEARNED` or `CLASSIC`.
        arguments: the rule's own arguments (hidden, layers, inputs, step_scale, lr, ...).

    Raises:
        ValueError: unknown name (the message lists the known ones and the nearest), or an argument
            the rule does not take or of a type it does not take.
        TypeError: a name that is no text.

    >>> make_rule("rnnprop", hidden=4).hidden
    4
    """
    known = LEARNED | CLASSIC
    require_kind("make_rule", "name", name, str, "one of its names, such as 'joined'")
    if name not in known:
        raise unknown("rule", name, known)
    try:
        return known[name](**arguments)
    except TypeError as error:
        raise ValueError(f"rule {name!r}: {error}") from None


def register(cls: type[Rule]) -> type[Rule]:
    """Let `load` rebuild a user's own rule class (a decorator).

    Raises:
        ValueError: another class has this name.
        TypeError: no class of rules.
    """
    if not isinstance(cls, type) or not issubclass(cls, Rule):
        raise TypeError(f"register: expected a subclass of Rule, got {cls!r}")
    if _CLASSES.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"a rule class named {cls.__name__!r} is registered already; rename it")
    return cls


def rule_from_config(class_name: str, config: dict[str, Any]) -> Rule:
    """Rebuild a rule from its class name and `Rule.config()`.

    Raises:
        ValueError: unknown class, or fields that are not the class's, missing or of another type.
    """
    if class_name not in _CLASSES:
        raise unknown("rule class", class_name, _CLASSES)
    cls = _CLASSES[class_name]
    fields = {field.name for field in dataclasses.fields(cls)}
    if set(config) - fields:
        odd = ", ".join(sorted(set(config) - fields))
        raise ValueError(f"rule class {class_name!r} has no field {odd}")
    try:
        return cls(**config)
    except TypeError as error:
        raise ValueError(f"rule class {class_name!r}: {error}") from None


__all__ = [
    "CLASSIC", "LEARNED", "Carry", "LSTMRule", "Rule", "State", "Weights", "classic", "joined",
    "l2o_dm", "make_rule", "register", "rnnprop", "rule_from_config", "statistics_dtype",
]  # fmt: skip
