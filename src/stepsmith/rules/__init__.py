"""What is learned: update rules as pure functions. Needs nothing but torch."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from stepsmith.names import shown, unknown
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


_OF: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool),
          "a whole number"),
    float: (lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number"),
    str: (lambda value: isinstance(value, str), "a text"),
}  # fmt: skip
"""What a field of a type may be in a file; fields of other types are for their class to check."""


def rule_from_config(class_name: str, config: dict[str, Any]) -> Rule:
    """Rebuild a rule from its class name and `Rule.config()`.

    Raises:
        ValueError: unknown class, or fields that are not the class's, missing or of another type.
    """
    if not isinstance(class_name, str) or not isinstance(config, dict):
        raise ValueError(
            f"a rule is the name of its class and a mapping of its fields, got {class_name!r:.80} "
            f"and a {type(config).__name__}"
        )
    if class_name not in _CLASSES:
        raise unknown("rule class", class_name, _CLASSES)
    cls = _CLASSES[class_name]
    fields = {field.name for field in dataclasses.fields(cls)}
    if set(config) - fields:
        odd = ", ".join(sorted(map(str, set(config) - fields)))
        raise ValueError(shown(f"rule class {class_name!r} has no field {odd:.80}"))
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a user's class, made within a function
        hints = {}
    for name, value in config.items():
        fits, what = _OF.get(hints.get(name, object), (None, ""))
        if fits is not None and not fits(value):
            raise ValueError(f"rule class {class_name!r}: {name} must be {what}, got {value!r:.80}")
    try:
        return cls(**config)
    except TypeError as error:
        raise ValueError(f"rule class {class_name!r}: {error}") from None


__all__ = [
    "CLASSIC", "LEARNED", "Carry", "LSTMRule", "Rule", "State", "Weights", "classic", "joined",
    "l2o_dm", "make_rule", "register", "rnnprop", "rule_from_config", "statistics_dtype",
]  # fmt: skip
