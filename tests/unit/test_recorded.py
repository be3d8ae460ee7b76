"""Claims about dmafs.taps.recorded: an imported volume has the history that the log has."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dmafs.cli.main import main
from dmafs.core.points import point_named
from dmafs.core.store import Store
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError, DmafsError, InputError, SourceError
from dmafs.taps.logformat import END_MARK, LogFlag
from dmafs.taps.recorded import DOUBTS_SHOWN, Imported, import_volume
from dmafs.taps.timeline import MarkTimes, TimesInMarks
from dmafs.units import SECTOR
from tests.logs import FLUSH, Logged, discard, log_of, mark, replay, write
from tests.unit.tools import fill, image_bytes, tree

NOW = 1785249005_000000000
SIZE = 64


def imported(path: Path, entries: list[Logged], *, base: bytes | None = None, **options: object) -> Imported:
    """Import entries into the store ``store`` below *path*."""
    sector_bytes = options.pop("sector_bytes", SECTOR)
    assert isinstance(sector_bytes, int)
    log, image = path / "a.log", path / "base.img"
    log.write_bytes(log_of(entries, sector_bytes=sector_bytes))
    if base is not None:
        image.write_bytes(base)
    return import_volume(
        path / "store",
        "disk",
        log=log,
        base=image if base is not None else None,
        size_bytes=SIZE * SECTOR if base is None else None,
        marks=TimesInMarks() if options.pop("at_marks", False) else MarkTimes(),
        now=NOW,
        progress=lambda _what, _done, _total: None,
    )


def opened(path: Path) -> tuple[Store, Volume]:
    """Open the store again."""
    store = Store(path / "store", clock=lambda: NOW + 10**9)
    volume = store.volumes["disk"]
    volume.journal.check()
    return store, volume


def some_entries(seed: int) -> list[Logged]:
    """Return random entries, with a closing one now and then."""
    rng = random.Random(seed)
    entries: list[Logged] = []
    for number in range(120):
        start = rng.randrange(SIZE - 8)
        if rng.random() < 0.2:
            entries.append(FLUSH)
        elif rng.random() < 0.2:
            entries.append(discard(start, rng.randrange(1, 8)))
        else:
            entries.append(write(start, fill(number + 1, rng.randrange(1, 8))))
    return entries


@pytest.mark.parametrize("with_base", [False, True])
def test_each_flush_is_a_moment(tmp_path: Path, with_base: bool) -> None:  # noqa: FBT001
    """At every flush the image is what the entries until then make of the base, or of zeros; a sync keeps it so."""
    entries, base = some_entries(7), fill(200, SIZE) if with_base else None
    found = imported(tmp_path, entries, base=base)
    store, volume = opened(tmp_path)
    disk = bytearray(base or bytes(SIZE * SECTOR))
    assert image_bytes(volume, 0) == disk
    seq = windows = 0
    for number, entry in enumerate(entries):
        replay([entry], disk)
        seq += entry.sectors > 0
        if entry.flags & LogFlag.FLUSH or number == len(entries) - 1:
            windows += 1
            assert image_bytes(volume, seq) == disk
    assert (found.windows, found.events) == (windows, seq) == (windows, volume.journal.head)
    assert volume.journal.head_time_ns == NOW
    run(sync(volume))
    assert image_bytes(volume, seq) == disk
    store.close()


def test_log_sectors_of_any_size(tmp_path: Path) -> None:
    """A log in sectors of 4096 bytes says the same."""
    imported(tmp_path, [write(1, fill(1, 8), sector_bytes=4096), FLUSH], sector_bytes=4096)
    store, volume = opened(tmp_path)
    assert image_bytes(volume, 1)[8 * SECTOR : 16 * SECTOR] == fill(1, 8)
    store.close()


def test_marks_become_marks(tmp_path: Path) -> None:
    """A mark whose text can be a name is one of the volume's; others are counted, but for the log's last."""
    entries = [write(1, fill(1)), mark("one"), write(1, fill(2)), mark("no/name"), write(1, fill(3)), mark(END_MARK)]
    found = imported(tmp_path, entries)
    assert (found.windows, found.events, found.marks, found.other_marks) == (3, 3, 1, 1)
    store, volume = opened(tmp_path)
    assert [indicator.name for indicator in volume.journal.marks()] == ["one"]
    point = point_named(volume, "one")
    assert point is not None
    assert image_bytes(volume, point.seq)[SECTOR : 2 * SECTOR] == fill(1)
    store.close()


def test_marks_give_times(tmp_path: Path) -> None:
    """All before a mark with a time was at that time, back to the mark before; what follows the last one is now."""
    entries = [write(1, fill(1)), FLUSH, write(1, fill(2)), mark("@1000")]
    entries += [write(1, fill(3)), mark("some"), write(1, fill(4)), mark("@2000.5"), write(1, fill(5)), FLUSH]
    imported(tmp_path, entries, at_marks=True)
    store, volume = opened(tmp_path)
    times = [volume.time_of(seq) for seq in range(1, 6)]
    assert times == [999_999999999, 1000_000000000, 2000_499999999, 2000_500000000, NOW]
    assert volume.pointers.now.origin_time_ns == 999_999999998
    assert volume.journal.seq_at(1500_000000000, default=0) == 2
    store.close()


def test_a_window_is_never_split(tmp_path: Path) -> None:
    """Within a window nothing is a moment."""
    imported(tmp_path, [write(1, fill(1)), write(2, fill(2)), FLUSH])
    store, volume = opened(tmp_path)
    assert [volume.recoverable(seq) for seq in range(3)] == [True, False, True]
    store.close()


@pytest.mark.parametrize(
    ("entries", "doubtful", "doubts"),
    [
        ([write(1, fill(1, 4), LogFlag.FUA), write(2, fill(2, 9)), FLUSH], 3, [(2, 5)]),
        ([write(2, fill(2, 9)), write(1, fill(1, 4), LogFlag.FUA), FLUSH], 0, []),
        ([write(1, fill(1), LogFlag.FUA), FLUSH, write(1, fill(2)), FLUSH], 0, []),
        ([write(1, fill(1), LogFlag.FUA), mark("m"), write(1, fill(2)), FLUSH], 1, [(1, 2)]),
        ([write(1, fill(1), LogFlag.FUA), write(1, fill(2), LogFlag.FLUSH)], 0, []),
        ([write(1, fill(1), LogFlag.FUA | LogFlag.FLUSH), write(1, fill(2)), FLUSH], 1, [(1, 2)]),
        ([write(1, fill(1), LogFlag.FUA), write(1, fill(2), LogFlag.FUA), FLUSH], 0, []),
        ([write(1, fill(1), LogFlag.FUA), write(3, fill(1), LogFlag.FUA), discard(0, 9)], 2, [(1, 2), (3, 4)]),
        ([write(1, fill(1), LogFlag.FUA), write(2, fill(1, 2), LogFlag.FUA), discard(0, 9)], 3, [(1, 4)]),
    ],
)
def test_doubts_about_the_order(
    tmp_path: Path, entries: list[Logged], doubtful: int, doubts: list[tuple[int, int]]
) -> None:
    """A plain write over a FUA write that stands before it, with no flush between, is doubtful; log order is taken."""
    found = imported(tmp_path, entries)
    assert (found.doubtful_sectors, found.doubts) == (doubtful, doubts)
    store, volume = opened(tmp_path)
    assert image_bytes(volume, volume.journal.head) == replay(entries, bytearray(SIZE * SECTOR))
    store.close()


def test_few_doubts_are_shown(tmp_path: Path) -> None:
    """However many there are, memory is bounded."""
    entries = [write(at, fill(1), LogFlag.FUA) for at in range(0, 40, 2)] + [discard(0, SIZE)]
    found = imported(tmp_path, entries)
    assert (found.doubtful_sectors, len(found.doubts)) == (20, DOUBTS_SHOWN)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (log_of([write(1, fill(1)), FLUSH], counted=3), CorruptionError, "entry 3 of 3 is missing"),
        (log_of([write(1, fill(1)), FLUSH])[:-700], CorruptionError, "entry 1 of 2 is missing or not whole"),
        (log_of([write(SIZE, fill(1)), FLUSH]), CorruptionError, "reaches to byte"),
        (bytes(4096), CorruptionError, "has no super block"),
        (b"no log".ljust(4096), CorruptionError, "magic"),
        (b"", CorruptionError, "has no super block"),
        (log_of([FLUSH, mark("@5"), FLUSH, mark("@5")]), InputError, "leaves no time"),
    ],
)
def test_an_error_changes_nothing(tmp_path: Path, content: bytes, error: type[DmafsError], words: str) -> None:
    """Whatever is wrong with a log, no volume and no store is left."""
    (tmp_path / "a.log").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(error, match=words):
        import_volume(
            tmp_path / "store",
            "disk",
            log=tmp_path / "a.log",
            base=None,
            size_bytes=SIZE * SECTOR,
            marks=TimesInMarks(),
            now=NOW,
            progress=lambda _what, _done, _total: None,
        )
    assert tree(tmp_path) == before


def test_an_error_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    """Also when the volume is half there: a base that ends early."""

    def cut(what: str, _done: int, _total: int) -> None:
        if what == "reading":
            (tmp_path / "base.img").write_bytes(bytes(SECTOR))

    (tmp_path / "base.img").write_bytes(bytes(SIZE * SECTOR))
    (tmp_path / "a.log").write_bytes(log_of([FLUSH]))
    with pytest.raises(SourceError, match="has 512 bytes instead of"):
        import_volume(
            tmp_path / "store",
            "disk",
            log=tmp_path / "a.log",
            base=tmp_path / "base.img",
            size_bytes=None,
            marks=MarkTimes(),
            now=NOW,
            progress=cut,
        )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "size", "words"), [("disk", 100, "size of 100 bytes"), ("dmafs.conf", 512, "is taken by a file")]
)
def test_what_cannot_be_made(tmp_path: Path, name: str, size: int, words: str) -> None:
    """Sizes and names are checked as for any volume."""
    (tmp_path / "a.log").write_bytes(log_of([FLUSH]))
    with pytest.raises(InputError, match=words):
        import_volume(
            tmp_path / "store",
            name,
            log=tmp_path / "a.log",
            base=None,
            size_bytes=size,
            marks=MarkTimes(),
            now=NOW,
            progress=lambda _what, _done, _total: None,
        )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``dmafs import`` says what it made; doubts are a warning, and exit status 1."""
    store, log = str(tmp_path / "store"), tmp_path / "a.log"
    log.write_bytes(log_of([write(1, fill(1)), mark("one"), mark("two/three"), FLUSH]))
    assert main(["import", store, "--log", str(log), "--size", "1M"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"volume disk made in {store}: 1 events in 3 windows, 1 marks\n"
    assert "1 marks have texts that can't be names" in printed.err
    log.write_bytes(log_of([write(1, fill(1), LogFlag.FUA), write(1, fill(2)), FLUSH]))
    times = tmp_path / "times"
    times.write_text("")
    assert main(["import", store, "again", "--log", str(log), "--size", "1M", "--times", str(times)]) == 1
    assert "1 sectors were written with FUA and without" in capsys.readouterr().err
    assert main(["import", store, "again", "--log", str(log), "--size", "1M", "--at-marks"]) == 7
    assert main(["ls", store]) == 0
