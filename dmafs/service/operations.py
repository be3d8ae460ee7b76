"""The operations of the control interface: one table, from which routes, checks of parameters and OpenAPI are made.

Each is answered by the method of its name of ``control.Handlers``, and asked for by that of ``dmafs.client``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from dmafs import answers
from dmafs.errors import InputError
from dmafs.units import NAME_PATTERN, check_name

ATTACH: Final = "attach"
DETACH: Final = "detach"
ACTIONS: Final = (ATTACH, DETACH, "status")
"""What can be done with a mapped device."""

EVENTS: Final = "text/event-stream"
BYTES: Final = "application/octet-stream"
METRICS: Final = "text/plain"

_NUMBER: Final = re.compile(r"[0-9]{1,18}", re.ASCII)  # fits 63 bits
_NUMBER_MAX: Final = 10**18 - 1


class Kind(NamedTuple):
    """A kind of parameter: its JSON schema, and what turns its text into a value; InputError for anything else."""

    schema: Mapping[str, Any]
    read: Callable[[str], Any]


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise InputError(f"{text!r} is not a number of bytes", hint="give a decimal number")
    return int(text)


def _flag(text: str) -> bool:
    if text not in {"0", "1"}:
        raise InputError(f"{text!r} is neither 0 nor 1", hint="1 means yes")
    return text == "1"


def _word(words: Iterable[str]) -> Kind:
    def read(text: str) -> str:
        if text not in allowed:
            raise InputError(f"{text!r} is none of {', '.join(allowed)}")
        return text

    allowed = list(words)
    return Kind({"type": "string", "enum": allowed}, read)


def _name(what: str) -> Kind:
    return Kind({"type": "string", "pattern": f"^{NAME_PATTERN}$"}, lambda text: check_name(text, what))


TEXT: Final = Kind({"type": "string"}, str)
NUMBER: Final = Kind({"type": "integer", "minimum": 0, "maximum": _NUMBER_MAX}, _number)
FLAG: Final = Kind({"type": "integer", "enum": [0, 1]}, _flag)


@dataclass(frozen=True)
class Parameter:
    """A parameter of an operation, in its URL's query."""

    name: str
    kind: Kind
    what: str
    required: bool = True


