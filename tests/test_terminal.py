"""What commands tell: a changing line on a terminal, lines in a log."""

import io
import os
import re
import sys

import pytest
from rich.console import Console

from stepsmith.terminal import Interrupted, Lasting, guarded, lasting, talking, telling


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
        talking().print("text")
        print("text", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("columns", ["0", "1", "19"])
def test_a_width_that_no_line_fits_in_is_not_believed(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    file = io.StringIO()
    talking(file=file).print("a line of text, and more of it")
    assert file.getvalue() == "a line of text, and more of it\n"
    monkeypatch.setenv("COLUMNS", "24")
    assert talking(file=file).width == 24
