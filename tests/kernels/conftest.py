"""Fresh memory is poisoned in every test here: what a kernel does not write stays nan."""

from __future__ import annotations

import pytest

from stepsmith.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_memory():
        yield
