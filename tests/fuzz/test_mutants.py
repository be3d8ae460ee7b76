"""Millions of mutated inputs: each gives what it is, or a refusal, in bounded memory; never anything else.

``KINDS`` says what is tried and how much of it. Each kind is tried in so many shards, each with a seed of its own,
which depends on DMAFS_TEST_SEED only; the shards run in as many processes as there are processors.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Final

import numpy as np
import pytest

from tests.fuzz import formats, texts

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
LEAST: Final = 2_000_000
SHARDS: Final = 8
MEMORY_MAX: Final = 256 << 20
"""More address space than that isn't to be had: an input that makes one ask for more fails with MemoryError."""

Kind = Callable[[np.random.Generator, int], None]
KINDS: Final[dict[str, tuple[Kind, int]]] = {
    "headers": (formats.headers, 240_000),
    "pointers": (formats.pointers, 240_000),
    "digest headers": (formats.digest_headers, 120_000),
    "volume.json": (formats.volume_infos, 160_000),
    "records": (formats.records, 240_000),
    "segments": (formats.segments, 16_000),
    "pointer files": (formats.pointer_files, 40_000),
    "overlays": (formats.overlays, 40_000),
    "log headers": (formats.log_headers, 400_000),
    "logs": (formats.logs, 24_000),
    "spellings": (texts.spellings, 400_000),
    "quantities": (texts.quantities, 240_000),
    "names in the tree": (texts.names, 320_000),
    "configurations": (texts.configurations, 64_000),
    "requests": (texts.requests, 48_000),
    "indexes": (formats.indexes, 80_000),
    "partition tables": (formats.partition_tables, 80_000),
    "machine files": (texts.machines, 48_000),
}
tried: dict[str, int] = {}


def work(kind: str, shard: int) -> int:
    """Try a shard of a kind, in a process of the pool; return how many that were."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_MAX
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        function, count = KINDS[kind]
        function(np.random.default_rng([SEED, list(KINDS).index(kind), shard]), count // SHARDS)
        return count // SHARDS
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Return processes to work in."""
    context = multiprocessing.get_context("spawn")  # without this process' threads and memory
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as executor:
        yield executor


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_give_what_they_are_or_a_refusal(
    kind: str, pool: ProcessPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    """See what is tried: its docstring is the claim."""
    begun = monotonic()
    tried[kind] = sum(pool.map(work, [kind] * SHARDS, range(SHARDS)))
    with capsys.disabled():
        print(f"\n{kind}: {tried[kind]:,} mutants in {monotonic() - begun:.1f} s, seed {SEED}", end=" ", flush=True)


def test_there_were_millions(capsys: pytest.CaptureFixture[str]) -> None:
    """All kinds were tried, and so many inputs in all."""
    total = sum(tried.values())
    with capsys.disabled():
        print(f"\n{total:,} mutants in all", end=" ", flush=True)
    assert set(tried) == set(KINDS)
    assert total >= LEAST
