"""Arguments are checked when an object is made: numbers, whole numbers, flags and choices."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from stepsmith import make_rule, register
from stepsmith.rules import CLASSIC, LSTMRule, classic
from stepsmith.rules.base import (
    require_choice,
    require_count,
    require_flag,
    require_kind,
    require_number,
    require_positive,
)
from stepsmith.rules.features import FeatureSet, Moments, log_sign
from stepsmith.rules.units import RelativeUnits

NO_NUMBERS = ["1", "", None, True, False, np.bool_(True), [1], (1,), {}, 1j, torch.tensor(1.0),
              torch.ones(1), torch.ones(2), np.ones(1), object()]  # fmt: skip
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), 10**400, 1e99]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda given: type(given).__name__)
def test_what_is_no_number_is_a_type_error_that_names_it(value):
    for check in (require_number, require_count):
        with pytest.raises(TypeError, match=rf"Owner: size must be a .*{type(value).__name__}"):
            check("Owner", "size", value)


@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda given: type(given).__name__)
def test_numbers_that_are_not_finite_in_float32_are_refused(value):
    with pytest.raises(ValueError, match="Owner: size must be a finite number, got"):
        require_number("Owner", "size", value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        ({"above": 0}, [1e-30, 7], [0, 0.0, -1], "must be a finite number > 0, got"),
        ({"least": 0}, [0, 0.0, 7], [-1e-30], "must be a finite number >= 0, got"),
        ({"least": 0, "below": 1}, [0, 0.999], [1, -0.1, 1.0], r"must lie in \[0, 1\), got"),
        ({"above": 0, "most": 1}, [1, 1e-9], [0, 1.1], r"must lie in \(0, 1\], got"),
        ({"least": -1, "most": 1}, [-1, 0, 1], [-2, 2], r"must lie in \[-1, 1\], got"),
    ],
)
def test_ranges_of_numbers(bounds, inside, outside, said):
    assert [require_number("Owner", "size", value, **bounds) for value in inside] == inside
    for value in outside:
        with pytest.raises(ValueError, match=said):
            require_number("Owner", "size", value, **bounds)


@pytest.mark.parametrize("value", [1.5, 2.0, math.nan, math.inf, np.float32(2), Fraction(5, 2)])
def test_a_count_must_be_whole(value):
    with pytest.raises(ValueError, match="Owner: size must be at least 1 and whole, got"):
        require_count("Owner", "size", value)


def test_ranges_of_counts():
    assert [require_count("Owner", "size", value, least=0, most=3) for value in (0, 3)] == [0, 3]
    for value, said in ((-1, "at least 0"), (4, "at most 3"), (10**5000, "a number of .* bits")):
        with pytest.raises(ValueError, match=said):
            require_count("Owner", "size", value, least=0, most=3)


@pytest.mark.parametrize(
    ("given", "plain"),
    [(np.int64(3), int), (np.uint8(3), int), (np.float32(3), float), (np.float64(3), float),
     (Fraction(3), float)],
)  # fmt: skip
def test_scalars_become_pythons_own(given, plain):
    number = require_number("Owner", "size", given)
    assert type(number) is plain
    assert number == 3
    json.dumps(number)
    if plain is int:
        assert type(require_count("Owner", "size", given)) is int


def test_flags_kinds_and_choices():
    assert require_flag("Owner", "on", np.bool_(True)) is True
    for value in (0, 1, "yes", None, torch.tensor(True)):
        with pytest.raises(TypeError, match="Owner: on must be True or False"):
            require_flag("Owner", "on", value)
    require_kind("Owner", "of", 3, int | str)
    with pytest.raises(TypeError, match=r"of must be of type int \| str, got 0.5 \(float\); give"):
        require_kind("Owner", "of", 0.5, int | str, "give one")
    with pytest.raises(ValueError, match="kind must be one of a, b; got 'c'"):
        require_choice("Owner", "kind", "c", ("a", "b"))
    for value in (None, 1, ["a"], torch.ones(2), np.array(["a", "b"])):
        with pytest.raises(TypeError, match="kind must be one of a, b; got"):
            require_choice("Owner", "kind", value, ("a", "b"))
    with pytest.raises(ValueError, match="Owner: lr must be a finite number > 0"):
        require_positive("Owner", lr=0)


WRONG = {
    "hidden": (0, -1, 1.5, 2.0, "8", True, None, math.nan, 10**9),
    "layers": (0, 1.5, "1", True, None, 10**6),
    "step_scale": (0, -1.0, math.nan, math.inf, 1e99, "0.1", True, None, torch.tensor(0.1)),
    "start": (math.nan, math.inf, "0", True, None),
    "bias": (0, 1, "no", None),
    "beta1": (-0.1, 1.0, math.nan, "0.9", None, True),
    "beta2": (-0.1, 1.0, 2, math.inf, "0.9"),
    "inputs": ("", "Raw", None, 3, ["raw"]),
    "output": ("relu", None, 0),
    "frame": ("still", None, 0),
    "scaling": ("log", None, 0, []),
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_lstm_rules_refuse(name, value):
    with pytest.raises((ValueError, TypeError), match="must"):
        LSTMRule(**{name: value})


@pytest.mark.parametrize("name", ["l2o_dm", "rnnprop"])
def test_faithful_is_a_flag(name):
    with pytest.raises(ValueError, match="faithful must be True or False"):
        make_rule(name, faithful="no")


def test_a_rule_of_numpy_numbers_is_the_same_rule():
    given = LSTMRule(np.int64(4), np.int32(1), step_scale=np.float64(0.5), bias=np.bool_(True))
    assert given == LSTMRule(4, 1, step_scale=0.5)
    assert json.loads(json.dumps(given.config())) == LSTMRule(4, 1, step_scale=0.5).config()


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf, 1e99, "0.1", None, True, [0.1]])
def test_classic_rules_refuse_what_is_no_rate(name, lr):
    with pytest.raises(ValueError, match="lr must be a"):
        make_rule(name, lr=lr)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (classic.SGD, {"nesterov": "no"}), (classic.SGD, {"momentum": "0.9"}),
        (classic.Adam, {"decoupled": 1}), (classic.Adam, {"beta2": 1.0}),
        (classic.Adam, {"eps": math.nan}), (classic.RMSprop, {"alpha": 1.5}),
        (classic.RMSprop, {"centered": None}), (classic.Adagrad, {"lr_decay": -1}),
    ],
)  # fmt: skip
def test_classic_rules_refuse_other_arguments(make, wrong):
    (name,) = wrong
    with pytest.raises((ValueError, TypeError), match=f"{make.__name__}: {name} must"):
        make(**wrong)


@pytest.mark.parametrize("p", [0, -1.0, math.nan, math.inf, 1000.0, "10", None, torch.ones(1)])
def test_the_cutoff_of_log_sign_is_checked(p):
    with pytest.raises((ValueError, TypeError), match=r"p must be"):
        log_sign(torch.ones(2), p)
    with pytest.raises((ValueError, TypeError), match=r"p must be"):
        FeatureSet("log_sign", "none", p=p)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (Moments, {"eps": -1.0}), (Moments, {"beta1": "0.9"}), (RelativeUnits, {"beta": 1.0}),
        (RelativeUnits, {"floor": 0.0}), (RelativeUnits, {"warmup": 0}),
        (RelativeUnits, {"warmup": 2.5}),
    ],
)  # fmt: skip
def test_parts_of_rules_refuse(make, wrong):
    (name,) = wrong
    with pytest.raises((ValueError, TypeError), match=f"{make.__name__}: {name} must"):
        make(**wrong)


def test_names_and_classes_of_another_type():
    for name in (None, 3, ["adam"]):
        with pytest.raises(TypeError, match="make_rule: name must be of type str"):
            make_rule(name)
    for cls in (int, "LSTMRule", LSTMRule()):
        with pytest.raises(TypeError, match="register: expected a subclass of Rule"):
            register(cls)
