"""Claims about dmafs.core.snapshots: each address once, older wins, and a drop is finished whenever it was begun."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.core.index import snapshot_owner
from dmafs.core.limits import IndexLimits
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Header, Kind
from dmafs.core.segment import Segment
from dmafs.core.snapshot import DIRECTORY, Snapshot
from dmafs.core.snapshots import Snapshots
from dmafs.core.storage import RealStorage
from dmafs.core.vrmo import Stack, Vrmo
from dmafs.core.work import run
from dmafs.errors import CorruptionError, ExistsError, NoSuchSnapshotError, PinnedError
from dmafs.units import SECTOR
from tests.unit.tools import FOREIGN, OURS, files, fill, flip, tree

MIRROR_SEQ = 100


class Bench:
    """A backward journal's directory, and what is open in it."""

    def __init__(self, path: Path) -> None:
        self.root = path
        self.path = path / DIRECTORY
        self.path.mkdir()
        self.opened: list[Snapshots] = []

    def open(self) -> Snapshots:
        snapshots = Snapshots(RealStorage(self.root), OURS, IndexLimits())
        self.opened.append(snapshots)
        snapshots.check()
        return snapshots

    def close(self) -> None:
        for snapshots in self.opened:
            snapshots.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


Entry = tuple[int, int, int]  # start, sectors, the byte that fills them, 0 for zeros without data


def create(snapshots: Snapshots, seq: int, name: str = "", *entries: Entry, temporary: bool = False) -> Snapshot:
    """Make a snapshot that holds *entries*, as syncs would."""
    snapshot = run(snapshots.create(seq, seq * 10, name, temporary=temporary))
    if entries:
        segment = snapshots.segment(snapshot)
        parts = [(start, count, fill(value, count) if value else None) for start, count, value in entries]
        segment.publish(segment.write_batch(parts, seq * 10 + 1))
        segment.seal()
        segment.datasync()
    return snapshot


def drop(snapshots: Snapshots, snapshot: Snapshot) -> None:
    run(snapshots.doom(snapshot))
    run(snapshots.merge(snapshot)).close()
    snapshots.check()


def image(snapshots: Snapshots, seq: int, size: int = 12) -> list[int]:
    """Return for each sector of the image at *seq* the byte that fills it, -1 where the mirror decides."""
    found = []
    run(snapshots.prepare(seq, MIRROR_SEQ))
    layers = snapshots.layers_nowait(seq, MIRROR_SEQ)
    assert layers is not None
    vrmo = Vrmo(size)
    vrmo.make_pages(0, size, Stack(layers, 0))
    for start, stop, reference in vrmo.resolve_nowait(0, size) or ():
        if reference < 0:
            found += [-1] * (stop - start)
            continue
        run(snapshots.load_of(reference))
        segment, index = snapshots.descriptor_nowait(reference)
        assert segment is not None
        buffer = bytearray((stop - start) * SECTOR)
        segment.read_into(index, start - segment.starts[index], memoryview(buffer))
        found += list(buffer[::SECTOR])
    return found


def summary(snapshots: Snapshots) -> list[tuple[int, int, int, str]]:
    return [(one.seq, one.twin, one.time_ns, one.name) for one in snapshots]


def three(bench: Bench) -> Snapshots:
    """Return snapshots at 10, 20 and 30 that hold overlapping entries."""
    snapshots = bench.open()
    create(snapshots, 10, "old", (0, 2, 1), (6, 1, 2))
    create(snapshots, 20, "mid", (1, 3, 3), (6, 3, 4), (10, 1, 0))
    create(snapshots, 30, "new", (0, 12, 5))
    return snapshots


def test_created_snapshots_are_found_again(bench: Bench) -> None:
    """A snapshot has its seq, time and name after reopening; its files are named by its seq."""
    one = bench.open()
    create(one, 7, "first")
    create(one, 9)
    two = bench.open()
    assert summary(two) == summary(one) == [(7, 0, 70, "first"), (9, 0, 90, "")]
    assert (two.find("first"), two.find("x")) == (two.at(7), None)
    assert len(two) == 2
    assert files(bench.path) == sorted(f"{seq:020d}{suffix}" for seq in (7, 9) for suffix in (".ext", ".dat"))


