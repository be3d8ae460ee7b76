"""Guests: User-Mode Linux machines that contrib/uml/run starts, from the host's side.

What a test wants to be run in a guest is a command, most often of Python with a file of tests/vm/guest. A guest's disks
are images in the test's folder, which outlive it.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Final, Self

RUN: Final = Path(__file__).parents[2] / "contrib" / "uml" / "run"
DIED: Final = 123
LATE: Final = 124
WRONG: Final = 120
BOOT_S: Final = 60
GUEST_S: Final = 300


class Guest:
    """A guest that runs a command; a context manager, at whose end it is gone."""

    def __init__(self, folder: Path, *command: str | Path, options: tuple[str | Path, ...] = ()) -> None:
        """Start the guest; its output goes to a file in *folder*, which it sees as well."""
        folder.mkdir(exist_ok=True)
        self.log = folder / f"guest-{time.monotonic_ns()}.log"
        words = [RUN, "--bind", folder, "--seconds", str(GUEST_S), *options, "--", *command]
        with self.log.open("wb") as log:
            self._runner = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runner.poll() is None:
            self._runner.terminate()
        self._runner.wait(BOOT_S)

    def output(self) -> str:
        """Return what the guest and its runner have said until now."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, *, seconds: float = BOOT_S) -> None:
        """Wait until the guest has said something."""
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert self._runner.poll() is None, f"the guest ended before {text!r}:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited {seconds} s in vain for {text!r}:\n{self.output()}"
            time.sleep(0.02)

    def cut_power(self) -> None:
        """End the guest as a power cut does."""
        self._runner.send_signal(signal.SIGUSR1)
        self.wait(code=DIED)

    def signal(self, number: signal.Signals) -> None:
        """Send the runner a signal."""
        self._runner.send_signal(number)

    def wait(self, *, code: int = 0) -> str:
        """Wait for the end, which has to have this exit status, and return what was said."""
        ended = self._runner.wait(GUEST_S + BOOT_S)
        assert ended == code, f"the guest ended with {ended}, not {code}:\n{self.output()}"
        return self.output()
