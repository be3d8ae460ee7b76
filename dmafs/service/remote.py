"""Sessions with a daemon, through its control socket."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from dmafs import answers
from dmafs.errors import ControlError
from dmafs.service.connection import TIMEOUT_S, Daemon, error_of
from dmafs.service.operations import OPERATIONS
from dmafs.service.session import Show, unseen
from dmafs.units import check_name

_PART: Final = 1 << 20
_WHERE: Final = {operation.name: (operation.method, operation.path) for operation in OPERATIONS}


class RemoteSession:
    """A session with a daemon."""

    def __init__(self, path: Path) -> None:
        """Ask the daemon of the store in *path*."""
        self._daemon = Daemon(path)

    def _ask(self, name: str, /, *, timeout_s: float | None = None, **query: str | int | None) -> Any:  # noqa: ANN401 - as JSON has it
        """Return the answer to an operation; None among the parameters isn't given."""
        given = {key: value for key, value in query.items() if value is not None}
        with self._daemon.ask(*_WHERE[name], given, timeout_s=timeout_s) as answer:
            try:
                return json.loads(answer.read())
            except ValueError as error:
                raise self._strange(name) from error

    def _strange(self, name: str) -> ControlError:
        return ControlError(
            f"the daemon of store {self._daemon.store} answered {name} not as expected", hint="look at the daemon's log"
        )

    def status(self) -> answers.Status:
        """See ``Session``."""
        answer: answers.Status = self._ask("status", timeout_s=TIMEOUT_S)
        return answer

    def points(self) -> answers.Points:
        """See ``Session``."""
        answer: answers.Points = self._ask("points", timeout_s=TIMEOUT_S)
        return answer

    def moment(self, at: str, volume: str | None = None) -> answers.Moment:
        """See ``Session``."""
        answer: answers.Moment = self._ask("moment", timeout_s=TIMEOUT_S, at=at, volume=volume)
        return answer

    def metrics(self) -> str:
        """Return the daemon's metrics."""
        with self._daemon.ask(*_WHERE["metrics"], {}) as answer:
            return answer.read().decode()

    def snapshots(self) -> answers.Snapshots:
        """See ``Session``."""
        answer: answers.Snapshots = self._ask("snapshots", timeout_s=TIMEOUT_S)
        return answer

    def take_snapshot(self, name: str) -> answers.Named:
        """See ``Session``."""
        answer: answers.Named = self._ask("take_snapshot", name=check_name(name, "snapshot"))
        return answer

    def drop_snapshot(self, identifier: str) -> answers.Dropped:
        """See ``Session``."""
        answer: answers.Dropped = self._ask("drop_snapshot", id=identifier)
        return answer

    def rename_snapshot(self, identifier: str, name: str) -> answers.Renamed:
        """See ``Session``."""
        answer: answers.Renamed = self._ask("rename_snapshot", id=identifier, name=check_name(name, "snapshot"))
        return answer

    def mark(self, name: str) -> answers.Named:
        """See ``Session``."""
        answer: answers.Named = self._ask("mark", name=check_name(name, "mark"))
        return answer

    def sync(self) -> answers.Syncs:
        """See ``Session``."""
        answer: answers.Syncs = self._ask("sync")
        return answer

    def pin(self, identifier: str) -> answers.Pinned:
        """See ``Session``."""
        answer: answers.Pinned = self._ask("pin", id=identifier)
        return answer

    def unpin(self, identifier: str) -> answers.Pinned:
        """See ``Session``."""
        answer: answers.Pinned = self._ask("unpin", id=identifier)
        return answer

    def thin(self, *, dry_run: bool = False) -> answers.Thinned:
        """See ``Session``."""
        answer: answers.Thinned = self._ask("thin", dry_run=int(dry_run))
        return answer

    def clones(self) -> answers.Clones:
        """See ``Session``."""
        answer: answers.Clones = self._ask("clones", timeout_s=TIMEOUT_S)
        return answer

    def tap(self, action: str, volume: str | None = None) -> answers.Taps:
        """See ``Session``."""
        answer: answers.Taps = self._ask("tap", action=action, volume=volume)
        return answer

    def create_clone(self, name: str, at: str | None = None) -> answers.Named:
        """See ``Session``."""
        answer: answers.Named = self._ask("create_clone", name=check_name(name, "clone"), at=at)
        return answer

    def drop_clone(self, name: str) -> answers.Named:
        """See ``Session``."""
        answer: answers.Named = self._ask("drop_clone", name=check_name(name, "clone"))
        return answer

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """See ``Session``."""
        query: dict[str, str | int] = {"volume": volume, "at": at, "offset": offset, "length": length}
        with self._daemon.ask(*_WHERE["read"], query, timeout_s=None) as answer:
            while part := answer.read(_PART):
                length -= len(part)
                yield part
        if length:
            raise ControlError(
                f"the daemon of store {self._daemon.store} ended {length} bytes before the end of what it was reading",
                hint="look at its log",
            )

    def diff(self, volume: str, a: str, b: str) -> answers.Difference:
        """See ``Session``."""
        answer: answers.Difference = self._ask("diff", volume=volume, a=a, b=b)
        return answer

    def verify(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Differences:
        """See ``Session``. Who stops waiting ends it."""
        answer: answers.Differences = self._follow("verify", volume, bytes_per_s, show)
        return answer

    def resync(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Differences:
        """See ``Session``. Likewise, unless it has found something: then the daemon goes on."""
        answer: answers.Differences = self._follow("resync", volume, bytes_per_s, show)
        return answer

    def scrub(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Scrubbed:
        """See ``Session``. Who stops waiting ends it; the next one goes on there."""
        answer: answers.Scrubbed = self._follow("scrub", volume, bytes_per_s, show)
        return answer

    def _follow(self, name: str, volume: str, rate: int | None, show: Show) -> Any:  # noqa: ANN401 - as JSON has it
        """Ask for something that tells how far it is, and return its result."""
        query: dict[str, str | int] = {"volume": volume} | ({} if rate is None else {"rate": rate})
        with self._daemon.ask(*_WHERE[name], query, timeout_s=None) as answer:
            events = _events(answer.lines())
            while True:
                try:
                    event, told = next(events)
                    if event == "error":
                        raise error_of(told)
                    done, total = (0, 0) if event == "result" else (told["done_bytes"], told["total_bytes"])
                except StopIteration:
                    break
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise self._strange(name) from error
                if event == "result":
                    return told
                show(done, total)
        raise ControlError(
            f"the daemon of store {self._daemon.store} ended before the {name} was done", hint="look at its log"
        )


def _events(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the data of each server-sent event; ValueError and its like for what is none."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)
