"""Claims about dmafs.cli: an output that can't be written is an error, not a traceback; nothing is said twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmafs.cli import output
from dmafs.cli.main import main
from dmafs.core.storage import lock_directory
from dmafs.core.store import create_volume, open_volume
from tests.unit.tools import copy_all

ROOT = Path(__file__).parents[2]
SIZE = 1 << 20


def run(*arguments: object, output: str) -> tuple[int, str]:
    """Run dmafs with its standard output in the file *output*; return the exit status and what it says."""
    command = [sys.executable, "-c", "from dmafs.cli.main import entry; entry()", *map(str, arguments)]
    with Path(output).open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    return done.returncode, done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    source = tmp_path / "disk.raw"
    source.write_bytes(bytes(SIZE))
    create_volume(tmp_path / "store", "disk", source=source, tap="fuse")
    return tmp_path / "store"


@pytest.mark.parametrize("arguments", [["status"], ["clone", "list"], ["ls"]], ids=" ".join)
def test_full_standard_output_is_an_error(store: Path, arguments: list[str]) -> None:
    """What can't be written is one error with a hint and exit status 2."""
    status, said = run(*arguments, store, output="/dev/full")
    assert status == 2
    assert (
        said == "dmafs: error: standard output can't be written: no space left on device\nhint: look at where it goes\n"
    )
    assert run(*arguments, store, output="/dev/null") == (0, "")


def test_status_of_a_file_says_that_it_is_no_store(store: Path) -> None:
    """The store's own check speaks, with its exit status."""
    status, said = run("status", store.parent / "disk.raw", output="/dev/null")
    assert status == 11
    assert "can't be opened: not a directory" in said


def test_clones_without_a_daemon(store: Path) -> None:
    """They can be listed; why none can be made is said, and what is missing on the command line too."""
    assert run("clone", "list", store, output="/dev/null") == (0, "")
    status, said = run("clone", "create", store, "one", "--at", "1h ago", output="/dev/null")
    assert status == 10
    assert said.startswith("dmafs: error: clone one at 1h ago can't be made: no daemon serves the store\nhint: start")
    for arguments, code in ((["create", store], 2), (["drop", store], 2), (["drop", store, "one"], 24)):
        status, said = run("clone", *arguments, output="/dev/null")
        assert status == code
        assert "clone" in said


def test_verify_and_resync_without_a_daemon(store: Path) -> None:
    """They work on the store itself: what differs is listed and an error, a resync takes it over, and it is gone."""
    source = store.parent / "disk.raw"
    status, said = run("verify", store, output="/dev/null")
    assert (status, "the initial copy isn't complete" in said) == (21, True)
    volume = open_volume(store / "disk")
    copy_all(volume, source)
    volume.close()
    assert run("verify", store, output="/dev/null") == (0, "")
    with source.open("r+b") as file:
        file.seek(5000)
        file.write(b"past the tap")
    listed = store.parent / "listed"
    status, said = run("verify", store, "disk", output=str(listed))
    assert status == 26
    assert said.startswith("dmafs: error: source and newest image differ in 4 KiB of volume disk\nhint: ")
    assert listed.read_text() == (
        "volume disk: 1 extent differs\n"
        "          OFFSET            LENGTH\n"
        "            4096              4096\n"
        "           total              4096  bytes\n"
    )
    status, said = run("verify", "--json", store, output=str(listed))
    assert (status, json.loads(listed.read_text())["volumes"][0]["extents"]) == (26, [{"offset": 4096, "length": 4096}])
    assert run("resync", store, "--rate", "0", output=str(listed)) == (0, "")
    assert "1 extent taken over" in listed.read_text()
    assert run("verify", store, output="/dev/null") == (0, "")
    for arguments, code in ((["--rate", "fast"], 3), (["nope"], 22)):
        assert run("verify", store, *arguments, output="/dev/null")[0] == code


@pytest.mark.parametrize("options", [["--tap", "log"], ["--log", "a.log"], ["--tap", "fuse", "--log", "a.log"]])
def test_a_log_and_its_tap_belong_together(tmp_path: Path, options: list[str]) -> None:
    """One without the other is a mistake; nothing is made."""
    assert main(["create", str(tmp_path / "store"), "--source", str(tmp_path / "none"), *options]) == 3
    assert not (tmp_path / "store").exists()