def test_names_are_unique_and_free_after_a_drop(bench: Bench) -> None:
    """A name that is taken is refused and nothing is made; after a drop it is free."""
    snapshots = bench.open()
    first = create(snapshots, 7, "a")
    before = tree(bench.path)
    with pytest.raises(ExistsError, match="snapshot a already exists"):
        run(snapshots.create(8, 80, "a"))
    assert tree(bench.path) == before
    assert len(snapshots) == 1
    drop(snapshots, first)
    assert create(snapshots, 8, "a") is snapshots.find("a")


def test_look_ups_by_seq_and_time(bench: Bench) -> None:
    """Each look-up finds the snapshot its docstring says."""
    snapshots = three(bench)
    assert [one and one.seq for one in map(snapshots.at, (9, 10, 11))] == [None, 10, None]
    assert [one and one.seq for one in map(snapshots.open_at, (9, 10, 19, 20, 99))] == [None, 10, 10, 20, 30]
    assert snapshots.seqs_between(10, 30) == [20]
    assert snapshots.seqs_between(9, 31) == [10, 20, 30]
    found = [snapshots.newest_before(time_ns, 30) for time_ns in (99, 100, 199, 200, 999)]
    assert [one and one.seq for one in found] == [None, 10, 10, 20, 20]


def test_hidden_snapshots_are_not_listed(bench: Bench) -> None:
    """Temporary and doomed snapshots are kept but not shown."""
    snapshots = bench.open()
    create(snapshots, 10, temporary=True)
    doomed = create(snapshots, 20, "a")
    run(snapshots.doom(doomed))
    for one in (snapshots, bench.open()):
        assert list(one) == []
        assert len(one) == 0
        assert [(snap.seq, snap.temporary, snap.gone) for snap in one.all()] == [(10, True, False), (20, False, True)]
        assert one.visible_at(10) is one.visible_at(20) is one.newest_before(999, 99) is one.find("a") is None


def test_image_is_the_oldest_copy_from_its_snapshot_on(bench: Bench) -> None:
    """An address reads from the first snapshot, from the asked one on, that holds it (fig. 16)."""
    create_all = three(bench)
    for snapshots in (create_all, bench.open()):
        assert image(snapshots, 10) == [1, 1, 3, 3, 5, 5, 2, 4, 4, 5, 0, 5]
        assert image(snapshots, 20) == [5, 3, 3, 3, 5, 5, 4, 4, 4, 5, 0, 5]
        assert image(snapshots, 30) == [5] * 12


@pytest.mark.parametrize("victims", [("mid",), ("new",), ("old",), ("mid", "new"), ("new", "mid"), ("old", "new")])
def test_dropping_changes_no_other_image(bench: Bench, victims: tuple[str, ...]) -> None:
    """What older images need of a dropped snapshot moves to the next older one, where that doesn't hold it itself."""
    snapshots = three(bench)
    expected = {name: image(snapshots, seq) for name, seq in (("old", 10), ("mid", 20), ("new", 30))}
    for name in victims:
        victim = snapshots.find(name)
        assert victim is not None
        drop(snapshots, victim)
        for one in (snapshots, bench.open()):
            assert {snap.name: image(one, snap.seq) for snap in one}.items() <= expected.items()
    assert len(snapshots) == 3 - len(victims)
    assert len(files(bench.path)) == 2 * len(snapshots)


def test_dropping_the_oldest_just_frees_it(bench: Bench) -> None:
    """With no older snapshot nothing is copied."""
    snapshots = three(bench)
    oldest = snapshots.find("old")
    assert oldest is not None
    rest = {name: content for name, content in tree(bench.path).items() if not name.startswith(f"{10:020d}")}
    drop(snapshots, oldest)
    assert tree(bench.path) == rest


