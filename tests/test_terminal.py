"""What commands tell: a changing line on a terminal, lines in a log."""

import importlib
import io
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepsmith import cli, rules
from stepsmith.rules.base import require_number
from stepsmith.terminal import (
    Interrupted,
    Lasting,
    OneLine,
    Terminal,
    UserCodeError,
    guarded,
    lasting,
    mistake,
    telling,
    users_code,
)


def test_a_log_gets_every_message_as_a_line_with_its_time():
    file = io.StringIO()
    with telling(Console(file=file, highlight=False)) as say:
        say("tuning nag [1/2]")
        assert re.fullmatch(r"\d\d:\d\d:\d\d tuning nag \[1/2\]\n", file.getvalue())
        say("tuning adam")
        say("a :warning: " + 20 * "long ")
    assert len(file.getvalue().splitlines()) == 3
    assert ":warning:" in file.getvalue()


def test_a_terminal_keeps_no_line():
    file = io.StringIO()
    with telling(Console(file=file, force_terminal=True, width=80)) as say:
        say("tuning nag [/v2]")
    assert file.getvalue().endswith("\x1b[2K")  # the line is erased


def test_an_interruption_is_an_ordinary_error():
    @guarded
    def command():
        raise KeyboardInterrupt("saved")

    with pytest.raises(Interrupted, match="saved"):
        command()


def test_a_pipe_whose_reader_went_takes_everything_silently():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:  # closing it writes what it still holds
        lasting_one = Lasting(stream)
        for _ in range(2):
            assert lasting_one.write("text") == 4
            lasting_one.flush()
        assert lasting_one.lost is None


def test_a_disk_that_is_full_is_told_once_all_is_done():
    with open("/dev/full", "w", encoding="utf-8") as stream:
        lasting_one = Lasting(stream)
        lasting_one.write("text")
        lasting_one.flush()
        lasting_one.write("more")
        lasting_one.flush()
        assert isinstance(lasting_one.lost, OSError)


def test_a_closed_stream_loses_what_is_written_and_nothing_else():
    stream = io.StringIO()
    stream.close()
    lasting_one = Lasting(stream)
    lasting_one.write("text")
    lasting_one.flush()
    assert isinstance(lasting_one.lost, ValueError)


def test_letters_that_an_encoding_lacks_become_question_marks():
    kept = io.BytesIO()
    with io.TextIOWrapper(kept, encoding="ascii") as stream:
        Lasting(stream).write("95 % \u00d7 0.9")
        stream.flush()
        assert kept.getvalue() == b"95 % ? 0.9"


