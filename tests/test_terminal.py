"""What commands tell: a changing line on a terminal, lines in a log."""

import io
import logging
import os
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepsmith.terminal import Interrupted, Lasting, OneLine, Terminal, guarded, lasting, telling


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
