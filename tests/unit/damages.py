"""What can be wrong with a store of ``broken.make_store``: how it gets so, and what ``inspect`` says of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE
from tests.unit.tools import flip

Damage = Callable[[Path], object]


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def segment(store: Path, number: int, suffix: str = ".ext") -> Path:
    """Return a file of the forward journal's segments, by their order."""
    return sorted((store / "one" / "forward").glob(f"*{suffix}"))[number]


def held(store: Path, suffix: str = ".ext") -> Path:
    """Return a file of the oldest snapshot, which holds something."""
    return store / "one" / "backward" / f"{0:020d}{suffix}"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def version(path: Path, offset: int = 8) -> None:
    """Have a file say that it is of another version."""
    content = bytearray(path.read_bytes())
    content[offset] = 99
    path.write_bytes(content)


def open_configuration(store: Path) -> None:
    (store / "dmafs.conf").touch()
    (store / "dmafs.conf").chmod(0o666)


def link(path: Path) -> None:
    """Put a link in the place of a file, to where that is now."""
    away = path.parents[1] / "away"
    path.rename(away)
    path.symlink_to(away)


def both_slots(store: Path) -> None:
    for offset in (40, 4136):
        flip(store / "one/pointers", offset)


def foreign_log(store: Path) -> None:
    (store / "one/log").mkdir(0o700)
    (store / "one/log/x").touch()


ERRORS: dict[str, tuple[Damage, str, str]] = {
    "others can write to the store": (lambda s: s.chmod(0o770), "store", "can be written by others"),
    "others can write to the configuration": (
        open_configuration,
        "dmafs.conf",
        "written by others",
    ),
    "others can write to a volume": (lambda s: (s / "one").chmod(0o702), "one", "can be written by others"),
    "others can write to a file": (lambda s: (s / "one/pointers").chmod(0o620), "one/pointers", "written by others"),
    "a link": (
        lambda s: link(s / "one/digests"),
        "one/digests",
        "is no regular file",
    ),
    "a directory": (lambda s: held(s, ".pin").mkdir(), f"one/backward/{0:020d}.pin", "is no regular file"),
    "no volume.json": (lambda s: (s / "one/volume.json").unlink(), "one/volume.json", "volume.json is missing"),
    "damaged volume.json": (lambda s: flip(s / "one/volume.json", 0), "one/volume.json", "doesn't describe a volume"),
    "volume.json of a version": (
        lambda s: (s / "one/volume.json").write_text('{"format": 99}'),
        "one/volume.json",
        "has format version 99",
    ),
    "volume.json of another": (
        lambda s: shutil.copy(s / "two/volume.json", s / "one"),
        "one/pointers",
        "belongs to volume",
    ),
    "no pointers": (lambda s: (s / "one/pointers").unlink(), "one/pointers", "pointers is missing"),
    "pointers cut": (lambda s: truncate(s / "one/pointers", 4097), "one/pointers", "pointers ends at byte 4097"),
    "both slots": (
        both_slots,
        "one/pointers",
        "at byte 0 doesn't match",
    ),
    "pointers of a version": (lambda s: version(s / "one/pointers"), "one/pointers", "has format version 99"),
    "no mirror": (lambda s: (s / "one/mirror.img").unlink(), "one", "mirror.img is missing"),
    "mirror cut": (lambda s: truncate(s / "one/mirror.img", 512), "one", "mirror.img has 512 bytes instead of"),
    "no digests": (lambda s: (s / "one/digests").unlink(), "one", "digests is missing"),
    "digests cut": (lambda s: truncate(s / "one/digests", -8), "one", "digests has .* bytes instead of"),
    "digests' header": (lambda s: flip(s / "one/digests", 20), "one", "checksum of .*digests doesn't match"),
    "no forward": (lambda s: shutil.rmtree(s / "one/forward"), "one/forward", "forward can't be opened: no such file"),
    "foreign in forward": (lambda s: (s / "one/forward/x.txt").touch(), "one/forward/x.txt", "is no file of ours"),
    "segment missing": (lambda s: segment(s, 1).unlink(), "one/forward/*.ext", "is missing: it had events"),
    "first segment missing": (lambda s: segment(s, 0).unlink(), "one/forward/*.ext", "has no events"),
    "last segment missing": (lambda s: segment(s, -1).unlink(), "one/forward/*.ext", "had been made durable"),
    "data of a sealed segment": (lambda s: segment(s, 1, ".dat").unlink(), "one/forward/*.ext", ".dat is missing"),
    "data of a sealed segment cut": (
        lambda s: truncate(segment(s, 1, ".dat"), -1),
        "one/forward/*.ext",
        "bytes instead",
    ),
    "data of the last segment": (lambda s: segment(s, -1, ".dat").unlink(), "one/forward/*.ext", ".dat is missing"),
    "header of a segment": (lambda s: flip(segment(s, 1), 33), "one/forward/*.ext", "checksum of .* doesn't match"),
    "segment of a version": (lambda s: version(segment(s, 1)), "one/forward/*.ext", "has format version 99"),
    "descriptor of a sealed segment": (
        lambda s: flip(segment(s, 1), HEADER_SIZE + RECORD_SIZE),
        "one/forward/*.ext",
        "checksum of the descriptors",
    ),
    "descriptor of the last segment": (
        lambda s: flip(segment(s, -1), HEADER_SIZE + 20),
        "one/forward/*.ext",
        "had been made durable",
    ),
    "segments swapped": (lambda s: swap(segment(s, 0), segment(s, 1)), "one/forward/*.ext", "begins at seq"),
    "segment of another": (
        lambda s: shutil.copy(s / "two/forward" / segment(s, 1).name, segment(s, 1)),
        "one/forward/*.ext",
        "belongs to volume",
    ),
    "no backward": (lambda s: shutil.rmtree(s / "one/backward"), "one/backward", "backward can't be opened"),
    "foreign in backward": (lambda s: (s / "one/backward/x.txt").touch(), "one/backward/x.txt", "is no file of ours"),
    "snapshot's header": (lambda s: flip(held(s), 40), f"one/backward/{0:020d}.ext", "checksum of .* doesn't match"),
    "snapshot cut": (lambda s: truncate(held(s), HEADER_SIZE), f"one/backward/{0:020d}", "but . had been made durable"),
    "snapshot's data cut": (lambda s: truncate(held(s, ".dat"), 1), f"one/backward/{0:020d}", "had been made durable"),
    "snapshot's data missing": (lambda s: held(s, ".dat").unlink(), f"one/backward/{0:020d}", ".dat is missing"),
    "snapshot renamed": (
        lambda s: held(s).rename(held(s).with_name(f"{7:020d}.ext")),
        f"one/backward/{7:020d}.ext",
        "holds the snapshot",
    ),
    "no clones": (lambda s: (s / "one/clones").rename(s / "one/c"), "one/clones", "clones can't be opened"),
    "foreign in clones": (lambda s: (s / "one/clones/.x").touch(), "one/clones/.x", "is no file of ours"),
    "clone's records": (
        lambda s: flip(s / "one/clones/scratch/overlay.ext", 40),
        "one/clones/scratch",
        "checksum of .* doesn't match",
    ),
    "clone's data": (lambda s: (s / "one/clones/scratch/overlay.dat").unlink(), "one/clones/scratch", "is missing"),
    "clone's file in the way": (lambda s: (s / "one/clones/other").touch(), "one/clones/other", "is no directory"),
}
"""What is done to a store, about which file an error is found, and what it says."""

