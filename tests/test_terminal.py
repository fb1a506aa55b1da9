"""What commands tell: a changing line on a terminal, lines in a log."""

import io
import re

import pytest
from rich.console import Console

from stepsmith.terminal import Interrupted, guarded, telling


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
