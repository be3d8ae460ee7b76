"""What is claimed of a volume at a moment, what is found when it is opened, and the comparison of both.

``Claims`` are kept by who runs a workload, up to date at each operation; what an operation under way may or may not
have brought about is between *least* and *most*. ``observe`` opens a disk and looks at everything. Since contents are
compared by their hashes, what is observed of one state of a disk can be judged by the claims of many moments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dmafs.core.clone import Clone
from dmafs.core.limits import IndexLimits, SegmentLimits, VolumeLimits
from dmafs.core.overlay import DAT, EXT
from dmafs.core.snapshot import Snapshot
from dmafs.core.store import open_volume_in
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError, StoreError
from dmafs.units import SECTOR
from tests.crash.disk import SimulatedDisk, SimulatedStorage

LIMITS: Final = VolumeLimits(
    segments=SegmentLimits(data_sectors=24, records=7),
    index=IndexLimits(journals=2, indexed=1),
    images=2,
    reserve_bytes=0,
)
PRIMARY: Final = "primary"
FOLDER: Final = "disk"

Named = tuple[int, str]


def named(snapshot: Snapshot) -> Named:
    return snapshot.seq, snapshot.name


class Clock:
    """Each look is a microsecond later."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000_000

    def __call__(self) -> int:
        self.now += 1000
        return self.now


@dataclass(frozen=True)
class CloneModel:
    """What a clone may show: of each sector all versions since its last flush, the newest one last."""

    seq: int
    sectors: tuple[tuple[bytes, ...], ...] = field(repr=False)
    uncertain: bool = False
    """Whether a write of it failed: then nobody knows how much of it is there, and a flush decides nothing."""


def versions_of(image: bytes) -> tuple[tuple[bytes, ...], ...]:
    return tuple((image[at : at + SECTOR],) for at in range(0, len(image), SECTOR))


@dataclass(frozen=True)
class Claims:
    """What has to hold after a cut."""

    created: bool = False
    durable: int = 0
    """What was flushed is there."""
    head_most: int = 0
    """What was never written isn't."""
    copied: bool = False
    origins: range = range(0)
    """Where history may begin; nowhere if it is empty."""
    floors: tuple[int, int] = (0, 0)
    least: frozenset[Named] = frozenset()
    """Snapshots that users see."""
    most: frozenset[Named] = frozenset()
    either: frozenset[tuple[Named, Named]] = frozenset()
    """Of two names for one snapshot it has one."""
    former: frozenset[Named] = frozenset()
    """Names that snapshots had: where the write of another one was lost they have them still."""
    pins_least: frozenset[Named] = frozenset()
    pins_most: frozenset[Named] = frozenset()
    marks: frozenset[Named] = frozenset()
    clones_least: frozenset[str] = frozenset()
    clones: Mapping[str, CloneModel] = field(default_factory=dict)
    """Those that there may be."""
    gaps: tuple[tuple[int, int], ...] = ()
    """Between two seqs nothing has to be recoverable."""


class History:
    """All that ever was: images by seq, their times, clones; and what is claimed now."""

    def __init__(self, content: bytes, *, windowed: bool = False) -> None:
        self.images = [content]
        self.hashes = [hash(content)]
        self.times: dict[int, int] = {}
        self.ends: set[int] | None = {0} if windowed else None
        self.positions: dict[int, set[int]] = {0: {0}}
        self.claims = Claims()

    @property
    def head(self) -> int:
        return len(self.images) - 1

    def add(self, start: int, data: bytes) -> None:
        image = self.images[-1]
        self.images.append(image[: start * SECTOR] + data + image[start * SECTOR + len(data) :])
        self.hashes.append(hash(self.images[-1]))

    def take_back(self, head: int) -> None:
        del self.images[head + 1 :]
        del self.hashes[head + 1 :]

    def is_point(self, seq: int) -> bool:
        return self.ends is None or seq in self.ends


