"""Who looks at the past: images held and not, read at once or step by step while everything else goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from dmafs.core.diff import diff
from dmafs.core.extent import Ints
from dmafs.core.image import Image, Piece
from dmafs.core.vrmo import Stack
from dmafs.core.work import Work, run
from tests.model.oracle import SECTOR, nonzero_sectors
from tests.model.stepping import Reader
from tests.model.volume_model import ALL, Model

READERS_MAX = 4
KINDS = ("locate", "locate", "locate", "measure", "stack", "warm", "diff", "clone")
STEPS = st.sampled_from([0, 1, 1, 2, 3, ALL])


class Readers(Model):
    """Readers never see wrong bytes; those of images that nobody holds may be told that there is nothing."""

    @precondition(lambda self: self.copied)
    @rule(number=st.integers(0, 1000), from_end=st.booleans())
    def hold(self, number: int, from_end: bool) -> None:  # noqa: FBT001
        seqs = self.recoverable()
        seq = seqs[-1 - number % min(len(seqs), 3)] if from_end else seqs[number % len(seqs)]
        self._hold(seq)

    @precondition(lambda self: self.copied and self.volume.recoverable(max(self.volume.pointers.now.mirror_seq, 0)))
    @rule()
    def hold_mirror(self) -> None:
        """The mirror's own moment is the one that a sync takes away first."""
        self._hold(self.volume.pointers.now.mirror_seq)

    def _hold(self, seq: int) -> Image:
        image = self.volume.image(seq)
        known, pins = self.held.get(seq, (image, 0))
        assert image is known or not pins, "one object for one moment"
        image.pins += 1
        self.held[seq] = image, pins + 1
        return image

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 100))
    def unhold(self, number: int) -> None:
        seq = sorted(self.held)[number % len(self.held)]
        readers = sum(reader.held is not None and reader.seq == seq for reader in self.readers)
        if self.held[seq][1] > readers:
            self.let_go(seq)

    @precondition(lambda self: self.copied)
    @rule(number=st.integers(0, 1000), offset=st.integers(0, 64 * SECTOR), length=st.integers(0, 30 * SECTOR))
    def read(self, number: int, offset: int, length: int) -> None:
        seqs = self.recoverable()
        seq = seqs[number % len(seqs)]
        offset %= self.oracle.size_sectors * SECTOR
        expected = self.oracle.image_at(seq)[offset : offset + length]
        assert self.volume.image(seq).read(offset, length) == expected

    @precondition(lambda self: self.copied)
    @rule()
    def look_at_everything(self) -> None:
        for seq in self.recoverable():
            self.compare(self.volume.image(seq), seq)

    # -- step by step -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.copied and len(self.readers) < READERS_MAX)
    @rule(
        kind=st.sampled_from(KINDS),
        number=st.integers(0, 1000),
        place=st.tuples(st.integers(0, 64 * SECTOR), st.integers(1, 64 * SECTOR)),
        held=st.booleans(),
        steps=STEPS,
    )
    def begin_to_read(self, kind: str, number: int, place: tuple[int, int], held: bool, steps: int) -> None:  # noqa: FBT001
        """Begin to read, mostly what only snapshots have, since that is what changes its place."""
        seqs = self.recoverable()
        past = [seq for seq in seqs if seq < self.floor] if number % 4 else []
        seq = (past or seqs)[number % len(past or seqs)]
        offset = place[0] % (self.oracle.size_sectors * SECTOR)
        length = min(place[1], self.oracle.size_sectors * SECTOR - offset)
        if kind in {"diff", "warm"}:
            found, work = self._whole(kind, seq, seqs[place[0] % len(seqs)])
            reader = Reader(kind, seq, work, found, held=None, reads=False)
        elif kind == "clone":
            names = [clone.name for clone in self.volume.clones]
            if not names:
                return
            reader = self._read_clone(names[number % len(names)], offset, length)
        else:
            image = self._hold(seq) if held else self.volume.image(seq)
            found, work = self._image(kind, image, offset, length)
            reader = Reader(kind, seq, work, found, held=image if held else None, reads=False)
        name = f"{kind} {'held' if held else 'unheld'}" if kind in {"locate", "measure", "stack"} else kind
        self.counts[name] = self.counts.get(name, 0) + 1
        self.readers.append(reader)
        self._step(reader, steps)

    @precondition(lambda self: self.readers)
    @rule(number=st.integers(0, 3), steps=STEPS)
    def read_on(self, number: int, steps: int) -> None:
        self._step(self.readers[number % len(self.readers)], steps)

    def _step(self, reader: Reader, steps: int) -> None:
        for _ in range(steps):
            if not reader.over:
                reader.step()
        self.end_reader(reader)

    def finish_readers(self, name: str) -> None:
        """Have those who read a clone come to an end."""
        for reader in [reader for reader in self.readers if reader.kind == f"clone {name}"]:
            self._step(reader, ALL)

    def _image(self, kind: str, image: Image, offset: int, length: int) -> tuple[Callable[[Any], None], Work[Any]]:
        seq, whole = image.seq, self.oracle.image_at(image.seq)

        def located(pieces: list[Piece]) -> None:
            read = image.read_pieces(pieces, offset, length)
            assert read == whole[offset : offset + length], f"the image at {seq} isn't history's"
            at_once = image.read_nowait(offset, length, memoryview(bytearray(length)))
            assert at_once is None or at_once == whole[offset : offset + length], f"the image at {seq} isn't history's"

        def measured(sectors: int) -> None:
            assert nonzero_sectors(whole) <= sectors <= self.oracle.size_sectors

        def stacked(stack: Stack) -> None:
            other = Image(self.volume, seq, 0)
            size = self.oracle.size_sectors
            other.vrmo.make_pages(0, size, stack)
            while (pieces := other._pieces(0, size)) is None:
                run(self.volume.load(other._missing(0, size)))
            assert other.read_pieces(pieces, 0, image.size) == whole

        if kind == "measure":
            return measured, image.measure()
        if kind == "stack":
            return stacked, self.volume.stack(image)
        return located, image.locate(offset, length)

    def _whole(self, kind: str, a: int, b: int) -> tuple[Callable[[Any], None], Work[Any]]:
        def differing(found: tuple[Ints, Ints]) -> None:
            self.check_diff(a, b, found)

        if kind == "warm":
            return (lambda _: None), self.volume.warm()
        return differing, diff(self.volume, a, b)

    def _read_clone(self, name: str, offset: int, length: int) -> Reader:
        clone, expected = self.volume.clones.find(name), self.clones[name]
        assert clone is not None

        def found(read: memoryview) -> None:
            assert read == expected.shown[offset : offset + length]

        return Reader(f"clone {name}", expected.seq, clone.read(offset, length), found, held=None, reads=True)
