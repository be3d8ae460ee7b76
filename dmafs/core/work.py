"""Work: a transaction as a generator, so that the core blocks nobody and knows no scheduler.

A piece of work runs on its caller's thread and *yields* calls that may block for long (bulk copies, fsyncs). Whoever
drives it runs such a call wherever it likes, and sends the result back or throws the exception in. Between two yields
nothing else runs on the volume, so what the work does there is atomic for capture and readers; at a yield everything
else may happen. Commands drive work with ``run``; the daemon has a driver of its own that runs the calls in threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dmafs.core.storage import File

Result = TypeVar("Result")

Work = Generator[Callable[[], Any], Any, Result]


@dataclass(frozen=True, slots=True)
class Datasync:
    """A call that makes files durable, one after the other; who drives work may do that in any order, or at once.

    What is to be done *then* may block, too.
    """

    files: Sequence[File]
    then: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Do it on this thread."""
        for file in self.files:
            file.datasync()
        if self.then is not None:
            self.then()


def run(work: Work[Result]) -> Result:
    """Drive *work* to its end on this thread and return its result."""
    try:
        call = next(work)
        while True:
            try:
                answer = call()
            except BaseException as error:  # noqa: BLE001 - passed on: the work decides
                call = work.throw(error)
            else:
                call = work.send(answer)
    except StopIteration as stop:
        result: Result = stop.value
        return result
