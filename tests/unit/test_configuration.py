"""The configuration file: all keys optional, nothing guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmafs.client import connect
from dmafs.core.policy import SnapshotSchedule, SyncPolicy
from dmafs.errors import InputError, NoStoreError
from dmafs.service.configuration import Configuration
from dmafs.service.loading import load_configuration


def test_defaults(tmp_path: Path) -> None:
    """Without a file, and with an empty one, the defaults hold."""
    assert load_configuration(tmp_path) == Configuration()
    (tmp_path / "dmafs.conf").write_text("# nothing\n")
    assert load_configuration(tmp_path) == Configuration()


def test_values(tmp_path: Path) -> None:
    """Sizes may have units, times may be whole numbers."""
    (tmp_path / "dmafs.conf").write_text(
        'segment_size = "8MiB"\nreserve = 0\nclone_quota = "1MiB"\ntick_s = 2\nallow_other = true\n'
    )
    found = load_configuration(tmp_path)
    assert (found.segment_size, found.reserve, found.tick_s, found.allow_other) == (8 << 20, 0, 2.0, True)
    assert found.volume_limits().segments.data_sectors == 16384
    assert found.volume_limits().clone_bytes == 1 << 20


def test_store_that_is_a_file_is_left_to_the_store(tmp_path: Path) -> None:
    """What is wrong with the store's path isn't an error of the configuration."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert load_configuration(path) == Configuration()
    with pytest.raises(NoStoreError, match=f"store {path}"), connect(path):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "unknown = 1",
        "tick_s = true",
        "tick_s = 0",
        'tick_s = "1"',
        "tick_s = nan",
        "tick_s = inf",
        pytest.param(f"tick_s = 1{'0' * 400}", id="tick_s = 1e400"),
        "threads = 1.5",
        "threads = 1",
        "threads = -4",
        'segment_size = "64MB"',
        "segment_size = 511",
        "allow_other = 1",
        "idle_images =",
        "[section]\nkey = 1",
        '[metrics]\nlisten = "127.0.0.1"',
        '[metrics]\nlisten = "127.0.0.1:0"',
        '[metrics]\nlisten = "127.0.0.1:65536"',
        '[metrics]\nlisten = "127.0.0.1:-1"',
        '[metrics]\nlisten = "localhost:9110"',
        '[metrics]\nlisten = ":9110"',
        '[metrics]\nlisten = "::1:9110"',
        '[metrics]\nlisten = "[127.0.0.1]:9110"',
        "[metrics]\nlisten = 9110",
        '[alarms]\ncommand = "mail"',
        '[alarms]\ntimeout = "0s"',
    ],
)
def test_what_is_not_right_is_refused(tmp_path: Path, text: str) -> None:
    """Unknown keys, wrong types, values out of range and bad syntax are errors that name the file."""
    (tmp_path / "dmafs.conf").write_text(text)
    with pytest.raises(InputError) as caught:
        load_configuration(tmp_path)
    assert str(tmp_path) in caught.value.message or "64MB" in caught.value.message
    assert caught.value.hint


def test_tables(tmp_path: Path) -> None:
    """Each table is read into what the core needs of it."""
    (tmp_path / "dmafs.conf").write_text("""
tick_s = 2
[sync]
age = "2h"
exact = 0
journal = "1GiB"
free = "2.5%"
at = ["06:00", "18:30"]
marks = ["backup-*"]
[snapshots]
every = "15min"
at = ["12:01"]
before = ["fsfreeze", "-f", "/data"]
hook_timeout = "5s"
""")
    found = load_configuration(tmp_path)
    assert found.sync.policy() == SyncPolicy(7200, 0, 1 << 30, 0.025, (21600, 66600), ("backup-*",))
    assert found.snapshots.schedule() == SnapshotSchedule(900, (43260,), ("fsfreeze", "-f", "/data"), (), 5)


def test_defaults_of_tables_are_the_cores() -> None:
    """What isn't configured is as the core has it."""
    assert Configuration().sync.policy() == SyncPolicy()
    assert Configuration().snapshots.schedule() == SnapshotSchedule()


@pytest.mark.parametrize(
    ("table", "text", "problem"),
    [
        ("sync", "agee = 1", "unknown key agee"),
        ("sync", "age = 24", "age = 24 is not right"),
        ("sync", "age = false", "age = False is not right"),
        ("sync", 'age = "1 day"', "age: duration '1 day' not understood"),
        ("sync", 'age = "12h"', "exact is not less than age"),
        ("sync", 'exact = "24h"', "exact is not less than age"),
        ("sync", "journal = -1", "journal = -1 is not right"),
        ("sync", "free = 0.1", "free = 0.1 is not right"),
        ("sync", 'free = "100%"', "free: share '100%' not understood"),
        ("sync", 'at = "06:00"', "at = '06:00' is not right"),
        ("sync", 'at = ["6:00"]', "at: time of day '6:00' not understood"),
        ("sync", 'marks = [""]', "marks = "),
        ("snapshots", 'before = "fsfreeze -f /data"', "before = "),
        ("snapshots", 'before = ["a\\u0000b"]', "before = "),
        ("snapshots", 'after = [["nested"]]', "after = "),
        ("snapshots", "hook_timeout = 0", "hook_timeout = 0 is not right"),
    ],
)
def test_what_is_not_right_in_a_table(tmp_path: Path, table: str, text: str, problem: str) -> None:
    """The error names file, table and key, and what is allowed."""
    (tmp_path / "dmafs.conf").write_text(f"[{table}]\n{text}\n")
    line = 1 if "exact" in problem else 2  # what isn't one key's fault is the table's
    with pytest.raises(InputError) as caught:
        load_configuration(tmp_path)
    assert caught.value.message.startswith(f"configuration {tmp_path}/dmafs.conf:{line}, [{table}]: ")
    assert problem in caught.value.message
    assert caught.value.hint


def test_a_table_is_a_table(tmp_path: Path) -> None:
    """The name of a table can't be a key, nor a key a table; unknown tables are named."""
    for text, hint in (
        ("sync = 1", "[sync]"),
        ("[tick_s]", "a number"),
        ("[retention_]", "[retention]?"),
        ("[x]", "[snapshots]"),
    ):
        (tmp_path / "dmafs.conf").write_text(text)
        with pytest.raises(InputError) as caught:
            load_configuration(tmp_path)
        assert hint in caught.value.hint


def test_addresses_are_numeric(tmp_path: Path) -> None:
    """IPv4 as it is, IPv6 in brackets; empty is none."""
    for text, expected in (
        ("127.0.0.1:9110", ("127.0.0.1", 9110)),
        ("[::1]:1", ("::1", 1)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),  # noqa: S104 - it is only parsed
        ("", ("", 0)),
    ):
        (tmp_path / "dmafs.conf").write_text(f'[metrics]\nlisten = "{text}"\n')
        assert load_configuration(tmp_path).metrics.listen == expected
