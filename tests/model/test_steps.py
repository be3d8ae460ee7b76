"""The machines have made enough steps, all together; runs after them (see conftest)."""

from __future__ import annotations

import pytest

from tests.model.counting import EXAMPLES, SEED, STEPS_MIN, made

MACHINES = {"CaptureMachine", "CloneMachine", "DiffHistories", "PageMachine", "StackMachine", "VolumeMachine"}
MAPS = {"PageMachine", "StackMachine"}


def test_the_machines_made_enough_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Each machine has run, and those of whole volumes alone have made as many steps as there have to be."""
    with capsys.disabled():
        print(f"\nDMAFS_TEST_SEED={SEED}: {sum(made.values())} steps of {dict(sorted(made.items()))}")
    assert set(made) == MACHINES, "pytest tests/model runs them all"
    if not EXAMPLES:
        assert sum(steps for name, steps in made.items() if name not in MAPS) >= STEPS_MIN
