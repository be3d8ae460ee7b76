"""Seeded bugs: each of these changes of the program is caught by the test that is named with it.

    python tests/seeded_bugs.py [NAME...]

Each bug is one replacement in one module, made in a copy of the program; then its test runs against the copy, and has
to fail. Without a bug all these tests have to pass. A replacement whose text isn't there exactly once is an error, so
a bug can't go missing unnoticed. Exit status: 0 all were caught, 1 some were not, 2 wrong usage.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PASSED, FAILED = 0, 1
"""Exit status of pytest; any other one says that the tests didn't run."""


@dataclass(frozen=True)
class Bug:
    """One change: *old* in *module* becomes *new*, and *test* fails then."""

    name: str
    module: str
    old: str
    new: str
    test: str


BUGS: Final = (
    Bug(
        "an event's data isn't compared with its checksum",
        "core/pair.py",
        "if checksum(data) != self.checksums[index]:",
        "if len(data) < 0:",
        "tests/unit/test_scrub.py::test_damage_is_found_and_shows_where_it_is_told",
    ),
    Bug(
        "a record isn't compared with its checksum",
        "core/ondisk.py",
        "if digest(view[offset : offset + RECORD_SIZE - 8], seed=salt) != stored:",
        "if digest(view[offset : offset + 1], seed=salt) == stored:",
        "tests/unit/test_snapshot_damage.py",
    ),
    Bug(
        "records of an earlier life of a file are valid",
        "core/ondisk.py",
        'return int.from_bytes(os.urandom(8), "little")',
        "return 7",
        "tests/unit/test_segment.py",
    ),
    Bug(
        "the descriptors of a sealed segment aren't compared with their seal",
        "core/segment.py",
        "if digest_of(parts, self.header.salt) != seal.digest:",
        "if not digest_of(parts, self.header.salt):",
        "tests/unit/test_seal.py",
    ),
    Bug(
        "an index isn't compared with its checksum",
        "core/index.py",
        "body_digest != xxhash.xxh3_64_intdigest(body, seed=digest):",
        "body_digest < 0:",
        "tests/unit/test_index.py::test_what_is_damaged_is_not_used",
    ),
    Bug(
        "an index of what a snapshot was before a merge is used",
        "core/index.py",
        "if (UUID(bytes=uuid), records, digest) != owner:",
        "if UUID(bytes=uuid) != owner.uuid:",
        "tests/unit/test_index.py::test_that_of_an_earlier_state_is_not_used",
    ),
    Bug(
        "a block of the mirror isn't compared with its digest",
        "core/digests.py",
        "return not any_set(data) if digest == HOLE else digest_of(data) == digest",
        "return digest != LOST or not data",
        "tests/unit/test_mirror.py::test_a_flipped_bit_is_an_error_in_its_block_only",
    ),
    Bug(
        "a damaged block that a sync overwrites in part gets a new digest",
        "core/sync.py",
        "yield partial(volume.mirror.prove, *plan.moves[:2])",
        "yield partial(volume.mirror.prepare, *plan.moves[:2])",
        "tests/unit/test_mirror.py",
    ),
    Bug(
        "data of the journals isn't made durable",
        "core/segment.py",
        "return self.dat, self.ext",
        "return self.ext, self.ext",
        "tests/crash/test_cuts.py",
    ),
    Bug(
        "pointers aren't made durable",
        "core/pointers.py",
        "SLOT_OFFSETS[pointers.generation % 2])\n        self._file.datasync()",
        "SLOT_OFFSETS[pointers.generation % 2])",
        "tests/unit/test_power_cuts.py",
    ),
    Bug(
        "the mirror is done before it is durable",
        "core/sync.py",
        "        yield volume.mirror.finish\n",
        "        volume.mirror.digests.flush()\n",
        "tests/crash/test_cuts.py",
    ),
    Bug(
        "a sync overwrites the mirror before it is committed",
        "core/sync.py",
        "    opened = plan.snapshot.seq if plan.snapshot else 0\n",
        "    opened = plan.snapshot.seq if plan.snapshot else 0\n"
        "    volume.mirror.begin()\n"
        "    _overwrite(volume, volume.journal.reader(), [column.tolist() for column in plan.moves])\n",
        "tests/crash/test_cuts.py",
    ),
    Bug(
        "a sync forgets what is pinned",
        "core/sync.py",
        "if volume.pinned_between(plan.base, plan.target) or volume.snapshots",
        "if volume.snapshots",
        "tests/unit/test_opened_meanwhile.py",
    ),
    Bug(
        "a segment is released one event too early",
        "core/journal.py",
        "while count < end and self.parts[count].next_seq - 1 <= tail:",
        "while count < end and self.parts[count].next_seq - 2 <= tail:",
        "tests/unit/test_journal.py",
    ),
    Bug(
        "what an abandoned window wrote comes back",
        "core/journal.py",
        "        self._storage.sync_directory(DIRECTORY)  # what is removed doesn't come back",
        "        # what is removed comes back",
        "tests/unit/test_power_cuts.py",
    ),
    Bug(
        "a snapshot doesn't say how many of its entries are durable",
        "core/segment.py",
        "self.header = dataclasses.replace(self.header, sealed=len(self))",
        "self.header = dataclasses.replace(self.header, sealed=0)",
        "tests/unit/test_snapshot_damage.py",
    ),
    Bug(
        "the newest events aren't written to the primary again after a kill",
        "taps/passthrough.py",
        "self.primary.write([segment.verify(index)], offset)",
        "segment.verify(index)",
        "tests/unit/test_passthrough.py",
    ),
    Bug(
        "a difference counts that was seen once",
        "core/verify.py",
        "sure = differs & self.unsure & stable",
        "sure = differs & stable",
        "tests/unit/test_verify.py",
    ),
    Bug(
        "a scrub repairs with whatever the primary has",
        "core/scrub.py",
        "if self.volume.failure or not matches(data, digest):",
        "if self.volume.failure or not data:",
        "tests/unit/test_scrub.py",
    ),
    Bug(
        "a verdict outlives the sync that changes a block",
        "core/mirror.py",
        "        self._verdicts.forget(*self._flux)\n",
        "",
        "tests/unit/test_mirror.py",
    ),
    Bug(
        "anybody may ask the daemon",
        "service/admission.py",
        "if user not in {0, os.geteuid()}:",
        "if user is None:",
        "tests/unit/test_admission.py",
    ),
)