@dataclass
class Found:
    """What is on a disk."""

    error: StoreError | None = None
    disk: SimulatedDisk | None = None
    """As it is once the volume was opened."""
    head: int = 0
    floor: int = 0
    copied: bool = False
    origin: int = 0
    points: set[int] = field(default_factory=set)
    """The seqs of all images that can be had."""
    images: dict[int, int] = field(default_factory=dict)
    """Hashes of those that were read."""
    times: dict[int, int] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)
    """Images that can't be read: CorruptionError."""
    snapshots: frozenset[Named] = frozenset()
    pins: frozenset[Named] = frozenset()
    marks: frozenset[Named] = frozenset()
    position: int = 0
    clones: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)


def open_disk(disk: SimulatedDisk, clock: Clock) -> Volume:
    return open_volume_in(SimulatedStorage(disk, FOLDER), Path(FOLDER), limits=LIMITS, clock=clock)


def observe(disk: SimulatedDisk, clock: Clock, *, damaged: bool = False) -> Found:
    """Open the volume on a disk and look at everything; with *damaged* errors that say so are taken note of.

    Without it invariants of all structures are checked, too, and that there is no file that nothing refers to.
    """
    volume, failure = _opened(disk, clock)
    if volume is None:
        assert disk.opened == 0, "who fails closes what was opened"
        return Found(failure)
    try:
        found = look(volume, disk, damaged=damaged)
        if not damaged and found.copied:  # of a copy that was cut off the mirror is anything
            volume.check()
        if not damaged:
            nothing_is_left(volume, disk)
    finally:
        volume.close()
    assert disk.opened == 0
    return found


def _opened(disk: SimulatedDisk, clock: Clock) -> tuple[Volume | None, StoreError | None]:
    try:
        return open_disk(disk, clock), None
    except StoreError as error:
        return None, error


def look(volume: Volume, disk: SimulatedDisk, *, damaged: bool = False) -> Found:
    """Return what an open volume has.

    Snapshots, the oldest and the newest image and a third of those between are read; with *damaged* all.
    """
    now = volume.pointers.now
    found = Found(None, disk, volume.journal.head, volume.floor, now.copied, now.origin_seq)
    forward = range(max(volume.floor, now.origin_seq), found.head + 1)
    seqs = {*forward, *(one.seq for one in volume.snapshots.all())}
    for seq in seqs:
        try:
            if volume.recoverable(seq):
                found.times[seq] = volume.time_of(seq)
                found.points.add(seq)
        except CorruptionError:
            assert damaged, seq
            found.damaged.append(seq)
    rest = sorted(found.points - {*forward[:1], *forward[-1:]} & {*forward})
    passed_over = set() if damaged else {*rest[::3], *rest[1::3]}
    for seq in sorted(found.points - passed_over):
        try:
            image = volume.image(seq)
            found.images[seq] = hash(bytes(image.read(0, image.size)))
        except CorruptionError:
            assert damaged, seq
            found.damaged.append(seq)
    found.snapshots = frozenset(map(named, volume.snapshots))
    found.pins = frozenset(named(one) for one in volume.snapshots if one.pinned)
    try:
        found.marks = frozenset((mark.seq, mark.name) for mark in volume.journal.marks())
    except CorruptionError:
        assert damaged
    found.position = volume.journal.position
    for clone in volume.clones:
        found.clones[clone.name] = clone.seq, _shown(clone)
    return found


def _shown(clone: Clone) -> bytes | None:
    """Return what a clone shows, None if it is of no use."""
    try:
        return bytes(run(clone.read(0, clone.parts()[1].size)))
    except CorruptionError:
        return None


def nothing_is_left(volume: Volume, disk: SimulatedDisk) -> None:
    """Assert that each file belongs to something."""
    known = {f"{part.stem}{suffix}" for part in volume.journal.parts for suffix in (".ext", ".dat")}
    for snapshot in volume.snapshots.all():
        known |= {snapshot.stem + (".gone" if snapshot.gone else ".ext"), snapshot.stem + ".dat"}
        known |= {snapshot.pin} if snapshot.pinned else set()
        assert not snapshot.hidden or volume.is_held(snapshot.seq), "what is hidden is kept for somebody"
    known |= {f"clones/{clone.name}/{name}" for clone in volume.clones for name in ("", EXT, DAT)}
    known |= {"", "volume.json", "pointers", "mirror.img", "digests", "forward/", "backward/", "clones/"}
    there = {path[len(FOLDER) + 1 :] for path in disk.paths() if path.startswith(FOLDER + "/")}
    indexes = {name.rpartition(".")[0] + ".idx" for name in known if name.endswith((".ext", ".gone"))}
    assert there - {"volume.json.new"} - indexes == known, sorted(there ^ known)