def test_merge_copies_only_what_the_older_lacks(bench: Bench) -> None:
    """Sectors that the older snapshot holds aren't copied; zeros move without data."""
    snapshots = three(bench)
    drop(snapshots, snapshots.find("mid"))  # type: ignore[arg-type]
    segment = snapshots.segment(snapshots.find("old"))  # type: ignore[arg-type]
    entries = list(zip(segment.starts, segment.lengths, strict=True))
    assert entries == [(0, 2), (6, 1), (2, 2), (7, 2), (10, 1)]
    assert segment.data_sectors == 3 + 4


def test_twins_at_one_seq(bench: Bench) -> None:
    """Snapshots taken at one seq are different ones with the same image, and can be dropped in any order."""
    for victims in ((0, 1), (1, 0)):
        snapshots = bench.open()
        create(snapshots, 5, "", (0, 1, 9))
        create(snapshots, 10, "a", (1, 1, 1))
        create(snapshots, 10, "b", (2, 1, 2))
        again = bench.open()
        assert [(one.twin, one.name) for one in again][1:] == [(0, "a"), (1, "b")]
        assert again.at(10) is again.find("a")
        assert again.open_at(10) is again.find("b")
        assert image(again, 10)[:4] == [-1, 1, 2, -1]
        for victim in victims:
            drop(again, again.find("ab"[victim]))  # type: ignore[arg-type]
            if victim == victims[0]:
                assert image(again, 10)[:4] == ([-1, 1, 2, -1] if victim else [-1, -1, 2, -1])
            assert image(again, 5)[:4] == [9, 1, 2, -1]
        drop(again, again.all()[0])
        assert files(bench.path) == []


def test_third_twin_takes_a_free_number(bench: Bench) -> None:
    """A twin made after another was dropped gets files of its own."""
    snapshots = bench.open()
    first = create(snapshots, 10, "a")
    create(snapshots, 10, "b")
    drop(snapshots, first)
    create(snapshots, 10, "c")
    assert [(one.twin, one.name) for one in bench.open()] == [(1, "b"), (2, "c")]


def test_name_of_a_doomed_twin_belongs_to_the_living_one(bench: Bench) -> None:
    """When a name was used again while its first bearer is still held, reopening finds the living one."""
    snapshots = bench.open()
    run(snapshots.doom(create(snapshots, 10, "a")))
    create(snapshots, 10, "a")
    again = bench.open()
    found = again.find("a")
    assert found is not None
    assert (found.twin, found.gone) == (1, False)


def copies_at_each_cut(bench: Bench, tmp_path: Path) -> Iterator[Path]:
    """Drop the middle one of three snapshots; yield the store as it is before and after each call."""
    snapshots = three(bench)
    victim = snapshots.find("mid")
    assert victim is not None

    def both() -> Iterator[object]:
        for work in (snapshots.doom(victim), snapshots.merge(victim)):
            answer, calls = None, 0
            while True:
                try:
                    call = work.send(answer) if calls else next(work)
                except StopIteration:
                    break
                calls += 1
                yield None
                answer = call()
                yield None

    for number, _ in enumerate(both()):
        place = tmp_path / f"cut{number}"
        shutil.copytree(bench.path, place / DIRECTORY)
        yield place


def test_drop_is_finished_after_a_cut_anywhere(bench: Bench, tmp_path: Path) -> None:
    """After a cut between any two calls of a drop it hasn't begun or is finished later; images stay the same."""
    seen = set()
    for place in copies_at_each_cut(bench, tmp_path):
        snapshots = Snapshots(RealStorage(place), OURS, IndexLimits())
        visible = {one.name for one in snapshots}
        seen.add(frozenset(visible))
        for doomed in [one for one in snapshots.all() if one.gone]:
            assert image(snapshots, 10) == [1, 1, 3, 3, 5, 5, 2, 4, 4, 5, 0, 5]
            drop(snapshots, doomed)
        assert image(snapshots, 10) == [1, 1, 3, 3, 5, 5, 2, 4, 4, 5, 0, 5]
        if "mid" in visible:
            assert image(snapshots, 20) == [5, 3, 3, 3, 5, 5, 4, 4, 4, 5, 0, 5]
        assert len(files(place / DIRECTORY)) == 2 * len(snapshots)
        snapshots.close()
    assert seen == {frozenset({"old", "mid", "new"}), frozenset({"old", "new"})}


