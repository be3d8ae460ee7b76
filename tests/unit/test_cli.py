"""Claims about dmafs.cli: an output that can't be written is an error, not a traceback; nothing is said twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dmafs.cli.main import main
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


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["ls"]], ids=" ".join)
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
    assert run("clone", store, output="/dev/null") == (0, "")
    status, said = run("clone", store, "one", "--at", "1h ago", output="/dev/null")
    assert status == 10
    assert said.startswith("dmafs: error: clone one at 1h ago can't be made: no daemon serves the store\nhint: start")
    for arguments in (["--drop"], ["--at", "1h ago"], ["one", "--json"]):
        status, said = run("clone", store, *arguments, output="/dev/null")
        assert status == 3
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