def judge(found: Found, claims: Claims, history: History, *, damaged: bool = False, failing: bool = False) -> None:
    """Assert that what was found is what is claimed; where there is damage, that nothing wrong is shown.

    With *failing* something had failed since the volume was opened: clones may be of no use until it is opened again.
    """
    if found.error is not None:
        assert damaged or not claims.created, found.error.message
        return
    assert found.head <= claims.head_most, f"head {found.head} of {claims.head_most}"
    _images_are_history(found, claims, history)
    _clones_are_theirs(found, claims, damaged=damaged, failing=failing)
    most = claims.most | (claims.former if damaged else frozenset())
    assert found.snapshots <= most, f"snapshots {sorted(found.snapshots - most)} appeared"
    if damaged:
        return
    assert found.head >= claims.durable, f"head {found.head}, but {claims.durable} was flushed"
    assert history.is_point(found.head)
    if history.ends is not None:
        assert found.position in history.positions[found.head], "journal and place are one"
    assert claims.floors[0] <= found.floor <= claims.floors[1], f"floor {found.floor}, not in {claims.floors}"
    assert found.snapshots >= claims.least, f"snapshots {sorted(claims.least - found.snapshots)} were lost"
    for names in claims.either:
        assert len(found.snapshots.intersection(names)) == 1, f"one of {names}"
    assert claims.pins_least <= found.pins <= claims.pins_most, f"pins {sorted(found.pins)}"
    marks = {mark for mark in claims.marks if mark[0] > found.floor}
    assert found.marks >= marks, f"marks {sorted(marks - found.marks)} were lost"
    _nothing_is_missing(found, claims, history)


def _images_are_history(found: Found, claims: Claims, history: History) -> None:
    for seq, digest in found.images.items():
        assert digest == history.hashes[seq], f"the image at {seq} isn't that of history"
    for seq in found.points:
        assert history.is_point(seq), f"{seq} splits a window"
        if seq in history.times and seq != found.origin:  # that has the time of its indicator
            assert found.times[seq] == history.times[seq], f"the time of {seq}"
    assert not found.points or claims.origins
    times = [time for _, time in sorted(found.times.items())]
    assert all(one < other for one, other in itertools.pairwise(times)), "times grow along seqs"


def _nothing_is_missing(found: Found, claims: Claims, history: History) -> None:
    assert found.copied or not claims.copied
    if not found.copied:
        assert not found.points
        return
    assert found.origin in claims.origins, f"origin {found.origin}"
    needed = {seq for seq, _ in found.snapshots if seq >= found.origin}
    for seq in range(max(found.floor, found.origin), found.head + 1):
        if history.is_point(seq) and not any(begin < seq < end for begin, end in claims.gaps):
            needed.add(seq)
    assert needed <= found.points, f"images {sorted(needed - found.points)} can't be had"


def _clones_are_theirs(found: Found, claims: Claims, *, damaged: bool, failing: bool) -> None:
    assert found.clones.keys() <= claims.clones.keys(), "a clone appeared"
    assert found.clones.keys() >= claims.clones_least or damaged, "a clone was lost"
    for name, (seq, shown) in found.clones.items():
        if shown is None:  # one that was being made when something failed may be there without its base
            assert damaged or failing or name not in claims.clones_least, f"clone {name} is of no use"
            continue
        model = claims.clones[name]
        assert seq == model.seq
        for sector, versions in enumerate(model.sectors):
            assert shown[sector * SECTOR : (sector + 1) * SECTOR] in versions, f"sector {sector} of clone {name}"


def unequal_files(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> Iterable[str]:
    """Return the paths at which two disks differ."""
    return sorted(path for path in {*one, *other} if one.get(path) != other.get(path))
