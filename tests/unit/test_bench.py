"""Claims about tests/bench: the benchmark of the core runs, and says all that its readers need."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.chains import Chains
from tests.bench.history import History
from tests.bench.peers import BORG, CHAIN, DMAFS, RAW
from tests.bench.read import judged
from tests.bench.report import Result, at_least, at_most, text, told

ROOT = Path(__file__).parents[2]
SHM = Path("/dev/shm")  # noqa: S108 - a private directory is made in it


def test_a_goal_is_reached_or_missed() -> None:
    """A value on the goal's side of it, or at it, passes; one without a goal is only told."""
    values = (1.9, 2, 2.1)
    assert [at_most("a", value, "ms", 2).passed for value in values] == [True, True, False]
    assert [at_least("a", value, "ms", 2).passed for value in values] == [False, True, True]
    assert told("a", 1, "ms").passed is None
    shown = text({"machine": {"cores": 2}, "quick": True}, [at_most("a", 3, "ms", 2), told("b", 1, "s")]).splitlines()
    assert shown[-1] == "0 of 1 goals reached"
    assert "FAIL" in shown[3]


def test_readings_are_judged() -> None:
    """A peer's median is told; dmafs' is set in relation to those peers' that were measured, by the other's measure."""
    samples = {
        ("tar", DMAFS): [1.0, 9.0, 2.0],
        ("tar", CHAIN): [4.0],
        ("tar", RAW): [1.0, 1.0],
        ("dd by its other name", DMAFS): [80.0],
        ("dd again", RAW): [100.0],
    }
    found = {result.name: result for result in judged("backward", samples)}
    assert {name: result.value for name, result in found.items()} == {
        "backward: tar, dmafs": 2.0,
        "backward: tar, q-s-d qcow2": 4.0,
        "backward: tar, raw": 1.0,
        "backward: dd by its other name, dmafs": 80.0,
        "backward: dd again, raw": 100.0,
        "backward: tar, dmafs / q-s-d qcow2": 0.5,
        "backward: tar, dmafs / raw": 2.0,
        "backward: dd by its other name, dmafs / raw": 0.8,
    }
    assert found["backward: tar, dmafs / q-s-d qcow2"].passed is True
    assert found["backward: tar, dmafs / raw"].passed is False
    assert found["backward: dd by its other name, dmafs / raw"].passed is False
    assert not any(BORG in name for name in found)


def test_chains_of_a_history() -> None:
    """A snapshot's image is the chain up to its overlay; that of the forward journal has one more than snapshots."""
    history = History(Path("h"), [("seq:0", 0), *((f"s{number}", 10 * number) for number in range(1, 5))], 40, 61)
    assert history.backward == ("s2", 20)
    assert history.forward_seq == 50
    chains = Chains(Path("c"), 4)
    assert [path.name for path in chains.overlays("backward")] == ["001.qcow2", "002.qcow2"]
    assert [path.name for path in chains.overlays("forward")][-2:] == ["004.qcow2", "005.qcow2"]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is such a thing: the numbers don't matter here, the disk would take longest."""
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as name:
        yield Path(name)


@pytest.mark.slow
def test_quick_benchmark_of_the_core(scratch: Path) -> None:
    """It ends well, leaves nothing behind, and its JSON has the machine and each number with its goal and verdict."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.engine", "--json", "--quick"],
        cwd=ROOT,
        env={"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(scratch.iterdir()) == []
    report: dict[str, Any] = json.loads(done.stdout)
    assert set(report) == {"machine", "quick", "seconds", "results"}
    assert report["quick"] is True
    keys = {"cpu", "cores", "memory_bytes", "kernel", "python", "numpy", "filesystem", "load_before"}
    assert set(report["machine"]) == keys
    results = report["results"]
    assert all(set(result) == {*Result.__dataclass_fields__, "passed"} for result in results)
    assert all(result["value"] > 0 for result in results)
    assert len({result["name"] for result in results}) == len(results)
    goals = [(result["unit"], result["sense"], result["goal"]) for result in results if result["goal"] is not None]
    assert goals == [
        *[("ratio", "at most", 3), ("B/event", "at most", 150)] * 2,
        ("ms", "at most", 150),
        *[("us", "at most", 20)] * 2,
        ("B/extent", "at most", 64),
        ("ms", "at most", 150),
        ("B/extent", "at most", 64),
        ("ratio", "at least", 0.6),
        ("ratio", "at most", 1.1),
    ]
    assert all((result["passed"] is None) is (result["goal"] is None) for result in results)
