"""Bars of progress: on terminals that can draw them, in colours unless these aren't wanted, and nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pexpect
import pytest

from tests.mount.harness import DMAFS, MIB, Rig

RATE = "2M"
"""What makes a verify take so long that a bar is drawn more than once."""
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9](?:;[0-9;]*)?m")
DONE = "volume disk: no differences in 2 MiB"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        made.create(size=2 * MIB)
        made.start()
        yield made
        made.stop()


def verified(rig: Rig, **environment: str) -> str:
    """Return all that a terminal gets to see of a verify."""
    kept = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "COLORTERM"}}
    command = ["verify", str(rig.store), "--rate", RATE]
    child = pexpect.spawn(
        str(DMAFS), command, env={**kept, "TERM": "xterm", **environment}, encoding="utf-8", dimensions=(24, 100)
    )
    child.expect(pexpect.EOF, timeout=60)
    said = str(child.before)
    child.close()
    assert child.exitstatus == 0, said
    assert DONE in said
    return said


def test_a_terminal_gets_a_coloured_bar(rig: Rig) -> None:
    """It is taken away at the end."""
    said = verified(rig)
    assert "verify disk" in said
    assert COLOUR.search(said)


@pytest.mark.parametrize("value", ["1", "false"])
def test_colours_can_be_refused(rig: Rig, value: str) -> None:
    """By NO_COLOR, whatever it says: then there is a bar without colours."""
    said = verified(rig, NO_COLOR=value)
    assert "verify disk" in said
    assert not COLOUR.search(said)


def test_a_dumb_terminal_gets_none(rig: Rig) -> None:
    """Nor any sequence that it would show."""
    said = verified(rig, TERM="dumb")
    assert said.strip() == DONE


def test_elsewhere_there_is_none(rig: Rig) -> None:
    """In a pipe or a file."""
    done = rig.dmafs("verify", rig.store, "--rate", RATE)
    assert (done.stdout, done.stderr) == (f"{DONE}\n", "")
