"""Names are data: shown as they are, and fit to call files after."""

from __future__ import annotations

import pytest

from stepsmith.names import LONGEST, file_name, shown, unknown


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("mlp-mnist", "mlp-mnist"),
        ("Größe × 中文 √ 👍", "Größe × 中文 √ 👍"),
        ("a\u00a0b\u3000c", "a\u00a0b\u3000c"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\nc\td\x00e\x7f", r"a\rb\nc\td\x00e\x7f"),
        ("a\u2028b\u0085c", r"a\u2028b\x85c"),
        ("\u202ecba\u202c \u2066x\u2069 \u200f", r"\u202ecba\u202c \u2066x\u2069 \u200f"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("half \ud800", r"half \ud800"),
        ("[red]$x^2$</b>{{1}}", "[red]$x^2$</b>{{1}}"),
    ],
)
def test_what_cannot_be_seen_becomes_an_escape(text, want):
    assert shown(text) == want
    assert shown(want) == want
    shown(text).encode()


def test_line_breaks_stay_where_a_place_has_lines():
    assert shown("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_unknown_names_are_listed_in_one_line():
    message = str(unknown("task", "mlp\x1b[2J", ["a\nb", "mlp"]))
    assert message == r"unknown task 'mlp\x1b[2J'; known: a\nb, mlp. Did you mean 'mlp'?"


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "...", ".hidden", "../../etc/passwd", "a/b", "a\\b", "a\nb", "a\0b", "con",
        "NUL.txt", "com1", "lpt9.a.b", "x" * 5000, "é" * 200, "trailing.", "half \ud800", " ", "~",
        "\u202e", "a:b", 'a"b*?<>|',
    ],
)  # fmt: skip
def test_any_name_makes_a_files_name(tmp_path, name):
    made = file_name(name)
    assert len(made.encode()) <= LONGEST
    assert file_name(made) == made
    assert made[0] != "." != made[-1]
    assert made.partition(".")[0].lower() not in ("con", "nul", "com1", "lpt9")
    path = tmp_path / made
    path.write_text("")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["mlp-mnist@1000@shift", "resnet8_x.y", "Größe", "console"])
def test_names_that_files_may_have_are_kept(name):
    assert file_name(name) == name


def test_long_names_that_differ_at_their_ends_make_two_files():
    assert file_name("x" * 300 + "a") != file_name("x" * 300 + "b")
