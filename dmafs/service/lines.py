"""In which line of a TOML text a key stands: the parser of the standard library doesn't say.

A *place* is a path of keys, with an index behind that of an array of tables: ``("store", 0, "sync", "age")``. The text
is one that the parser has taken already, so nothing is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

Place = tuple[str | int, ...]

_TOKEN: Final = re.compile(
    r'"""(?:\\[\s\S]|[^\\])*?"""(?!")'
    r"|'''[\s\S]*?'''(?!')"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|[A-Za-z0-9_-]+"
    r"|\n"
    r"|[^\s]"
)


def lines_of(text: str) -> dict[Place, int]:
    """Return the line, from 1 on, of each table's header and each key, but for those in inline tables."""
    found: dict[Place, int] = {}
    arrays: dict[Place, int] = {}  # the index of the newest table of each array
    table: Place = ()
    for line, words in _statements(text):
        if words[0] == "[":
            names = _names([word for word in words if word not in "[]"])
            table = _resolved(names[:-1], arrays)
            if words[1:2] == ["["]:
                array = (*table, names[-1])
                arrays[array] = arrays.get(array, -1) + 1
            table = _resolved(names, arrays)
            for count in range(1, len(table) + 1):
                found.setdefault(table[:count], line)
        elif "=" in words:
            keys = _names(words[: words.index("=")])
            for count in range(1, len(keys) + 1):
                found.setdefault((*table, *keys[:count]), line)
    return found


def _statements(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each header, and each key with its value, as its first line and its words."""
    begin, line, depth = 1, 1, 0
    words: list[str] = []
    for match in _TOKEN.finditer(text):
        word = match[0]
        if word == "\n" and depth <= 0 and words:
            yield begin, words
            words, depth = [], 0
        elif word != "\n" and word[0] != "#":
            begin = begin if words else line
            depth += (word in "[{") - (word in "]}")
            words.append(word)
        line += word.count("\n")
    if words:
        yield begin, words


def _names(words: list[str]) -> Place:
    return tuple(word[1:-1] if word[0] in "\"'" else word for word in words if word != ".")


def _resolved(names: Place, arrays: dict[Place, int]) -> Place:
    """Return the place of a table, with the index of the newest one behind the name of each array."""
    place: Place = ()
    for name in names:
        place = (*place, name)
        if place in arrays:
            place = (*place, arrays[place])
    return place