def test_leftovers_are_cleaned(bench: Bench) -> None:
    """What a creation or a drop that was cut off left is unlinked when the volume is opened."""
    create(bench.open(), 10, "a")
    before = tree(bench.path)
    for name in (f"{20:020d}.new", f"{20:020d}.dat", f"{10:020d}-1.dat", f"{30:020d}.dat"):
        (bench.path / name).write_bytes(b"x" * 600)
    assert len(bench.open()) == 1
    assert tree(bench.path) == before


@pytest.mark.parametrize("name", ["notes.txt", "README", f"{10:020d}.ext~", "x.ext", "-.ext", f"{10:020d}-².ext"])
def test_foreign_file_is_refused(bench: Bench, name: str) -> None:
    """A file that isn't ours is an error that names it, and is left alone."""
    create(bench.open(), 10, "a")
    (bench.path / name).write_bytes(b"x" * 600)
    before = tree(bench.path)
    with pytest.raises(CorruptionError, match=name.replace("²", ".")):
        bench.open()
    assert tree(bench.path) == before


def test_renamed_and_foreign_snapshots_are_refused(bench: Bench) -> None:
    """A snapshot under another's name or of another volume isn't taken."""
    create(bench.open(), 10, "a")
    with pytest.raises(CorruptionError, match=f"not to {FOREIGN}"):
        Snapshots(RealStorage(bench.root), FOREIGN, IndexLimits())
    for suffix in (".ext", ".dat"):
        (bench.path / f"{10:020d}{suffix}").rename(bench.path / f"{11:020d}{suffix}")
    with pytest.raises(CorruptionError, match=f"{11:020d}.ext holds the snapshot backward/{10:020d}"):
        bench.open()


def test_missing_data_file_is_an_error(bench: Bench) -> None:
    """A snapshot without its data can't be read, and says so when it is needed."""
    create(bench.open(), 10, "a", (0, 1, 1))
    (bench.path / f"{10:020d}.dat").unlink()
    with pytest.raises(CorruptionError, match=f"{10:020d}.dat is missing"):
        image(bench.open(), 10)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_damaged_entry_is_never_replaced_by_the_mirror(bench: Bench, index: int) -> None:
    """A damaged descriptor is an error each time, since without it the image would show the mirror's newer data."""
    create(bench.open(), 10, "a", (0, 1, 1), (2, 1, 2), (4, 1, 3))
    flip(bench.path / f"{10:020d}.ext", HEADER_SIZE + index * RECORD_SIZE + 16)
    before = tree(bench.path)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=f"{10:020d}.ext"):
            image(bench.open(), 10)
        assert tree(bench.path) == before


@pytest.mark.parametrize("size", [0, SECTOR, 3 * SECTOR - 1])
def test_missing_data_is_never_replaced_by_the_mirror(bench: Bench, size: int) -> None:
    """A data file that was cut short is an error each time."""
    create(bench.open(), 10, "a", (0, 1, 1), (2, 1, 2), (4, 1, 3))
    with (bench.path / f"{10:020d}.dat").open("r+b") as file:
        file.truncate(size)
    before = tree(bench.path)
    for _ in range(2):
        with pytest.raises(CorruptionError, match=f"{10:020d}"):
            image(bench.open(), 10)
        assert tree(bench.path) == before