@dataclass(frozen=True)
class Operation:
    """One thing that can be asked. *answer* is a type of ``answers`` if it is JSON; *told* says what it is."""

    method: str
    path: str
    name: str
    summary: str
    parameters: tuple[Parameter, ...]
    told: str
    answer: Any = None
    media: str = "application/json"
    events: Mapping[str, Any] = field(default_factory=dict)
    """The types of the data of a stream's events, by their names; the last one is the result or the error."""

    def read(self, query: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """Return the values of a query by name, None for what isn't there; InputError for what can't be used."""
        known = {parameter.name: parameter for parameter in self.parameters}
        found: dict[str, Any] = {parameter.name: None for parameter in self.parameters if not parameter.required}
        given = set()
        for name, text in query:
            if name not in known:
                hint = f"it has: {', '.join(known)}" if known else "it has none"
                raise InputError(f"{self.method} {self.path} has no parameter {name!r}", hint=hint)
            if name in given:
                raise InputError(f"parameter {name} is given twice", hint="give it once")
            given.add(name)
            try:
                found[name] = known[name].kind.read(text)
            except InputError as error:
                raise InputError(f"parameter {name}: {error.message}", hint=error.hint) from error
        for name, parameter in known.items():
            if name not in found:
                raise InputError(f"{self.method} {self.path} lacks parameter {name}", hint=parameter.what)
        return found


_AT: Final = "a moment, in any spelling that names a folder below at/ of the tree"
_VOLUME: Final = Parameter("volume", TEXT, "the volume's name")
_SNAPSHOT: Final = Parameter("id", TEXT, "the snapshot's name, or its canonical time if it has none")
_RATE: Final = Parameter("rate", NUMBER, "bytes a second, 0 for no limit; else as configured", required=False)


def _check(kind: str, summary: str, found: Any) -> Operation:  # noqa: ANN401 - a type
    told = "How far it is, time and again: events named progress; then one named result, or error."
    events = {"progress": answers.Progress, "result": found, "error": answers.Error}
    return Operation("POST", f"/{kind}", kind, summary, (_VOLUME, _RATE), told, media=EVENTS, events=events)


OPERATIONS: Final = (
    Operation("GET", "/status", "status", "The state of everything.", (), "The state.", answers.Status),
    Operation("GET", "/points", "points", "Moments worth listing.", (), "The moments.", answers.Points),
    Operation(
        "GET",
        "/moment",
        "moment",
        "What a time means, and why.",
        (
            Parameter("at", TEXT, _AT),
            Parameter("volume", TEXT, "of this volume only, by its name", required=False),
        ),
        "The moment of each volume.",
        answers.Moment,
    ),
    Operation("GET", "/snapshots", "snapshots", "All snapshots.", (), "The snapshots.", answers.Snapshots),
    Operation(
        "POST",
        "/snapshots",
        "take_snapshot",
        "Take a snapshot of all volumes.",
        (Parameter("name", _name("snapshot"), "a new name"),),
        "It is taken.",
        answers.Named,
    ),
    Operation(
        "DELETE", "/snapshots", "drop_snapshot", "Drop a snapshot.", (_SNAPSHOT,), "It is dropped.", answers.Dropped
    ),
    Operation(
        "POST",
        "/rename",
        "rename_snapshot",
        "Give a snapshot another name.",
        (_SNAPSHOT, Parameter("name", _name("snapshot"), "the new name")),
        "It has it.",
        answers.Renamed,
    ),
    Operation("POST", "/pin", "pin", "Keep a snapshot.", (_SNAPSHOT,), "It is pinned.", answers.Pinned),
    Operation("POST", "/unpin", "unpin", "Take a pin off.", (_SNAPSHOT,), "It isn't pinned.", answers.Pinned),
    Operation(
        "POST",
        "/marks",
        "mark",
        "Set a mark on all volumes.",
        (Parameter("name", _name("mark"), "the mark's name"),),
        "It is set.",
        answers.Named,
    ),
    Operation("POST", "/sync", "sync", "Sync all volumes.", (), "They are synced.", answers.Syncs),
    Operation(
        "POST",
        "/thin",
        "thin",
        "Drop the snapshots that no rule keeps.",
        (Parameter("dry_run", FLAG, "1: only say which"),),
        "What was dropped, and what is kept.",
        answers.Thinned,
    ),
    Operation("GET", "/clones", "clones", "All clones.", (), "The clones.", answers.Clones),
    Operation(
        "POST",
        "/clones",
        "create_clone",
        "Make a clone of all volumes.",
        (
            Parameter("name", _name("clone"), "a new name"),
            Parameter("at", TEXT, f"{_AT}; else now", required=False),
        ),
        "It is made.",
        answers.Named,
    ),
    Operation(
        "DELETE",
        "/clones",
        "drop_clone",
        "Drop a clone.",
        (Parameter("name", _name("clone"), "its name"),),
        "It is dropped.",
        answers.Named,
    ),
    Operation(
        "GET",
        "/read",
        "read",
        "Bytes of an image.",
        (
            _VOLUME,
            Parameter("at", TEXT, _AT),
            Parameter("offset", NUMBER, "the first byte"),
            Parameter("length", NUMBER, "the number of bytes"),
        ),
        "The bytes, all of one moment.",
        media=BYTES,
    ),
    Operation(
        "GET",
        "/diff",
        "diff",
        "What was written between two moments.",
        (_VOLUME, Parameter("a", TEXT, _AT), Parameter("b", TEXT, "another one")),
        "The extents, outside of which both images are equal.",
        answers.Difference,
    ),
    _check("verify", "Compare source and newest image.", answers.Differences),
    _check("resync", "Compare source and newest image, and journal what differs.", answers.Differences),
    _check("scrub", "Compare all that has a checksum with it, and repair what the source has.", answers.Scrubbed),
    Operation(
        "POST",
        "/tap",
        "tap",
        "Attach, detach or show mapped devices.",
        (
            Parameter("action", _word(ACTIONS), "what to do"),
            Parameter("volume", TEXT, "that of this volume only", required=False),
        ),
        "The devices.",
        answers.Taps,
    ),
    Operation("GET", "/metrics", "metrics", "The metrics.", (), "Prometheus' format 0.0.4.", media=METRICS),
    Operation("GET", "/openapi.json", "openapi", "This document.", (), "OpenAPI 3.1.", dict[str, Any]),
)
