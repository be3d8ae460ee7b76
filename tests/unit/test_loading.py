"""Claims about dmafs.service.loading, document and making: which file counts, and all that is wrong with it at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.cli.main import main
from dmafs.core.store import create_volume, volume_info, volume_names
from dmafs.errors import ExistsError, InputError, MountError, SourceError, UnsafeError
from dmafs.service import machine
from dmafs.service.configuration import Configuration, StoreTable
from dmafs.service.document import Document
from dmafs.service.loading import load, load_configuration, machine_of, setting_keys
from dmafs.service.machine import choose_machine_file
from dmafs.service.making import find, make_missing

GOOD = """[[store]]
path = "{root}/store"
mount = "{root}/mnt"
reserve = "1MiB"
[store.sync]
age = "2h"
exact = 0

[[store.volume]]
source = "{root}/disk.raw"

[[store]]
path = "{root}/other"
threads = 4
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a disk, and have ``machine.toml`` in it be the machine's file once ``write`` makes it."""
    with (tmp_path / "disk.raw").open("wb") as file:
        file.truncate(1 << 20)
    yield tmp_path
    choose_machine_file(None)


def write(root: Path, text: str = GOOD) -> Path:
    path = root / "machine.toml"
    path.write_text(text.replace("{root}", str(root)))
    choose_machine_file(path)
    return path


# -- which file ---------------------------------------------------------------------------------------------------


def test_the_machines_file_has_the_settings_of_the_stores_it_names(root: Path) -> None:
    """Each store has its own part, whichever way its path is written; others have their own file, or the defaults."""
    path = write(root)
    first, second = load(root / "store"), load(root / "x" / ".." / "other")
    assert (first.configuration.reserve, first.configuration.sync.age, first.configuration.threads) == (
        1 << 20,
        7200,
        8,
    )
    assert (first.configuration.threads, second.configuration.threads) == (8, 4)
    assert second.configuration.reserve == 64 << 20
    assert first.file == second.file == path
    assert load_configuration(root / "third") == Configuration()
    (root / "link").symlink_to(root / "other")
    assert load_configuration(root / "link").threads == 4


def test_origins(root: Path) -> None:
    """Each setting has its value as the file writes it, and the line; or its default, as a file would write that."""
    path = write(root)
    settings = load(root / "store").settings()
    assert settings["reserve"] == {"value": "1MiB", "origin": f"{path}:4"}
    assert settings["sync.exact"] == {"value": 0, "origin": f"{path}:7"}
    assert settings["sync.free"] == {"value": "10%", "origin": "default"}
    assert list(settings) == [".".join(key) for key in setting_keys()]
    own = root / "third"
    own.mkdir()
    (own / "dmafs.conf").write_text('[snapshots]\nat = ["06:00"]\n')
    assert load(own).settings()["snapshots.at"] == {"value": ["06:00"], "origin": f"{own}/dmafs.conf:2"}
    assert {setting["origin"] for setting in load(root / "none").settings().values()} == {"default"}


def test_there_is_one_place_for_a_stores_settings(root: Path) -> None:
    """A store that the machine's file names must not have a file of its own: nothing is merged."""
    path = write(root)
    (root / "store").mkdir()
    (root / "store" / "dmafs.conf").write_text("")
    with pytest.raises(InputError) as caught:
        load(root / "store")
    assert caught.value.message == (
        f"store {root}/store has its settings in {path}:1, and there is {root}/store/dmafs.conf"
    )
    assert f"move what it says to {path}" in caught.value.hint


def test_a_machines_file_that_is_not_right_is_refused_as_a_whole(root: Path) -> None:
    """Also for a store that it doesn't name: nobody knows which one was meant."""
    write(root, GOOD.replace('path = "{root}/other"', 'pth = "{root}/other"'))
    for store in ("store", "third"):
        with pytest.raises(InputError, match=r":12, \[\[store\]\]: path is missing \(and 1 more"):
            load(root / store)


