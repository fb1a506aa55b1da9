"""The regression check of the benchmarks, and that each of them runs at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_ratio_that_fell_by_more_than_a_quarter_is_found():
    program = """
from benchmarks.check import slower
def entry(what, ratio, unit="inner steps/s"):
    return {"what": what, "value": 1.0, "unit": unit, "against": "base", "ratio": ratio}
before = [entry("a", 20.0), entry("b", 20.0), entry("gone", 20.0), entry("c", 2.0, "ms")]
now = [entry("a", 15.1), entry("b", 14.9), entry("new", 1.0), entry("c", 1.0, "ms")]
print(slower(before, now))
"""
    done = run("-c", program)
    assert done.stdout.strip() == "[('b', 'base', 20.0, 14.9)]", done.stderr


def test_committed_results_have_the_common_form():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        assert result.keys() == {"command", "machine", "versions", "rows"}, path
        for row in result["rows"]:
            assert row.keys() == {"what", "value", "unit", "against", "ratio"}, path
            named = {other["what"] for other in result["rows"]}
            assert row["ratio"] is None or row["against"] in named, (path, row["against"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replay", "step", "meta_training"])
def test_each_measure_runs(name):
    done = run("-c", f"from benchmarks import check; print(len(check.MEASURES[{name!r}](1)))")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 5
