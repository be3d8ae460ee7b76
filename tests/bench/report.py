"""What a benchmark says: numbers beside their goals, and the machine they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final, TypeVar

import numpy as np

AT_MOST: Final = "at most"
AT_LEAST: Final = "at least"

_NAME_WIDTH: Final = 78

Value = TypeVar("Value")


@dataclass(frozen=True)
class Result:
    """One number; without a goal it is only told. *details* are what it was made from."""

    name: str
    value: float
    unit: str
    sense: str | None = None
    goal: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.sense == AT_MOST else self.value >= self.goal

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def line(self) -> str:
        goal = f"{self.sense} {self.goal:g}" if self.goal is not None else "-"
        verdict = {True: "pass", False: "FAIL", None: ""}[self.passed]
        return f"{self.name:<{_NAME_WIDTH}}  {self.value:>8.4g} {self.unit:<9} {goal:<13} {verdict}".rstrip()


def at_most(name: str, value: float, unit: str, goal: float, **details: Any) -> Result:
    return Result(name, value, unit, AT_MOST, goal, details)


def at_least(name: str, value: float, unit: str, goal: float, **details: Any) -> Result:
    return Result(name, value, unit, AT_LEAST, goal, details)


def told(name: str, value: float, unit: str, **details: Any) -> Result:
    return Result(name, value, unit, details=details)


def timed(call: Callable[[], Value]) -> tuple[float, Value]:
    """Return how many seconds a call took, and its result."""
    begun = perf_counter()
    result = call()
    return perf_counter() - begun, result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return what says how noisy some values are."""
    return {"median": median(values), "least": min(values), "most": max(values), "count": len(values)}


def progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def machine(scratch: Path) -> dict[str, Any]:
    """Describe the machine, as far as it matters for a comparison with other results."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "filesystem": _filesystem(scratch),
        "load_before": os.getloadavg()[0],
    }


def _filesystem(path: Path) -> str:
    """Return the type of the filesystem that *path* is on: of the mount point that is its longest prefix."""
    points = [line.split() for line in _lines("/proc/self/mounts")]
    above = [(len(fields[1]), fields[2]) for fields in points if path.resolve().is_relative_to(fields[1])]
    return max(above)[1]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def text(report: dict[str, Any], results: Sequence[Result]) -> str:
    """Return the whole report for people."""
    lines = [f"{key:<14} {value}" for key, value in report["machine"].items()]
    lines += [f"{'sizes':<14} {'a tenth (--quick)' if report['quick'] else 'full'}", ""]
    lines += [result.line() for result in results]
    judged = [result for result in results if result.passed is not None]
    lines += ["", f"{sum(bool(result.passed) for result in judged)} of {len(judged)} goals reached"]
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all benchmarks have in common."""
    parser.add_argument("--json", action="store_true", help="print JSON, with what each number was made from")
    parser.add_argument("--quick", action="store_true", help="a tenth of all sizes; its numbers prove nothing")


def show(report: dict[str, Any], results: Sequence[Result], begun: float, *, as_json: bool) -> None:
    """Print a report with its results; it began at *begun*, by perf_counter."""
    report["seconds"] = round(perf_counter() - begun, 1)
    report["results"] = [result.as_json() for result in results]
    print(json.dumps(report, indent=2) if as_json else text(report, results))