def test_a_file_that_is_named_has_to_be_there(root: Path) -> None:
    """Unlike the usual one."""
    choose_machine_file(root / "none.toml")
    with pytest.raises(InputError, match=r"none\.toml isn't there"):
        load(root / "store")
    choose_machine_file(None)
    assert load(root / "store").file is None


def test_the_usual_file_is_looked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --config it is the one in /etc."""
    path = write(root)
    choose_machine_file(None)
    assert str(machine.MACHINE_FILE) == "/etc/dmafs/dmafs.toml"
    monkeypatch.setattr(machine, "MACHINE_FILE", path)
    assert load(root / "other").file == path


def test_a_machines_file_that_others_can_write_is_refused(root: Path) -> None:
    """It names programs that daemons run."""
    write(root).chmod(0o664)
    with pytest.raises(UnsafeError, match=r"machine\.toml can be written by others"):
        load(root / "store")


# -- what is wrong ------------------------------------------------------------------------------------------------

WRONG = """[[store]]
path = "store"
mount = "/mnt"
thread = 3
[store.sync]
age = "24"
at = [
  "6:00",
]
[store.snapshots]
[[store.volume]]
tap = "usb"
[[store.volume]]
name = "a/b"
source = "/dev/sdb"
tap = "log"
[[sture]]
"""


def test_all_errors_at_once_with_their_lines() -> None:
    """In the order in which they are found; the exception is the first one's, and says how many more there are."""
    document = Document(WRONG.encode(), Path("/m.toml"))
    machine_of(document)
    assert sorted(document.message(problem) for problem in document.problems) == sorted(
        [
            "configuration /m.toml:2, [[store]]: path: path 'store' is not absolute",
            "configuration /m.toml:4, [[store]]: unknown key thread",
            "configuration /m.toml:6, [store.sync]: age: duration '24' not understood",
            "configuration /m.toml:7, [store.sync]: at: time of day '6:00' not understood",
            "configuration /m.toml:11, [[store.volume]]: source is missing",
            "configuration /m.toml:12, [[store.volume]]: tap = 'usb' is not right",
            "configuration /m.toml:14, [[store.volume]]: name: volume name 'a/b' can't be used",
            "configuration /m.toml:17: unknown key sture",
        ]
    )
    assert all(problem.hint for problem in document.problems)
    with pytest.raises(InputError) as caught:
        document.finish()
    assert caught.value.message == (
        "configuration /m.toml:2, [[store]]: path: path 'store' is not absolute "
        "(and 7 more: dmafs config check /m.toml)"
    )


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("threds = 1", ":1: unknown key threds", "did you mean threads?"),
        ("[snapshot]", ":1: unknown key snapshot", "did you mean [snapshots]?"),
        ("\n[sync]\nfre = 1", ":3, [sync]: unknown key fre", "did you mean free?"),
        ("[sync]\nxyz = 1", ":2, [sync]: unknown key xyz", "keys: age, exact, journal, free, at, marks"),
        ("\n\nx = = 1", ":3: no TOML: ", "see dmafs.conf(5)"),
        ("when_full = 'stop'", ":1: when_full = 'stop' is not right", "it is refuse or gap"),
        ("threads = 1", ":1: threads = 1 is not right", "it is a whole number, at least 2"),
        ("[a.b]\nc = 1", ":1: unknown key a", "keys: "),
    ],
)
def test_an_error_names_file_line_table_key_value_and_what_is_allowed(text: str, message: str, hint: str) -> None:
    """Or the nearest known key."""
    document = Document(text.encode(), Path("/dmafs.conf"))
    document.table(Configuration)
    with pytest.raises(InputError) as caught:
        document.finish()
    assert caught.value.message.startswith(f"configuration /dmafs.conf{message}")
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{root}/other", "{root}/x/../store", ":13, [[store]]: store {root}/store is in line 2 already"),
        ("threads = 4", 'mount = "{root}/mnt"', ":14, [[store]]: mount point {root}/mnt is in line 3 already"),
        (
            "threads = 4",
            '[[store.volume]]\nsource = "{root}/disk.raw"',
            ":15, [[store.volume]]: source {root}/disk.raw is in line 10 already",
        ),
        (
            '\n[[store]]\npath = "{root}/other"',
            '[[store.volume]]\nsource = "/dev/sdb"',
            ":11, [[store.volume]]: in store {root}/store, volume disk is in line 9 already",
        ),
    ],
)
def test_what_is_there_twice(root: Path, old: str, new: str, message: str) -> None:
    """Stores, mount points, sources, and volumes of a store."""
    path = write(root, GOOD.replace(old, new).replace("\nthreads = 4\n", "\n" if "sdb" in new else "\nthreads = 4\n"))
    with pytest.raises(InputError) as caught:
        load(root / "store")
    assert caught.value.message == f"configuration {path}{message.replace('{root}', str(root))}"