def test_torn_batch_that_was_not_sealed_is_forgotten(bench: Bench) -> None:
    """A batch that a power cut tore before it was needed doesn't count, and is cut off before anything is appended."""
    snapshots = bench.open()
    segment = snapshots.segment(create(snapshots, 10, "a", (0, 1, 1)))
    size = segment.ext.size()
    segment.publish(segment.write_batch([(2, 1, fill(2)), (4, 1, fill(3))], 200))
    flip(bench.path / f"{10:020d}.ext", size + 16)
    again = bench.open()
    assert image(again, 10)[:6] == [1, -1, -1, -1, -1, -1]
    torn = again.segment(again.all()[0])
    torn.publish(torn.write_batch([(5, 1, fill(4))], 300))
    assert (bench.path / f"{10:020d}.ext").stat().st_size == size + RECORD_SIZE
    assert (bench.path / f"{10:020d}.dat").stat().st_size == 2 * SECTOR
    assert image(bench.open(), 10)[:6] == [1, -1, -1, -1, -1, 4]


def test_failed_creation_leaves_no_snapshot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the files can't be made there is no such snapshot, and the name is free."""
    snapshots = bench.open()

    def fail(*_: object, **__: object) -> Segment:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Segment, "create", fail)
        with pytest.raises(OSError, match="No space"):
            run(snapshots.create(10, 100, "a"))
    assert snapshots.all() == []
    snapshots.check()
    create(snapshots, 10, "a")


