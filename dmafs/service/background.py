"""A daemon in the background: whoever starts it waits until the tree is mounted, and then has nothing to do with it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dmafs.service import logs

JOURNAL_STDOUT: Final = Path("/run/systemd/journal/stdout")
LOG_FILE: Final = Path("/var/log/dmafs.log")
LOG_BYTES: Final = 1 << 20
"""A log file that is larger when a daemon starts becomes the old one, in place of the one before it."""

_MOUNTED: Final = b"+"
_HEADER: Final = f"{logs.IDENTIFIER}\n\n6\n1\n0\n0\n0\n".encode()
"""Identifier, no unit, priority of lines without one, lines may have one, and nothing is passed on."""


class Starter:
    """Who has started the daemon, seen from the daemon; see ``supervision.Listener``."""

    quiet = True
    watchdog_s = 0.0

    def __init__(self, fd: int, log_file: Path) -> None:
        """Tell through the pipe *fd*; from then on the log is the journal or *log_file*."""
        self._fd = fd
        self._log_file = log_file

    def tell(self, *assignments: str) -> None:
        """Let the starter go once the daemon is ready."""
        if "READY=1" in assignments and self._fd >= 0:
            _part(self._log_file)
            with contextlib.suppress(BrokenPipeError):  # it has been killed; the daemon goes on
                os.write(self._fd, _MOUNTED)
            os.close(self._fd)
            self._fd = -1


def start(run: Callable[[Starter], int], log_file: Path) -> int:
    """Have *run* done by a process in the background; return 0 once it has told that it is ready, or its exit status.

    Until then its errors are on stderr. An interrupt ends it.
    """
    reading, writing = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it comes when both know what to do
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reading)
        os.setsid()
        os.chdir("/")
        _point(os.open(os.devnull, os.O_RDWR), 0, 1)
        return run(Starter(writing, log_file))
    os.close(writing)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if os.read(reading, 1) == _MOUNTED:
            return 0
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def _part(log_file: Path) -> None:
    """Let go of the starter's stderr, unless it is the journal's and so is one for the daemon, too."""
    if not logs.is_journal(os.environ):
        with contextlib.suppress(OSError):
            _point(_journal(), 2)
            found = os.fstat(2)
            os.environ[logs.JOURNAL_STREAM] = f"{found.st_dev}:{found.st_ino}"
            logs.set_up(logging.getLogger().level, os.environ, again=True)
            return
        try:
            _point(_file(log_file), 2)
        except OSError as error:
            logging.getLogger(__name__).warning("no more messages: %s: %s", log_file, (error.strerror or "").lower())
            _point(os.open(os.devnull, os.O_RDWR), 2)


def _journal() -> int:
    """Return a stream to the journal, as systemd-cat(1) makes it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(str(JOURNAL_STDOUT))
        stream.shutdown(socket.SHUT_RD)
        stream.sendall(_HEADER)
        return stream.detach()


def _file(path: Path) -> int:
    """Open a log file, which is begun anew when it is large."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.old"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _point(fd: int, *targets: int) -> None:
    """Make *targets* what *fd* is, and close that."""
    for target in targets:
        os.dup2(fd, target)
    if fd not in targets:
        os.close(fd)