# -- what a daemon makes of it --------------------------------------------------------------------------------------


def test_what_is_not_given_is_in_the_machines_file(root: Path) -> None:
    """Store and mount point, which is made; what is given counts."""
    write(root)
    given = root / "elsewhere"
    assert find(root / "store", given)[:2] == (root / "store", given)
    assert not (root / "mnt").exists()
    for _ in range(2):
        store, mount_point, loaded = find(root / "store", None)
        assert (store, mount_point, loaded.configuration.reserve) == (root / "store", root / "mnt", 1 << 20)
        assert (root / "mnt").is_dir()
    with pytest.raises(InputError, match=f"no mount point is known for store {root}/other"):
        find(root / "other", None)
    with pytest.raises(InputError, match="has 2 stores, and none is given") as caught:
        find(None, None)
    assert f"{root}/store, {root}/other" in caught.value.hint
    write(root, GOOD[: GOOD.rindex("[[store]]")])
    assert find(None, None)[:2] == (root / "store", root / "mnt")
    write(root, GOOD.replace("{root}/mnt", "{root}/disk.raw/mnt"))
    with pytest.raises(MountError, match=r"disk\.raw/mnt can't be made"):
        find(root / "store", None)


def test_without_a_machines_file_a_store_has_to_be_given() -> None:
    """And the error says how."""
    choose_machine_file(None)
    with pytest.raises(InputError, match="no store is given"):
        find(None, None)


def test_volumes_that_are_not_there_are_made(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once; one that the file doesn't name stays, with a warning."""
    write(root)
    make_missing(load(root / "store"))
    made = volume_info(root / "store", "disk")
    assert (made.source, made.tap) == (f"{root}/disk.raw", "fuse")
    make_missing(load(root / "store"))
    assert volume_info(root / "store", "disk") == made
    assert not caplog.records
    (root / "more.raw").write_bytes(bytes(512))
    create_volume(root / "store", "more", source=root / "more.raw", tap="fuse")
    make_missing(load(root / "store"))
    assert "volume more of store" in caplog.text
    caplog.clear()
    make_missing(load(root / "other"))  # names no volumes, so none is missed
    assert not caplog.records


def test_a_volume_that_cannot_be_made_is_an_error(root: Path) -> None:
    """As with dmafs create, and nothing is changed."""
    (root / "disk.raw").unlink()
    write(root)
    with pytest.raises(SourceError):
        make_missing(load(root / "store"))
    assert not (root / "store").exists()


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("disk.raw", "more.raw"), 10, "source '{root}/disk.raw', not '{root}/more.raw'"),
        (("[[store.volume]]", '[[store.volume]]\ntap = "dm"'), 10, "tap 'fuse', not 'dm'"),
        (("[[store.volume]]", '[[store.volume]]\ntap = "log"\nlog = "/l"'), 10, "tap 'fuse', not 'log'"),
    ],
    ids=["source", "tap", "log"],
)
def test_another_source_or_tap_is_an_error(root: Path, change: tuple[str, str], line: int, said: str) -> None:
    """It names the line, and nothing else is made either."""
    write(root)
    make_missing(load(root / "store"))
    more = '[[store.volume]]\nname = "more"\nsource = "{root}/disk.raw2"\n\n[[store]]'
    head, _, tail = GOOD.replace(*change).rpartition("[[store]]")
    path = write(root, f"{head}{more}{tail}")
    with pytest.raises(InputError) as caught:
        make_missing(load(root / "store"))
    assert caught.value.message == (
        f"configuration {path}:{line}: volume disk of store {root}/store has {said.replace('{root}', str(root))}"
    )
    assert volume_names(root / "store") == ["disk"]


