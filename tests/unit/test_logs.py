"""Messages to systemd's journal, checked by one that knows its protocol."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dmafs.errors import NoStoreError
from dmafs.service import logs
from dmafs.service.alarms import Alarms
from dmafs.service.logs import JournalHandler, is_journal, name_store
from tests.journald import FakeJournal


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[FakeJournal]:
    made = FakeJournal(tmp_path / "socket")
    yield made
    made.close()


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The program's logger, which writes to the journal."""
    monkeypatch.setattr(logs, "_of_process", {})
    handler = JournalHandler(tmp_path / "socket")
    made = logging.getLogger("dmafs")
    made.addHandler(handler)
    yield made
    made.removeHandler(handler)


def test_a_message_has_priority_place_and_whose_it_is(journal: FakeJournal, log: logging.Logger) -> None:
    """The volume is the one that the message begins with, the store the one that is served."""
    log.warning("volume %s: %d events written", "disk", 3)
    entry = journal.take()
    assert Path(entry.pop("CODE_FILE")).samefile(__file__)
    assert entry.pop("CODE_LINE").isdigit()
    assert entry == {
        "MESSAGE": "volume disk: 3 events written",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "dmafs",
        "CODE_FUNC": "test_a_message_has_priority_place_and_whose_it_is",
        "LOGGER": "dmafs",
        "DMAFS_VOLUME": "disk",
    }
    name_store(Path("/backup/store"))
    log.error("%s", "no volume in this")
    entry = journal.take()
    assert (entry["DMAFS_STORE"], entry["PRIORITY"], "DMAFS_VOLUME" in entry) == ("/backup/store", "3", False)


@pytest.mark.parametrize(
    ("level", "priority"), [(logging.CRITICAL, "2"), (logging.ERROR, "3"), (logging.WARNING, "4"), (35, "4")]
)
def test_levels_are_priorities(journal: FakeJournal, log: logging.Logger, level: int, priority: str) -> None:
    """Those of syslog(3)."""
    log.log(level, "x")
    assert journal.take()["PRIORITY"] == priority


def test_an_alarm_has_its_kind_and_volume(journal: FakeJournal, log: logging.Logger) -> None:
    """Both when it begins and when it is over; one of the store has no volume."""
    assert log.isEnabledFor(logging.WARNING)
    alarms = Alarms(lambda: 0)
    alarms.set("gap", "volume disk: a gap", volume="disk")
    alarms.clear("gap", "disk")
    alarms.set("space", "little space")
    begun, ended, other = journal.take_all()
    assert (begun["DMAFS_ALARM"], begun["DMAFS_VOLUME"], begun["PRIORITY"]) == ("gap", "disk", "3")
    assert (ended["DMAFS_ALARM"], ended["DMAFS_VOLUME"], ended["PRIORITY"]) == ("gap", "disk", "4")
    assert (other["DMAFS_ALARM"], "DMAFS_VOLUME" in other) == ("space", False)


@pytest.mark.parametrize("text", ["two\nlines", "one=\n\nthree\n", "\N{SNOWMAN} = x", "\n"])
def test_any_text_arrives_as_it_is(journal: FakeJournal, log: logging.Logger, text: str) -> None:
    """Lines, signs of equality, and what isn't ASCII."""
    log.error("%s", text)
    assert journal.take()["MESSAGE"] == text


def test_a_name_that_is_no_text_is_no_error(journal: FakeJournal, log: logging.Logger) -> None:
    """A path with bytes that aren't UTF-8 arrives with these bytes."""
    log.error("%s", "/x\udcff")
    with pytest.raises(UnicodeDecodeError, match="0xff"):
        journal.take()


def test_a_traceback_is_part_of_the_message(journal: FakeJournal, log: logging.Logger) -> None:
    """As on stderr."""
    try:
        raise ValueError("on purpose")
    except ValueError:
        log.exception("failed")
    first, *_, last = journal.take()["MESSAGE"].splitlines()
    assert (first, last) == ("failed", "ValueError: on purpose")


@pytest.mark.parametrize("size", [100, 100_000, 10_000_000])
def test_large_messages_arrive(journal: FakeJournal, log: logging.Logger, size: int) -> None:
    """What no datagram takes is passed as a file."""
    log.error("%s", "x" * size)
    assert journal.take()["MESSAGE"] == "x" * size
    assert journal.files == (size > 1_000_000)


def test_without_a_journal_messages_are_on_stderr(log: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """As they would be there without one."""
    assert log.handlers
    for handler in log.handlers:
        if isinstance(handler, JournalHandler):
            handler._stderr = logs._stderr()
    log.error("volume %s: lost", "disk")
    assert capsys.readouterr().err == "dmafs: ERROR: volume disk: lost\n"


def test_a_journal_that_takes_nothing_loses_no_message(
    journal: FakeJournal, log: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What doesn't get through in time is on stderr; later it has all that came before, and takes new ones."""
    monkeypatch.setattr(logs, "SEND_S", 0.01)
    for handler in log.handlers:
        if isinstance(handler, JournalHandler):
            handler._stderr = logs._stderr()
    lines: list[str] = []
    for number in range(5000):
        log.error("%d", number)
        if lines := capsys.readouterr().err.splitlines():
            break
    assert lines == [f"dmafs: ERROR: {number}"]
    assert [entry["MESSAGE"] for entry in journal.take_all()] == [str(known) for known in range(number)]
    log.error("again")
    assert journal.take()["MESSAGE"] == "again"


def test_a_journal_that_is_started_again_is_found(journal: FakeJournal, log: logging.Logger, tmp_path: Path) -> None:
    """The socket is looked up for each message."""
    log.error("one")
    journal.take()
    journal.close()
    (tmp_path / "socket").unlink()
    with closing(FakeJournal(tmp_path / "socket")) as other:
        log.error("two")
        assert other.take()["MESSAGE"] == "two"


def test_only_stderr_itself_says_that_it_is_the_journals() -> None:
    """Not a variable that was inherited by a process whose stderr goes elsewhere."""
    found = os.fstat(2)
    assert is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
    for value in ("", "x", f"{found.st_dev}:{found.st_ino + 1}"):
        assert not is_journal({"JOURNAL_STREAM": value})
    assert not is_journal({})


def test_a_command_whose_stderr_is_the_journals_logs_its_error_there(tmp_path: Path) -> None:
    """With a hint on a line of its own; stderr has nothing then. Without the variable it is the other way round."""
    with FakeJournal(tmp_path / "socket").socket as listening:
        code = (
            "import sys, pathlib; from dmafs.service import logs;"
            f"logs.JOURNAL_SOCKET = pathlib.Path({str(tmp_path / 'socket')!r});"
            "from dmafs.cli.main import main; sys.exit(main(['status', '/nowhere']))"
        )
        for is_told in (True, False):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                found = os.fstat(theirs.fileno())
                stream = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"} if is_told else {}
                done = subprocess.run(
                    [sys.executable, "-c", code], stderr=theirs.fileno(), env={**os.environ, **stream}, check=False
                )
                assert done.returncode == NoStoreError.exit_code
                ours.settimeout(0)
                if is_told:
                    assert b"MESSAGE\n" in listening.recv(1 << 16)
                    with pytest.raises(BlockingIOError):
                        ours.recv(1)
                else:
                    assert ours.recv(1 << 16).startswith(b"dmafs: error: ")
