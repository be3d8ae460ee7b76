"""Claims about dmafs.core.inspection and ``dmafs check``: all that is wrong is found at once, nothing is changed."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from dmafs.cli.main import main
from dmafs.core import store as stores
from dmafs.core.dry import DryStorage
from dmafs.core.inspection import Finding, inspect
from dmafs.core.ondisk import HEADER_SIZE
from dmafs.core.storage import lock_directory
from dmafs.core.store import Store, create_volume
from dmafs.errors import CorruptionError, DmafsError, NoStoreError, NoSuchVolumeError, StoreBusyError
from dmafs.service import daemon
from tests.unit.broken import ENDS, everything, make_store
from tests.unit.damages import ERRORS, NOTES, segment
from tests.unit.tools import TINY, Ticking, fill, flip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("original"))


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store of the volumes one and two, closed in order: snapshots, a clone, a journal of several segments."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def looked_at(store: Path, only: str | None = None) -> list[Finding]:
    """Return what is found; nothing may have been changed by that."""
    before = everything(store)
    found = inspect(store, only)
    assert everything(store) == before
    return found.findings


def matching(findings: list[Finding], store: Path, severity: str, file: str, text: str) -> list[Finding]:
    return [
        one
        for one in findings
        if one.severity == severity
        and (Path(one.file).match(str(store / file)) if file != "store" else Path(one.file) == store)
        and pytest.RaisesExc(Exception, match=text).matches(Exception(one.problem))
    ]


@pytest.mark.parametrize("tap", ["fuse", "dm"])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_wrong_with_what_a_daemon_leaves(tmp_path: Path, end: str, tap: str) -> None:
    """However it was stopped there is no error; a sync that was committed is told of. Then it opens, all is well."""
    store = make_store(tmp_path, tap=tap, end=end)
    findings = looked_at(store)
    assert {one.severity for one in findings} == ({"note"} if end == "half synced" else set())
    assert all("a sync was committed and not finished" in one.problem for one in findings)
    Store(store, limits=TINY, clock=Ticking(10**6)).close()
    assert looked_at(store) == []


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_file_and_remedy(store: Path, name: str) -> None:
    """Whatever is missing, damaged, foreign or open to others is found, with a remedy; the other volume is whole."""
    damage, file, text = ERRORS[name]
    damage(store)
    findings = looked_at(store)
    found = matching(findings, store, "error", file, text)
    assert len(found) == (2 if name == "segments swapped" else 1), findings
    assert all(one.remedy for one in found)
    assert not [one for one in findings if one.severity == "error" and str(store / "two") in one.file]


@pytest.mark.parametrize("name", NOTES)
def test_a_note_is_no_error(store: Path, name: str) -> None:
    """What does no harm is told, and the store opens."""
    damage, file, text = NOTES[name]
    damage(store)
    findings = looked_at(store)
    [found] = matching(findings, store, "note", file, text)
    assert found.remedy
    assert [one for one in findings if one.severity == "error"] == []
    Store(store, limits=TINY, clock=Ticking(10**6)).close()


TOGETHER = {
    "clone's data", "descriptor of the last segment", "foreign in backward", "foreign in forward", "no digests",
    "no mirror", "others can write to a file", "segment missing", "snapshot cut",
}  # fmt: skip


def test_everything_is_found_at_once(store: Path) -> None:
    """Many errors in both volumes are found together, errors before notes, none twice."""
    together = [name for name in ERRORS if name in TOGETHER]
    assert len(together) == len(TOGETHER)
    for name in together:
        ERRORS[name][0](store)
    NOTES["foreign file"][0](store)
    (store / "two" / "pointers").unlink()
    findings = looked_at(store)
    for name in together:
        assert len(matching(findings, store, "error", *ERRORS[name][1:])) == 1, name
    assert matching(findings, store, "error", "two/pointers", "pointers is missing")
    assert [one.severity for one in findings] == ["error"] * (len(together) + 1) + ["note"]


@pytest.mark.parametrize(
    ("gone", "damaged", "holes"), [((1,), 3, [1]), ((1, 2), 3, [1]), ((1, 3), 2, [1, 3]), ((2,), 1, [2])]
)
def test_segments_that_are_missing_are_found_each(
    store: Path, gone: tuple[int, ...], damaged: int, holes: list[int]
) -> None:
    """A hole in the journal is an error, two are two; what stands before and behind them is looked at all the same."""
    paths = [segment(store, number) for number in range(5)]
    flip(paths[damaged], HEADER_SIZE + 3)
    for number in gone:
        paths[number].unlink()
    problems = sorted(one.problem for one in looked_at(store))
    assert [text.split(": ")[0] for text in problems] == [
        f"checksum of the descriptors in {paths[damaged]} doesn't match",
        *(f"file {paths[number]} is missing" for number in holes),
    ]


def test_one_volume_is_looked_at_alone(store: Path) -> None:
    """The other one isn't touched; one that isn't there is named beside those that are."""
    (store / "two" / "pointers").unlink()
    assert inspect(store, "one").volumes == ["one"]
    assert looked_at(store, "one") == []
    assert looked_at(store, "two")
    with pytest.raises(NoSuchVolumeError, match="no volume three") as caught:
        inspect(store, "three")
    assert caught.value.hint == "there are: one, two"


def test_a_store_in_use_is_not_looked_at(store: Path) -> None:
    """The error leads to scrub; the lock is let go of after a look, whatever was found."""
    lock = lock_directory(store)
    with pytest.raises(StoreBusyError, match=f"store {store} is in use") as caught:
        inspect(store)
    os.close(lock)
    assert f"dmafs scrub {store}" in caught.value.hint
    for _ in range(2):
        with pytest.raises(NoSuchVolumeError):
            inspect(store, "three")
        inspect(store)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """A directory without volumes is no store, and nothing in it is judged."""
    (tmp_path / "notes.txt").touch()
    with pytest.raises(NoStoreError, match=f"{tmp_path} is no store"):
        inspect(tmp_path)
    with pytest.raises(NoStoreError, match="can't be opened"):
        inspect(tmp_path / "nothing")


def test_a_store_on_its_own_source_is_an_error(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is served by no daemon."""
    monkeypatch.setattr(stores, "path_lies_on", lambda _path, source: source.name == "one.raw")
    [found] = looked_at(store)
    assert found.problem.startswith(f"store {store} is on its own source")