def test_snapshots_without_a_daemon(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taken, listed, renamed, pinned, unpinned and dropped; --json says the same, -q says nothing of it."""
    volume = open_volume(store / "disk")
    copy_all(volume, store.parent / "disk.raw")
    volume.close()

    def said(*arguments: str, code: int = 0) -> str:
        assert main(["snapshot", arguments[0], str(store), *arguments[1:]]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    assert said("create", "one") == "snapshot one taken\n"
    assert json.loads(said("create", "two", "--json")) == {"name": "two"}
    assert said("rename", "one", "first") == "snapshot one is called first now\n"
    assert json.loads(said("rename", "first", "one", "--json")) == {"id": "first", "name": "one"}
    assert said("rename", "one", "two", code=7).startswith("dmafs: error: snapshot two already exists\nhint: ")
    assert said("rename", "nope", "three", code=23).startswith("dmafs: error: no snapshot named nope\nhint: ")
    assert said("rename", "one", "a/b", code=3).startswith("dmafs: error: snapshot name 'a/b' can't be used\nhint: ")
    assert said("pin", "one") == "snapshot one pinned\n"
    listed = said("list").splitlines()
    assert re.fullmatch(r"SNAPSHOT +TIME +STATE +PINNED +VOLUMES", listed[0])
    assert re.fullmatch(r"one +\S+Z \(\S+ \S+ [+-]\d{4}\) +\w+ +pinned  disk seq 0", listed[1])
    assert [one["id"] for one in json.loads(said("list", "--json"))["snapshots"]] == ["one", "two"]
    assert said("drop", "one", code=25).startswith("dmafs: error: snapshot one is pinned\nhint: ")
    assert said("unpin", "one", "-q") == ""
    assert json.loads(said("drop", "one", "--json")) == {"id": "one"}
    assert said("drop", "two") == "snapshot two dropped\n"
    assert len(said("list").splitlines()) == 1


def test_errors_are_json_where_json_is_asked_for(store: Path) -> None:
    """One line with sorted keys on standard error; the exit status is in it, too."""
    status, said = run("snapshot", "drop", "--json", store, "nope", output="/dev/null")
    assert status == 23
    assert said.count("\n") == 1
    assert said.startswith('{"error": "NoSuchSnapshotError", "exit_code": 23, "hint": "list them')
    assert json.loads(said)["message"] == "no snapshot named nope"


def test_json_has_sorted_keys(store: Path) -> None:
    """At all depths, so that what is the same is written the same."""
    listed = store.parent / "listed"
    assert run("status", "--json", store, output=str(listed)) == (0, "")
    text = listed.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("option", ["-v", "--verbose", "-q", "--quiet"])
def test_how_much_is_told_can_be_said_before_and_after_the_command(store: Path, option: str) -> None:
    """Likewise; both at once are refused in one place."""
    for arguments in ([option, "status", store], ["status", option, store], ["clone", "list", option, store]):
        assert run(*arguments, output="/dev/null")[0] == 0
    assert run("status", "-q", "-v", store, output="/dev/null")[0] == 2


@pytest.mark.parametrize("text", ["2026-11-30T23:24:53.429153255Z", "2026-11-30T232453.429153255Z"])
def test_times_are_in_utc_and_local(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The exact one first, which a command takes; then what clocks here show."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert output.both(text) == f"{text} (2026-12-01 00:24:53 +0100)"
    finally:
        monkeypatch.undo()
        time.tzset()
    assert output.both(None) == "-"


@pytest.mark.parametrize(
    ("terminal", "kind", "quiet", "shown"),
    [
        (True, "xterm", False, True),
        (False, "xterm", False, False),
        (True, "dumb", False, False),
        (True, "xterm", True, False),
    ],
)
def test_bars_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch, *, terminal: bool, kind: str, quiet: bool, shown: bool
) -> None:
    """Not for one that can't move its cursor, and not if nothing is to be told."""
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    output.choose(output.Manner(quiet=quiet))
    try:
        assert output.has_bars() is shown
    finally:
        output.choose(output.Manner())


HEAVY = {"httpx", "hypercorn", "pyfuse3", "prometheus_client", "rich", "starlette", "trio", "asyncio"}
"""What takes long to import; numpy too, which only the store itself needs."""


def test_status_imports_nothing_heavy(store: Path) -> None:
    """Without a daemon numpy is needed; where one serves the store, or the command line is wrong, not even that."""
    program = "import sys; from dmafs.cli.main import main; print(main(sys.argv[1:])); print(*sys.modules)"

    def loaded() -> tuple[str, set[str]]:
        command = [sys.executable, "-c", program, "-q", "status", "--json", str(store)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        *_, status, modules = done.stdout.splitlines()
        return status, set(modules.split())

    status, modules = loaded()
    assert (status, modules & HEAVY) == ("0", set())
    lock = lock_directory(store)
    try:
        status, modules = loaded()
    finally:
        os.close(lock)
    assert status == "31", "nobody answers"
    assert modules & (HEAVY | {"numpy"}) == set()