NOTES: dict[str, tuple[Damage, str, str]] = {
    "foreign file": (lambda s: (s / "notes.txt").touch(), "notes.txt", "isn't the store's"),
    "foreign directory": (lambda s: (s / "photos").mkdir(), "photos", "isn't the store's"),
    "half made": (lambda s: (s / ".three.new").mkdir(), ".three.new", "is a volume whose making was cut off"),
    "foreign in a volume": (lambda s: (s / "one/notes.txt").touch(), "one/notes.txt", "isn't the volume's"),
    "half written": (lambda s: (s / "one/volume.json.new").touch(), "one/volume.json.new", "left over from writing"),
    "renamed": (lambda s: (s / "one").rename(s / "three"), "three/volume.json", "calls the volume one"),
    "one slot": (lambda s: flip(s / "one/pointers", 40), "one/pointers", "at byte 0 doesn't match"),
    "torn end": (
        lambda s: append(segment(s, -1), b"x" * 70),
        "one/forward/*.ext",
        "the last 70 B of .* don't count; opening",
    ),
    "seal": (lambda s: flip(segment(s, 1), -30), "one/forward/*.ext", "the last .* B of .* don't count"),
    "data alone": (lambda s: (s / f"one/forward/{99:020d}.dat").touch(), f"one/forward/{99:020d}.dat", "is left over"),
    "in the mirror": (
        lambda s: shutil.copy(segment(s, 0), s / f"one/forward/{1:020d}.ext"),
        f"one/forward/{1:020d}.ext",
        "not needed",
    ),
    "half made snapshot": (
        lambda s: (s / f"one/backward/{7:020d}.new").touch(),
        f"one/backward/{7:020d}.new",
        "is left over",
    ),
    "pin alone": (lambda s: (s / f"one/backward/{7:020d}.pin").touch(), f"one/backward/{7:020d}.pin", "is left over"),
    "torn snapshot": (
        lambda s: append(held(s), b"x" * 70),
        f"one/backward/{0:020d}.ext",
        "the last 70 B of .* don't count, an",
    ),
    "half made clone": (lambda s: (s / "one/clones/.x.new").mkdir(), "one/clones/.x.new", "is left over"),
    "torn clone": (
        lambda s: append(s / "one/clones/scratch/overlay.ext", b"x"),
        "one/clones/scratch/overlay.ext",
        "the last 1 B of",
    ),
    "foreign in a clone": (lambda s: (s / "one/clones/scratch/x").touch(), "one/clones/scratch/x", "isn't the clone's"),
    "foreign among logs": (
        foreign_log,
        "one/log/x",
        "is no log of a mapped device",
    ),
}