def test_a_source_of_another_volume_is_refused(root: Path) -> None:
    """As with dmafs create."""
    write(root)
    create_volume(root / "store", "first", source=root / "disk.raw", tap="fuse")
    with pytest.raises(ExistsError, match="is already the source of volume first"):
        make_missing(load(root / "store"))


def test_every_setting_can_be_below_a_store() -> None:
    """The two files have one schema."""
    assert issubclass(StoreTable, Configuration)


# -- the command --------------------------------------------------------------------------------------------------


def test_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All errors with their hints, and exit status 3; or that there are none."""
    path = write(root)
    assert main(["config", "check", str(path)]) == 0
    assert capsys.readouterr().out == f"configuration {path}: no errors\n"
    path.write_text(WRONG)
    assert main(["config", "check", str(path)]) == InputError.exit_code
    shown = capsys.readouterr()
    assert shown.out.count("\n  hint: ") == 8
    lines = [int(line.split(":")[1].split(",")[0]) for line in shown.out.splitlines()[::2]]
    assert lines == [2, 4, 6, 7, 11, 12, 14, 17]
    assert shown.err == f"dmafs: error: configuration {path} has 8 errors\nhint: see dmafs.conf(5)\n"
    assert main(["config", "check", "--json", str(path)]) == InputError.exit_code
    report = json.loads(capsys.readouterr().out)
    assert (report["file"], len(report["errors"]), report["errors"][0]["line"]) == (str(path), 8, 2)
    assert main(["config", "check", str(root / "none")]) == InputError.exit_code


def test_check_of_a_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own file is looked at, or the machine's if that names it; both are an error, however they are asked for."""
    store = root / "store"
    store.mkdir()
    assert main(["config", "check", str(store)]) == InputError.exit_code
    (store / "dmafs.conf").write_text("threads = 1\ntick = 1")
    assert main(["config", "check", str(store)]) == InputError.exit_code
    assert f"configuration {store}/dmafs.conf has 2 errors" in capsys.readouterr().err
    (store / "dmafs.conf").write_text("threads = 2")
    assert main(["config", "check", str(store)]) == 0
    path = write(root)
    for asked in (store, path):
        assert main(["--config", str(path), "config", "check", str(asked)]) == InputError.exit_code
        assert f"has its settings in {path}:1, and there is" in capsys.readouterr().out
    (store / "dmafs.conf").unlink()
    assert main(["--config", str(path), "config", "check", str(store)]) == 0
    create_volume(store, "disk", source=root / "disk.raw", tap="fuse")
    path.write_text(path.read_text().replace("disk.raw", "more.raw"))
    assert main(["--config", str(path), "config", "check", str(path)]) == InputError.exit_code
    assert f"{path}:10: volume disk of store {store} has source" in capsys.readouterr().out


def test_show_without_a_daemon(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a daemon would load, also for a store that is still to be made; with the origin of each setting."""
    path = write(root)
    assert main(["--config", str(path), "config", "show", str(root / "store")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"no daemon; one would load: {path}"
    assert [line.split() for line in lines if "default" not in line][1:] == [
        ["reserve", '"1MiB"', f"{path}:4"],
        ["sync.age", '"2h"', f"{path}:6"],
        ["sync.exact", "0", f"{path}:7"],
    ]
    assert main(["--config", str(path), "config", "show", "--json", str(root / "store")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["daemon"], report["file"], report["settings"]["threads"]["value"]) == (None, str(path), 8)
    assert main(["config", "show", str(root / "third")]) == 11
