"""A daemon that a service manager has started tells it what systemd wants to hear."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.mount.harness import MIB, Rig, is_mounted, pwrite
from tests.notified import FakeManager

pytestmark = pytest.mark.mount

WATCHDOG_S = 3.0


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A scratch folder for one test: each starts a daemon of its own."""
    with Rig() as made:
        yield made


def test_a_service_manager_hears_of_start_life_and_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready once the tree is there; then the watchdog is fed with the state, while the tree answers, and only then."""
    with closing(FakeManager(str(rig.root / "notify"))) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
        rig.create(size=MIB)
        rig.start()
        begun = manager.take()
        assert begun[:2] == ["READY=1", "WATCHDOG=1"]
        assert is_mounted(rig.mnt)
        pwrite(rig.tap(), b"x" * 4096, 0, sync=True)
        for _ in range(2):
            fed = manager.take()
        assert fed[0] == "WATCHDOG=1"
        assert re.fullmatch(r"STATUS=disk protected, history of \d+s, lag 0\.0 s", fed[1]), fed
        assert rig.daemon is not None
        os.kill(rig.daemon.pid, signal.SIGSTOP)
        manager.take_all()  # what was told before it was stopped
        with pytest.raises(TimeoutError):
            manager.take(seconds=WATCHDOG_S)
        os.kill(rig.daemon.pid, signal.SIGCONT)
        assert manager.take()[0] == "WATCHDOG=1"
        rig.stop()
        assert manager.take_all()[-1] == ["STOPPING=1", "STATUS=ending"]