def test_nothing_is_opened_for_writing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it works on read-only media, lock included."""
    flags: list[int] = []
    plainly = os.open

    def opened(path: str, flag: int, *arguments: int) -> int:
        flags.append(flag)
        return plainly(path, flag, *arguments)

    monkeypatch.setattr(os, "open", opened)
    for damage in (NOTES["torn end"], NOTES["half made snapshot"], NOTES["torn clone"], ERRORS["segment missing"]):
        damage[0](store)
        flags.clear()
        assert inspect(store).findings
        assert flags
        assert not any(flag & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) for flag in flags)


def test_dry_storage_shows_what_would_have_been_done(tmp_path: Path) -> None:
    """What was removed or cut off is so for who looks through it, and not on the disk."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(fill(1, 2))
    storage = DryStorage(tmp_path)
    file = storage.open("d/f")
    file.truncate(700)
    assert (file.size(), storage.size("d/f"), storage.open("d/f").size()) == (700, 700, 700)
    file.read_into(bytearray(700), 0)
    for read in (file.read_into, file.read_into_nowait):
        with pytest.raises(CorruptionError, match="ends at byte 700"):
            read(bytearray(2), 699)
    with pytest.raises(OSError, match="not empty"):
        storage.remove_directory("d")
    storage.unlink("d/f")
    assert (storage.names("d"), storage.exists("d/f")) == ([], False)
    for gone in (partial(storage.open, "d/f"), partial(storage.size, "d/f"), partial(storage.unlink, "d/f")):
        with pytest.raises(FileNotFoundError):
            gone()
    storage.remove_directory("d")
    assert not storage.exists("d")
    assert [tuple(change) for change in storage.changes] == [("d/f", 1024, 700), ("d/f", 700, None), ("d", 0, None)]
    assert (tmp_path / "d" / "f").read_bytes() == fill(1, 2)


# -- the command ----------------------------------------------------------------------------------------------------


