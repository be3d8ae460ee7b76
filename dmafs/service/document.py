"""A document: a TOML file read into dataclasses, with the line of each key, and all that is wrong with it at once.

A field of such a class has metadata: ``kind`` with ``default`` and ``minimum`` (see ``configuration``), or ``table`` or
``tables`` with the class of a table or of an array of tables. ``required`` is a field that has to be there.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from dmafs.errors import InputError
from dmafs.service.lines import Place, lines_of

Table = TypeVar("Table")

_WRONG: Final = object()


class Problem(NamedTuple):
    """A mistake in a file."""

    line: int
    """0 if it isn't known."""
    where: str
    """The table, as its header has it, or empty."""
    text: str
    hint: str


class Document:
    """The values of one file, and what was found wrong with them so far."""

    def __init__(self, content: bytes, path: Path) -> None:
        """Parse *content*; *path* is what errors call it. What isn't TOML is a problem, and has no values."""
        self.path = path
        self.values: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.lines: dict[Place, int] = {}
        try:
            text = content.decode()
            self.values = tomllib.loads(text)
            self.lines = lines_of(text.replace("\r\n", "\n"))
        except (ValueError, RecursionError) as error:  # neither UTF-8 nor TOML, or deeper than any sense
            self.problems.append(Problem(_line_in(error, content), "", f"no TOML: {error}", "see dmafs.conf(5)"))

    def line(self, place: Place) -> int:
        """Return the line of a key or a table, or of the innermost table around it that has one; 0 if there is none."""
        for count in range(len(place), 0, -1):
            if place[:count] in self.lines:
                return self.lines[place[:count]]
        return 0

    def shown(self, place: Place) -> str:
        """Return file and line of a place, as editors know them."""
        return _shown(self.path, self.line(place))

    def complain(self, place: Place, text: str, hint: str) -> None:
        """Note a mistake at a key."""
        self.problems.append(Problem(self.line(place), self._header(place[:-1]), text, hint))

    def _header(self, table: Place) -> str:
        names = ".".join(str(name) for name in table if not isinstance(name, int))
        if not names:
            return ""
        return f"[[{names}]]" if isinstance(table[-1], int) else f"[{names}]"

    def finish(self) -> None:
        """Raise an InputError of the first mistake, if there is any; it tells how many there are."""
        if not self.problems:
            return
        first = min(self.problems, key=lambda problem: problem.line)
        others = len(self.problems) - 1
        more = f" (and {others} more: dmafs config check {self.path})" if others else ""
        raise InputError(self.message(first) + more, hint=first.hint)

    def message(self, problem: Problem) -> str:
        """Return what an error of a problem says."""
        where = f"configuration {_shown(self.path, problem.line)}"
        return f"{where}, {problem.where}: {problem.text}" if problem.where else f"{where}: {problem.text}"

    # -- tables ---------------------------------------------------------------------------------------------------

    def table(self, kind: type[Table], values: Mapping[str, Any] | None = None, place: Place = ()) -> Table:
        """Return a table made from *values*, by default all; what is wrong is a problem, and has its default."""
        values = self.values if values is None else values
        known: dict[str, Field[Any]] = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]  # it is one
        before = len(self.problems)
        found = {}
        for key, value in values.items():
            if key in known:
                read = self._read(known[key], value, (*place, key))
                if read is not _WRONG:
                    found[key] = read
            else:
                self.complain((*place, key), f"unknown key {key}", _advice(key, known))
        for key, entry in known.items():
            if entry.metadata.get("required") and key not in values:
                self._missing(key, entry, place)
        if len(self.problems) == before:
            try:
                return kind(**found)
            except InputError as error:
                self.problems.append(Problem(self.line(place), self._header(place), error.message, error.hint))
        return kind()

    def _missing(self, key: str, entry: Field[Any], place: Place) -> None:
        text = f"{key} is missing"
        self.problems.append(
            Problem(self.line(place), self._header(place), text, f"{key} = {entry.metadata['kind'].allowed}")
        )

    def _read(self, entry: Field[Any], value: Any, place: Place) -> Any:  # noqa: ANN401 - of the field's type
        key = entry.name
        if (kind := entry.metadata.get("table")) is not None:
            if isinstance(value, dict):
                return self.table(kind, value, place)
            self.complain(place, f"{key} = {value!r} is not right", f"it is a table: [{key}]")
            return _WRONG
        if (kind := entry.metadata.get("tables")) is not None:
            if isinstance(value, list) and all(isinstance(each, dict) for each in value):
                return tuple(self.table(kind, each, (*place, number)) for number, each in enumerate(value))
            self.complain(place, f"{key} = {value!r} is not right", f"it is an array of tables: [[{key}]]")
            return _WRONG
        return self._checked(entry, value, place)

    def _checked(self, entry: Field[Any], value: Any, place: Place) -> Any:  # noqa: ANN401 - of the field's type
        kind, minimum = entry.metadata["kind"], entry.metadata["minimum"]
        least = "" if minimum is None else f", at least {minimum:g}"
        try:
            read = kind.read(value)
        except InputError as error:
            self.complain(place, f"{entry.name}: {error.message}", error.hint)
            return _WRONG
        except TypeError:
            read = None
        if read is None or (minimum is not None and not minimum <= read < math.inf):
            self.complain(place, f"{entry.name} = {value!r} is not right", f"it is {kind.allowed}{least}")
            return _WRONG
        return read


def _shown(path: Path, line: int) -> str:
    return f"{path}:{line}" if line else str(path)


def _line_in(error: Exception, content: bytes) -> int:
    """Return the line that the parser names, 0 if it names none."""
    if "(at end of document)" in str(error):
        return content.count(b"\n") + 1
    named = re.search(r"\(at line (\d+), ", str(error))
    return int(named[1]) if named else 0


def _advice(key: str, known: Mapping[str, Field[Any]]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"did you mean {_named(near[0], known[near[0]])}?"
    return f"keys: {', '.join(_named(name, entry) for name, entry in known.items())}"


def _named(name: str, entry: Field[Any]) -> str:
    if "tables" in entry.metadata:
        return f"[[{name}]]"
    return f"[{name}]" if "table" in entry.metadata else name
