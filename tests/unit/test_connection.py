"""Claims about dmafs.service.connection: what a daemon has answered is heard, whenever it hangs up."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from dmafs.errors import ControlError, DeniedError
from dmafs.service import connection
from dmafs.service.connection import Daemon

REFUSED = json.dumps({"error": "DeniedError", "message": "not you", "hint": "ask root"}).encode()


def hangs_up(path: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a daemon answer and hang up before anything is said to it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path / "control.sock"))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as accepted:
            accepted.sendall(answer)

    serving = threading.Thread(target=serve)
    serving.start()
    connect = connection._Connection.connect

    def connect_and_wait(self: connection._Connection) -> None:
        connect(self)
        serving.join()

    monkeypatch.setattr(connection._Connection, "connect", connect_and_wait)


def test_who_is_refused_unheard_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is there before the question could be put."""
    head = b"HTTP/1.1 403 Forbidden\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(REFUSED)
    hangs_up(tmp_path, head + REFUSED, monkeypatch)
    with pytest.raises(DeniedError, match="not you"), Daemon(tmp_path).ask("GET", "/status", {}):
        pass


def test_a_daemon_that_only_hangs_up_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that isn't there."""
    hangs_up(tmp_path, b"", monkeypatch)
    with pytest.raises(ControlError, match="doesn't answer"), Daemon(tmp_path).ask("GET", "/status", {}):
        pass
    monkeypatch.undo()
    with pytest.raises(ControlError, match="doesn't answer"), Daemon(tmp_path).ask("GET", "/status", {}):
        pass