def test_command_without_errors(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes are listed, and it succeeds."""
    assert main(["check", str(store)]) == 0
    assert capsys.readouterr() == ("volumes one, two: no errors, no notes; data was not read\n", "")
    (store / "notes.txt").touch()
    assert main(["check", str(store), "one"]) == 0
    assert capsys.readouterr().out == (
        "SEVERITY  FILE\n"
        f"note      {store}/notes.txt\n"
        f"            {store}/notes.txt isn't the store's: no volume can be made beside it\n"
        "            remedy: move it out of the store\n"
        "volume one: no errors, 1 note; data was not read\n"
    )


def test_command_with_errors(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are listed on standard output, and only there; the exit status is that of damage."""
    (store / "one" / "pointers").unlink()
    segment(store, 0).unlink()
    flip(store / "two" / "backward" / f"{0:020d}.ext", 40)
    assert main(["check", str(store)]) == CorruptionError.exit_code
    said = capsys.readouterr()
    assert said.err == (
        f"dmafs: error: store {store} has 2 errors\nhint: do what the remedies say, on a copy of the store if you can\n"
    )
    assert f"error     {store}/one/pointers\n            file {store}/one/pointers is missing\n" in said.out
    assert main(["check", "--json", str(store), "one"]) == CorruptionError.exit_code
    report = json.loads(capsys.readouterr().out)
    assert (report["volumes"], report["errors"]) == (["one"], 1)
    assert report["findings"] == [
        {
            "severity": "error",
            "file": f"{store}/one/pointers",
            "problem": f"file {store}/one/pointers is missing",
            "remedy": "restore it: without it nobody knows what of the volume counts",
        }
    ]


def test_command_tells_of_the_configuration_too(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that a daemon couldn't be started with is an error."""
    (store / "dmafs.conf").write_text("wrong = 1")
    assert main(["check", str(store)]) == CorruptionError.exit_code
    assert (
        f"configuration {store}/dmafs.conf:1: unknown key wrong\n            remedy: keys: " in capsys.readouterr().out
    )


# -- what opening a store says --------------------------------------------------------------------------------------

SAID: dict[str, tuple[str, int]] = {
    "volume.json of a version": ("one/volume.json", 13),
    "pointers of a version": ("one/pointers", 13),
    "segment of a version": ("one/forward/", 13),
    "no volume.json": ("one/volume.json", 14),
    "damaged volume.json": ("one/volume.json", 14),
    "no pointers": ("one/pointers", 14),
    "both slots": ("one/pointers", 14),
    "pointers cut": ("one/pointers", 14),
    "no mirror": ("one/mirror.img", 14),
    "mirror cut": ("one/mirror.img", 14),
    "no digests": ("one/digests", 14),
    "no forward": ("one/forward", 14),
    "segment missing": ("one/forward/", 14),
    "first segment missing": ("one/forward", 14),
    "last segment missing": ("one/forward", 14),
    "data of the last segment": ("one/forward/", 14),
    "foreign in forward": ("one/forward/x.txt", 14),
    "foreign in backward": ("one/backward/x.txt", 14),
    "snapshot renamed": ("one/backward/", 14),
    "a link": ("one/digests", 14),
    "others can write to the store": ("", 17),
    "others can write to a file": ("one/pointers", 17),
}
"""What of a damaged store keeps it from being opened: which file is named, and the exit status."""


@pytest.mark.parametrize("command", ["status", "serve"])
@pytest.mark.parametrize("name", SAID)
def test_what_keeps_a_store_from_being_opened_is_said(
    store: Path, name: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the file by its whole path and a remedy, also that check lists all; and nothing is changed.

    But pointers that were read are written as they are, to be durable before anything is done.
    """
    ERRORS[name][0](store)
    before = {what: found for what, found in everything(store).items() if not what.endswith("/pointers stat")}
    file, status = SAID[name]
    monkeypatch.setattr(daemon, "drop_privileges", pytest.fail)  # what comes once the store is open
    (store.parent / "mnt").mkdir()
    arguments = [command, str(store), *([str(store.parent / "mnt")] if command == "serve" else [])]
    assert main(arguments) == status
    said = capsys.readouterr().err
    assert said.startswith("dmafs: error: ")
    assert str(store / file) in said.splitlines()[0]
    hint = said.splitlines()[1]
    assert hint.startswith("hint: ")
    assert (f"dmafs check {store}" in hint) == (status == CorruptionError.exit_code)
    assert {what: everything(store).get(what) for what in before} == before
    assert {what for what in everything(store) if not what.endswith("/pointers stat")} == before.keys()


def test_foreign_file_among_clones_is_said(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps nothing from being opened: the log names it and the remedy."""
    ERRORS["foreign in clones"][0](store)
    Store(store, limits=TINY, clock=Ticking(10**6)).close()
    assert f"{store}/one/clones/.x is no file of ours; move it out of the store" in caplog.text


def refused(store: Path) -> DmafsError:
    with pytest.raises(DmafsError) as caught:
        Store(store)
    return caught.value


def test_second_daemon_is_told_of_the_first(store: Path) -> None:
    """The error names the store, and how to ask who has it."""
    lock = lock_directory(store)
    error = refused(store)
    os.close(lock)
    assert (type(error), error.message) == (StoreBusyError, f"store {store} is in use by another process")
    assert f"dmafs status {store}" in error.hint


def test_half_made_store_is_told_from_none(tmp_path: Path) -> None:
    """A creation that was cut off is named, and how it is done again."""
    store = tmp_path / "store"
    (store / ".disk.new").mkdir(parents=True)
    store.chmod(0o700)
    error = refused(store)
    assert (type(error), str(store / ".disk.new") in error.message) == (NoStoreError, True)
    assert error.hint == f"make it anew: dmafs create {store} disk --source PATH"
    (tmp_path / "disk.raw").write_bytes(fill(1))
    create_volume(store, "disk", source=tmp_path / "disk.raw", tap="fuse")
    Store(store).close()