def run_tests(program: Path, tests: list[str]) -> int:
    """Run tests against the program in a directory; return pytest's exit status."""
    environment = dict(os.environ, PYTHONPATH=str(program), DMAFS_TEST_CRASHES="25", DMAFS_TEST_EXAMPLES="100")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=program, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in {PASSED, FAILED}:
        sys.stderr.write(done.stdout + done.stderr)
    return done.returncode


def copied(folder: Path) -> Path:
    """Copy the program and its tests."""
    for name in ("dmafs", "tests", "man", "contrib"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def is_caught(bug: Bug) -> bool:
    """Say whether the test fails with the bug."""
    with tempfile.TemporaryDirectory(prefix="dmafs-bug.") as name:
        program = copied(Path(name))
        module = program / "dmafs" / bug.module
        text = module.read_text()
        if text.count(bug.old) != 1:
            raise SystemExit(f"error: {bug.name}: its text is {text.count(bug.old)} times in {bug.module}, not once")
        module.write_text(text.replace(bug.old, bug.new))
        return run_tests(program, [bug.test]) == FAILED


def main(names: list[str]) -> int:
    """Try the bugs named, or all."""
    unknown = set(names) - {bug.name for bug in BUGS}
    if unknown:
        sys.stderr.write(f"error: no bug {', '.join(sorted(unknown))}\n")
        return 2
    chosen = [bug for bug in BUGS if not names or bug.name in names]
    with tempfile.TemporaryDirectory(prefix="dmafs-bug.") as name:
        if run_tests(copied(Path(name)), sorted({bug.test for bug in chosen})) != PASSED:
            sys.stderr.write("error: the tests fail without a bug\n")
            return 1
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        caught = list(pool.map(is_caught, chosen))
    for bug, right in zip(chosen, caught, strict=True):
        sys.stdout.write(f"{'caught    ' if right else 'NOT CAUGHT'}  {bug.name}: {bug.test}\n")
    sys.stdout.write(f"{sum(caught)} of {len(chosen)} bugs are caught\n")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
