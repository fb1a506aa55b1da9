"""What commands tell: a changing line on a terminal, lines in a log."""

import io
import logging
import re

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepsmith.terminal import Interrupted, OneLine, Terminal, guarded, telling


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
