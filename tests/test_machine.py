"""What a process says of itself."""

from __future__ import annotations

import subprocess
import sys

from stepsmith.machine import peak_memory

PROGRAM = """
from stepsmith.machine import peak_memory
before = peak_memory()
held = bytearray(300_000_000)
print(before, peak_memory())
"""


def test_a_peak_is_the_processs_own_and_grows_by_what_it_holds():
    mine = bytearray(600_000_000)  # the child's peak must not begin with this
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert 290_000_000 < after - before < 330_000_000
    if sys.platform == "linux":
        assert before < peak_memory() - 100_000_000
    assert len(mine) == 600_000_000
