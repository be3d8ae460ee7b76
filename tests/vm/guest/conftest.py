"""The tests of this folder run in a guest, with devices that they may break."""

from __future__ import annotations

from pathlib import Path

import pytest

_MARK = Path("/run/dmafs-guest")  # made by contrib/uml/init


def pytest_configure() -> None:
    """Refuse to run on a machine that is no guest."""
    if not _MARK.is_dir():
        raise pytest.UsageError("tests/vm/guest runs in a guest: ./contrib/test vm")
