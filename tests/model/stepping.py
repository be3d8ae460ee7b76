"""Work driven step by step, as the daemon's threads would: between two steps everything else may happen.

``Running`` is work that changes something, ``Reader`` work that reads. The engine's rule for readers is kept here, too:
a call of a sync or a drop waits for those that have resolved and not read yet (``Reader.drain``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmafs.core.image import Image
from dmafs.core.work import Work
from dmafs.errors import DmafsError, NoSuchPointError


class Running:
    """Work under way: which kind, the call that it waits for, and whether that call is done already."""

    def __init__(
        self, kind: str, work: Work[Any], done: Callable[[Any], None], before: Callable[[], None] = lambda: None
    ) -> None:
        """Begin. StopIteration if there is nothing to wait for; *before* is done before each call."""
        self.kind = kind
        self.work = work
        self.done = done
        self.before = before
        self.executed = False
        self.answer: Any = None
        self.call = next(work)

    def execute(self) -> None:
        if not self.executed:
            self.before()
            self.answer = self.call()
            self.executed = True

    def advance(self) -> bool:
        """Do one call and let the work go on; return whether that was its end."""
        self.execute()
        try:
            self.call = self.work.send(self.answer)
        except StopIteration as stop:
            self.done(stop.value)
            return True
        self.executed = False
        return False


class Reader:
    """Reading under way. *found* gets what was read; *reads* says that each of the calls is a reader itself."""

    def __init__(
        self, kind: str, seq: int, work: Work[Any], found: Callable[[Any], None], *, held: Image | None, reads: bool
    ) -> None:
        """Prepare to read; with *held* that image is held."""
        self.kind = kind
        self.seq = seq
        self.held = held
        self.found = found
        self.reads = reads
        self.over = False
        self.work = work
        self._call: Callable[[], Any] | None = None
        self._answer: Any = None
        self._error: Exception | None = None
        self._executed = False
        self._last: Callable[[], None] | None = None  # the pieces are known, their bytes aren't read yet

    def step(self) -> None:
        """Begin, do one call and let the work go on, or read the pieces."""
        if self._last is not None:
            self._end()
            return
        try:
            if self._call is None:
                self._call = next(self.work)
            else:
                self._execute()
                error, self._error = self._error, None
                self._call = self.work.send(self._answer) if error is None else self.work.throw(error)
            self._executed = False
        except NoSuchPointError:
            assert self.held is None, f"{self.kind}: the image at {self.seq} is held"
            self.over = True
        except StopIteration as stop:
            self._last = lambda value=stop.value: self.found(value)
            if self.kind != "locate":  # there the pieces are read in another thread
                self._end()

    def _execute(self) -> None:
        assert self._call is not None
        if not self._executed:
            try:
                self._answer = self._call()
            except (DmafsError, OSError) as error:  # such as a file that is gone: the work decides
                self._error = error
            self._executed = True

    def _end(self) -> None:
        assert self._last is not None
        self._last()
        self.over = True

    def drain(self) -> None:
        """Be done with what the daemon waits for before something is overwritten or closed."""
        if self._last is not None:
            self._end()
        elif self.reads and self._call is not None:
            self._execute()