def test_other_faults_are_no_loss():
    with pytest.raises(TypeError):
        Lasting(io.StringIO()).write(b"bytes")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_streams_that_there_are_not(monkeypatch, closed):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    before = sys.stdout, sys.stderr
    with lasting() as streams:
        assert len(streams) == 2 - len(closed)
        Terminal().print("text")
        print("text", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("columns", ["0", "1", "19"])
def test_a_width_that_no_line_fits_in_is_not_believed(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    file = io.StringIO()
    Terminal(file=file).print("a line of text, and more of it")
    assert file.getvalue() == "a line of text, and more of it\n"
    monkeypatch.setenv("COLUMNS", "24")
    assert Terminal(file=file).width == 24


HOSTILE = "[red]x[/red] [/] :warning: \x1b[2J \u202e a\nb"
SHOWN = r"[red]x[/red] [/] :warning: \x1b[2J \u202e a\nb"


def test_a_terminals_texts_are_lines_that_say_what_they_say():
    file = io.StringIO()
    terminal = Terminal(file=file, width=200)
    terminal.print(HOSTILE)
    terminal.print("Training", HOSTILE, style="bold")
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    terminal.print(table)
    terminal.print(Text("ours", "bold"), HOSTILE)
    assert file.getvalue().count(SHOWN) == 5
    assert not set("\x1b\u202e") & set(file.getvalue())


@pytest.mark.parametrize("made", [Terminal, Console])
@pytest.mark.parametrize("shows", [True, False])
def test_progress_says_what_it_says(made, shows):
    file = io.StringIO()
    with telling(made(file=file, force_terminal=shows, width=200)) as say:
        say(HOSTILE)
    told = file.getvalue()
    assert SHOWN in told
    assert "\x1b[2J" not in told
    assert "\u202e" not in told


def test_a_terminals_status_says_what_it_says():
    file = io.StringIO()
    with Terminal(file=file, force_terminal=True, width=200).status(HOSTILE):
        pass
    assert SHOWN in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()


def test_messages_of_a_log_are_lines():
    record = logging.LogRecord("a", logging.WARNING, "", 0, "%s: measuring again", (HOSTILE,), None)
    assert OneLine("%(message)s").format(record) == f"{SHOWN}: measuring again"


def raised(make) -> BaseException:
    with pytest.raises(BaseException) as caught:
        make()
    return caught.value


def test_what_a_user_typed_is_told_from_faults_of_this_library():
    def lookup():
        return {}["key"]

    def broken():
        raise RuntimeError("broken")

    for fault in (lookup, broken, lambda: 1 / 0, lambda: None.name, lambda: len(3), lambda: [][1]):
        assert mistake(raised(fault)) is None
    for typed in (
        lambda: int("x"), lambda: Path("/nowhere/at/all").read_text(),
        lambda: rules.make_rule("adm"),
        lambda: require_number("Owner", "lr", "0.1"),  # a TypeError that this library raises
    ):  # fmt: skip
        assert mistake(raised(typed))
    # The same kind of error, where an operation of this library's code fails.
    assert mistake(raised(lambda: rules.base.statistics_dtype(*"ab"))) is None


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)  # fmt: skip
def test_too_little_memory_is_told_in_a_line(error):
    assert mistake(error).startswith("out of memory (")


USERS = {
    "raises": ("def f():\n    raise KeyError('x')\n", "KeyError: 'x'", 2),
    "import_raises": (
        "x = 1\nraise RuntimeError('a\\n[bold]b')\n",
        r"RuntimeError: a \[bold\]b",
        2,
    ),
    "exits": ("def f():\n    raise SystemExit(0)\n", "SystemExit: 0", 2),
    "import_exits": ("raise SystemExit\n", "SystemExit", 1),
    "attribute": ("import os\nos.nothing\n", "AttributeError: module 'os'", 2),
    "import_fails": ("\n\nimport no_such_module_at_all\n", "ModuleNotFoundError", 3),
    "syntax": ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax", 2),
    "recursion": ("def f():\n    return f()\n", "RecursionError", 2),
    "value": ("def f():\n    raise ValueError('bad')\n", "ValueError: bad", 2),
}


@pytest.mark.parametrize("case", USERS)
def test_a_failure_of_the_users_code_says_what_and_where(case, tmp_path, monkeypatch):
    source, said, line = USERS[case]
    name = f"users_{case}"
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    match = rf"task '{name}:f': {said}.*{re.escape(str(path))}, line {line}"
    with pytest.raises(UserCodeError, match=match) as caught, users_code(f"{name}:f"):
        importlib.import_module(name).f()
    assert "\n" not in str(caught.value)
    sys.modules.pop(name, None)


def test_the_users_code_may_fail_later(tmp_path, monkeypatch):
    (tmp_path / "users_late.py").write_text("from users_helper import loss\n")
    (tmp_path / "users_helper.py").write_text("def loss():\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    @guarded
    def command():
        with users_code("users_late:loss"):
            made = importlib.import_module("users_late").loss
        made()

    with pytest.raises(UserCodeError, match=r"ZeroDivisionError: .*users_helper.py, line 2, in lo"):
        command()


def test_this_librarys_own_words_and_faults_pass_through():
    where = {"source": "auto", "data_dir": None}
    with pytest.raises(ValueError, match="must return a Task") as caught:
        cli._made(where, "os:getcwd")
    assert not isinstance(caught.value, UserCodeError)
    for name in ("json:loads", ".:f", ":f", "..a:b"):
        with pytest.raises(UserCodeError, match=f"task '{re.escape(name)}': (Type|Value)Error"):
            cli._made(where, name)

    @guarded
    def command():
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        command()
