"""Mutants: bytes and texts that were changed a little, by a seeded generator; none is like its original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
BATCH_BYTES: Final = 1 << 20
_ODD: Final = np.array(
    [0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1],
    "<u8",
)


def mutants(rng: np.random.Generator, originals: Sequence[bytes], count: int) -> Iterator[bytes]:
    """Yield *count* mutants of *originals*, which have one length: bits, bytes, fields, runs changed, parts moved."""
    while count > 0:
        rows = min(BATCH_BYTES // len(originals[0]), count)
        chosen = np.frombuffer(b"".join(originals), np.uint8).reshape(len(originals), -1)
        chosen = chosen[rng.integers(0, len(originals), rows)]
        mutated = _changed(rng, chosen.copy())
        same = np.flatnonzero((mutated == chosen).all(axis=1))
        mutated[same, rng.integers(0, mutated.shape[1], len(same))] ^= 1
        data, length = mutated.tobytes(), mutated.shape[1]
        for begin in range(0, len(data), length):
            yield data[begin : begin + length]
        count -= rows


def _changed(rng: np.random.Generator, block: Bytes) -> Bytes:
    rows, length = block.shape
    kinds = rng.integers(0, 5, rows)
    bits = np.flatnonzero(kinds == 0)
    block[bits, rng.integers(0, length, len(bits))] ^= (1 << rng.integers(0, 8, len(bits))).astype(np.uint8)
    for most in range(8):
        several = np.flatnonzero((kinds == 1) & (rng.integers(0, 8, rows) >= most))
        block[several, rng.integers(0, length, len(several))] = rng.integers(0, 256, len(several), np.uint8)
    fields = np.flatnonzero(kinds == 2)
    width = rng.choice([4, 8], len(fields))
    at = rng.integers(0, max(length // 4 - 1, 1), len(fields)) * 4
    values = rng.choice(_ODD, len(fields)).view(np.uint8).reshape(-1, 8)
    for byte in range(min(8, length)):
        has = (width > byte) & (at + byte < length)
        block[fields[has], at[has] + byte] = values[has, byte]
    one, other = rng.integers(0, length + 1, rows), rng.integers(0, length + 1, rows)
    columns = np.arange(length)
    within = (columns >= np.minimum(one, other)[:, None]) & (columns < np.maximum(one, other)[:, None])
    filled = rng.integers(0, 256, rows, np.uint8) * rng.integers(0, 2, rows, np.uint8)
    block = np.where(within & (kinds == 3)[:, None], filled[:, None], block)
    moved = np.take_along_axis(block, (columns + rng.integers(1, length, (rows, 1))) % length, axis=1)
    return np.where(within & (kinds == 4)[:, None], moved, block)


def odd_numbers(rng: np.random.Generator, count: int) -> list[int]:
    """Return numbers of 64 bits, among them those at which something ends."""
    wide = rng.integers(0, 2**64, count, np.uint64, endpoint=False) if count else np.empty(0, np.uint64)
    small = rng.integers(0, 4096, count, np.uint64)
    kind = rng.integers(0, 3, count)
    found: list[int] = np.where(kind == 0, rng.choice(_ODD, count), np.where(kind == 1, wide, small)).tolist()
    return found


def text_mutants(random: Random, originals: Sequence[str], count: int, *, words: Sequence[str]) -> Iterator[str]:
    """Yield *count* texts: originals with characters changed, dropped, doubled, and words put in, or two in one."""
    for _ in range(count):
        original = random.choice(originals)
        text = list(original)
        for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
            at = random.randrange(len(text) + 1)
            match random.randrange(7):
                case 0:
                    text[at : at + 1] = [chr(random.randrange(0x20, 0x7F))]
                case 1:
                    text[at : at + 1] = [chr(random.choice((0, 9, 10, 0x660, 0xFF12, 0x202E, 0x1F600, 0xD7FF)))]
                case 2:
                    del text[at : at + random.randrange(1, 4)]
                case 3:
                    text[at:at] = text[at : at + random.randrange(1, 9)] * random.choice((1, 1, 40))
                case 4:
                    text[at:at] = random.choice(words)
                case 5:
                    text[at:at] = str(random.getrandbits(random.choice((4, 16, 64, 700))))
                case _:
                    text[at:] = random.choice(originals)[random.randrange(len(original) + 1) :]
        mutant = "".join(text)
        yield mutant if mutant != original else mutant + "?"


def seeded(rng: np.random.Generator) -> Random:
    """Return a generator of Python's that goes on where *rng* is."""
    return Random(int(rng.integers(0, 2**63)))


def shown(value: Any) -> str:
    """Return what to show of a mutant that something went wrong with."""
    return repr(value)[:2000]