def test_creation_that_fails_at_its_end_leaves_no_files(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync may pass its moment then, and the next start would show a later one as the snapshot."""
    snapshots = bench.open()
    opened = len(files(Path("/proc/self/fd")))

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(RealStorage, "sync_directory", fail)
        with pytest.raises(OSError, match="Too many"):
            run(snapshots.create(10, 100, "a"))
    assert files(bench.path) == []
    assert len(files(Path("/proc/self/fd"))) == opened
    assert bench.open().all() == []


def test_a_snapshot_that_is_not_taken_yet_is_not_dropped(bench: Bench) -> None:
    """Its files can't be renamed; that is no trouble with the store."""
    snapshots = bench.open()
    work = snapshots.create(10, 100, "a")
    next(work)
    taken = snapshots.all()[0]
    with pytest.raises(NoSuchSnapshotError, match="snapshot a is just being taken or changed"):
        run(snapshots.doom(taken))
    with pytest.raises(OSError, match="No space"):
        work.throw(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(NoSuchSnapshotError, match="snapshot a is just being taken or changed"):
        run(snapshots.doom(taken))
    snapshots.check()
    drop(snapshots, create(snapshots, 10, "a"))


def test_a_journal_stays_in_memory_until_the_last_work_on_it_is_done(bench: Bench) -> None:
    """A younger snapshot is dropped, which merges into one that is still being taken: that one's files stay open."""
    snapshots = bench.open()
    younger = create(snapshots, 20)
    work = snapshots.create(10, 100)
    call = next(work)
    drop(snapshots, younger)
    assert snapshots.unload(keep=None, everything=True) == []
    with pytest.raises(StopIteration):
        work.send(call())
    assert len(snapshots.unload(keep=None, everything=True)) == 1


def test_a_damaged_journal_keeps_no_other_in_memory(bench: Bench) -> None:
    """A merge that can't even begin is over."""
    snapshots = three(bench)
    for segment in snapshots.unload(keep=None, everything=True):
        segment.close()
    _, older, new = snapshots.all()
    (bench.path / f"{older.seq:020d}.dat").unlink()
    run(snapshots.doom(new))
    with pytest.raises(CorruptionError):
        run(snapshots.merge(new))
    assert len(snapshots.unload(keep=None, everything=True)) == 1


def test_unloaded_journals_are_opened_again_when_needed(bench: Bench) -> None:
    """Forgetting open journals changes no image."""
    snapshots = three(bench)
    keep = snapshots.find("new")
    released = snapshots.unload(keep=keep, everything=True)
    assert len(released) == 2
    for segment in released:
        segment.close()
    assert image(snapshots, 10) == [1, 1, 3, 3, 5, 5, 2, 4, 4, 5, 0, 5]


def test_header_holds_what_a_snapshot_is(bench: Bench) -> None:
    """The file of a snapshot says itself what it is, so no list of snapshots can be lost."""
    create(bench.open(), 10, "a", temporary=True)
    header = Header.decode((bench.path / f"{10:020d}.ext").read_bytes()[:HEADER_SIZE], "x")
    assert (header.kind, header.uuid, header.first) == (Kind.BACKWARD, OURS, 1)
    assert (header.snapshot_seq, header.snapshot_time_ns, header.name, header.temporary) == (10, 100, "a", True)


def test_what_was_taken_at_an_instant(bench: Bench) -> None:
    """Among several at one seq each is found by its instant; those with a name, hidden ones and others aren't."""
    snapshots = bench.open()
    create(snapshots, 5)
    run(snapshots.create(7, 70, instant_ns=75))
    run(snapshots.create(7, 70, "named", instant_ns=80))
    run(snapshots.create(7, 70, frozen=True, instant_ns=90))
    run(snapshots.create(9, 200, temporary=True))
    for found in (snapshots, bench.open()):
        instants = {time_ns: found.taken_at(time_ns) for time_ns in (49, 50, 74, 75, 80, 90, 200)}
        assert {time_ns: shot and (shot.seq, shot.twin) for time_ns, shot in instants.items()} == {
            49: None,
            50: (5, 0),
            74: None,
            75: (7, 0),
            80: None,
            90: (7, 2),
            200: None,
        }
        assert [found.is_frozen(seq) for seq in (5, 7, 9)] == [False, True, False]
        assert [found.covers(seq) for seq in (0, 7, 8, 9)] == [True, True, False, False]


# -- pins -----------------------------------------------------------------------------------------------------------


def at(snapshots: Snapshots, seq: int) -> Snapshot:
    [found] = [one for one in snapshots if one.seq == seq]
    return found


def pins(snapshots: Snapshots) -> list[int]:
    return [one.seq for one in snapshots if one.pinned]


def test_a_pin_is_a_file_that_lasts(bench: Bench) -> None:
    """A pinned snapshot is pinned after reopening, until it is unpinned; doing either twice changes nothing."""
    snapshots = three(bench)
    for _ in range(2):
        run(snapshots.pin(at(snapshots, 20)))
        pin = bench.path / f"{20:020d}.pin"
        assert pin.read_bytes() == b""
        assert pin.stat().st_mode & 0o777 == 0o600
        assert pins(snapshots) == pins(bench.open()) == [20]
    for _ in range(2):
        run(snapshots.unpin(at(snapshots, 20)))
        assert pins(snapshots) == pins(bench.open()) == []
        assert not pin.exists()


def test_twins_have_pins_of_their_own(bench: Bench) -> None:
    """Of two snapshots at one seq one can be pinned."""
    snapshots = bench.open()
    create(snapshots, 10, "a")
    run(snapshots.pin(create(snapshots, 10, "b")))
    assert [one.name for one in bench.open() if one.pinned] == ["b"]


def test_a_pinned_snapshot_is_not_dropped(bench: Bench) -> None:
    """Dropping it is refused and nothing is changed; unpinned it goes."""
    snapshots = three(bench)
    old = at(snapshots, 10)
    run(snapshots.pin(old))
    before = tree(bench.path)
    with pytest.raises(PinnedError, match="snapshot old is pinned") as caught:
        run(snapshots.doom(old))
    assert "unpin" in caught.value.hint
    assert tree(bench.path) == before
    assert snapshots.find("old") is old
    run(snapshots.unpin(old))
    drop(snapshots, old)
    assert summary(snapshots) == summary(bench.open())
    assert files(bench.path) == sorted(f"{seq:020d}{suffix}" for seq in (20, 30) for suffix in (".ext", ".dat"))


def test_what_is_being_dropped_is_not_pinned(bench: Bench) -> None:
    """A snapshot that users don't see any more can't be pinned."""
    snapshots = three(bench)
    mid = at(snapshots, 20)
    run(snapshots.doom(mid))
    with pytest.raises(NoSuchSnapshotError, match="snapshot mid is being dropped"):
        run(snapshots.pin(mid))
    assert pins(bench.open()) == []


def test_a_pin_counts_before_it_is_durable(bench: Bench) -> None:
    """No drop begins while a snapshot is being pinned; where the pin can't be made, it can be dropped."""
    snapshots = three(bench)
    mid = at(snapshots, 20)
    work = snapshots.pin(mid)
    next(work)
    with pytest.raises(PinnedError):
        run(snapshots.doom(mid))
    with pytest.raises(OSError, match="full"):
        work.throw(OSError("full"))
    drop(snapshots, mid)


def test_stray_pins_are_removed_when_opened(bench: Bench) -> None:
    """A pin without a snapshot, of one being dropped, or of a temporary one means nothing."""
    snapshots = three(bench)
    create(snapshots, 40, temporary=True)
    run(snapshots.doom(at(snapshots, 20)))
    run(snapshots.pin(at(snapshots, 30)))
    for seq in (15, 20, 40):
        (bench.path / f"{seq:020d}.pin").write_bytes(b"")
    assert pins(bench.open()) == [30]
    assert [name for name in files(bench.path) if name.endswith(".pin")] == [f"{30:020d}.pin"]


def test_a_snapshot_that_takes_the_place_of_a_dropped_one_is_found(bench: Bench) -> None:
    """One at the same seq, with the same key even, counts as the dropped one did, whichever twins are left."""
    snapshots = bench.open()
    create(snapshots, 5, "", (0, 2, 1))
    for kept in (False, True):
        if kept:
            create(snapshots, 10, "", (4, 1, 3))
        dropped = create(snapshots, 10, "", (2, 2, 2))
        assert image(snapshots, 5)[:5] == [1, 1, 2, 2, 3 if kept else -1]
        drop(snapshots, dropped)
        again = create(snapshots, 10, "", (6, 2, 4))
        assert again.key == dropped.key
        assert image(snapshots, 10)[6:8] == [4, 4]
        assert image(snapshots, 5)[6:8] == [4, 4]
        drop(snapshots, again)


# -- names ----------------------------------------------------------------------------------------------------------


def test_a_new_name_lasts(bench: Bench) -> None:
    """The old one is free at once, the entries, the pin and the index are what they were."""
    snapshots = three(bench)
    mid = at(snapshots, 20)
    run(snapshots.pin(mid))
    owner = snapshot_owner(snapshots._storage, mid.stem + ".ext", OURS)
    before = [image(snapshots, seq) for seq in (10, 20, 30)]
    for old, name in (("mid", "other"), ("other", "mid"), ("mid", "mid"), ("mid", "last")):
        run(snapshots.rename(mid, name))
        snapshots.check()
        assert (snapshots.find(name), mid.name) == (mid, name)
        assert old == name or snapshots.find(old) is None
    assert snapshot_owner(snapshots._storage, mid.stem + ".ext", OURS) == owner
    assert [one.name for one in bench.open() if one.pinned] == ["last"]
    assert [image(snapshots, seq) for seq in (10, 20, 30)] == before


def test_names_that_are_taken_or_of_what_goes_are_refused(bench: Bench) -> None:
    """Nothing is changed; while a snapshot gets a name both are taken, and it isn't dropped."""
    snapshots = three(bench)
    mid = at(snapshots, 20)
    before = tree(bench.path)
    with pytest.raises(ExistsError, match="snapshot old already exists"):
        run(snapshots.rename(mid, "old"))
    assert tree(bench.path) == before
    work = snapshots.rename(mid, "newer")
    next(work)
    for name in ("mid", "newer"):
        with pytest.raises(ExistsError):
            snapshots.require_free(name)
    with pytest.raises(NoSuchSnapshotError, match="snapshot mid is just being taken or changed"):
        run(snapshots.doom(mid))
    with pytest.raises(OSError, match="full"):
        work.throw(OSError("full"))
    snapshots.check()
    assert snapshots.find("newer") is None
    assert bench.open().find("mid") is not None
    run(snapshots.doom(mid))
    with pytest.raises(NoSuchSnapshotError, match="snapshot mid is just being taken or dropped"):
        run(snapshots.rename(mid, "newer"))
