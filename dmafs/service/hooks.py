"""Hooks: commands of the administrator's that the daemon runs.

A hook is an argument list, run without a shell, in a session and process group of its own, with standard input closed.
What it prints goes to the log. At its time limit, and when the daemon ends, the whole group is killed. A process that
even that doesn't end (it hangs in the kernel) is left alone after a grace: the daemon never waits for ever.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

import trio

log = logging.getLogger(__name__)

GRACE_S: Final = 5.0
"""Longest wait for what was killed, and for the output of what a hook left running."""
OUTPUT_BYTES_MAX: Final = 1 << 16
"""What a hook prints beyond that is read and forgotten."""


async def run_hook(
    command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str], quiet: bool = False
) -> bool:
    """Run a hook; say whether it ended with exit status 0 in time. What went wrong is logged, if *quiet* as news."""
    shown = " ".join(command)
    trouble = logging.INFO if quiet else logging.WARNING
    try:
        process = await trio.lowlevel.open_process(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    except OSError as error:
        log.log(trouble, "hook %s can't be run: %s", shown, (error.strerror or "").lower())
        return False
    output = bytearray()
    try:
        with trio.move_on_after(timeout_s) as limit:
            await _finish(process, output)
    finally:
        await _kill(process)
    succeeded = process.returncode == 0 and not limit.cancelled_caught
    level = logging.INFO if succeeded else trouble
    for line in output.decode(errors="replace").splitlines():
        log.log(level, "hook %s: %s", shown, line)
    if limit.cancelled_caught:
        log.log(trouble, "hook %s took longer than %g s and was killed", shown, timeout_s)
    elif not succeeded:
        log.log(trouble, "hook %s ended with %s", shown, process.returncode)
    return succeeded


async def _finish(process: trio.Process, output: bytearray) -> None:
    """Read all that a process prints, until it has ended and, for a grace, what it has left running has closed it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_read, process, output)
        await process.wait()
        nursery.cancel_scope.deadline = trio.current_time() + GRACE_S


async def _read(process: trio.Process, output: bytearray) -> None:
    assert process.stdout is not None
    async for chunk in process.stdout:
        output += chunk[: OUTPUT_BYTES_MAX - len(output)]


async def _kill(process: trio.Process) -> None:
    """Kill a process that is still there, with its group, and close the pipe. Not cancelled, but bounded."""
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            with trio.move_on_after(GRACE_S):
                await process.wait()
            if process.returncode is None:
                log.error("hook process %d can't be killed: it hangs in the kernel", process.pid)
        if process.stdout is not None:
            await process.stdout.aclose()
