"""How many steps the machines of this run have made: each prints its own, ``test_steps`` asks for the sum."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
STEPS_MIN: Final = 20_000
"""Of all machines together, unless ``DMAFS_TEST_EXAMPLES`` asks for fewer histories."""
EXAMPLES: Final = int(os.environ.get("DMAFS_TEST_EXAMPLES", "0"))
"""Histories of each machine, 0 for its own number."""

made: Final[dict[str, int]] = {}


def run_machine(machine: type[RuleBasedStateMachine], *, examples: int, steps: int) -> None:
    """Run histories of a machine, which counts its own ``steps`` and, in ``counts``, what was done.

    Not less than half of the steps that there could be are made.
    """
    examples = EXAMPLES or examples
    machine.steps = 0
    counts: dict[str, int] = getattr(machine, "counts", {})
    counts.clear()
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    print(f"\n{machine.__name__}: DMAFS_TEST_SEED={SEED} DMAFS_TEST_EXAMPLES={examples}")
    run_state_machine_as_test(hypothesis.seed(SEED)(machine), settings=profile)
    count: int = machine.steps  # type: ignore[attr-defined]
    report(machine.__name__, count, counts)
    assert count >= examples * steps // 2


def report(name: str, steps: int, counts: Mapping[str, int] | None = None) -> None:
    """Take in and print that so many steps were made."""
    made[name] = steps
    print(f"{name}: {steps} steps, {dict(sorted((counts or {}).items()))}")
