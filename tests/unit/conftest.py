"""Fixtures of several unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from dmafs.service import checking, following
from dmafs.service import engine as engines
from dmafs.service.following import FollowingEngine
from dmafs.taps import dm, mapped
from dmafs.taps.mapped import first_of
from dmafs.units import SECTOR
from tests.unit.rig import SIZE, Rig
from tests.unit.target import Kernel, open_plainly
from tests.unit.tools import fill


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A primary of 32 KiB; whoever looks for a mapped device finds a simulated one."""
    (tmp_path / "primary").write_bytes(fill(7, SIZE))
    kernel = Kernel(tmp_path / "primary")
    monkeypatch.setattr(dm, "MappedTap", kernel)
    monkeypatch.setattr(dm, "open_direct", open_plainly)

    def punch(path: Path, size: int) -> None:
        if kernel.device is not None:
            kernel.device.punched.append(first_of(path) + size // SECTOR)
        mapped.punch(path, size)

    monkeypatch.setattr(dm, "punch", punch)
    return kernel


@pytest.fixture
async def rig(
    tmp_path: Path, kernel: Kernel, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rig]:
    """Nothing runs yet; what is tried again is so at once."""
    for module in (following, checking, engines):
        monkeypatch.setattr(module, "RETRY_S", 0.02)
    rig = Rig(tmp_path / "disk", kernel, nursery)
    yield rig
    if kernel.device is not None:
        kernel.device.held.set()
    await rig.stop()
    nursery.cancel_scope.cancel()


@pytest.fixture
async def follower(rig: Rig) -> FollowingEngine:
    """Protected and idle."""
    return await rig.start()
