"""Claims about dmafs.service.lines: in which line a key stands, whatever stands around it."""

from __future__ import annotations

import tomllib

from dmafs.service.lines import Place, lines_of

TEXT = '''# a comment with [brackets] and key = 1
top = 1
"quoted key" = 'x = 1'
a.b.c = 1  # dotted

[ sync ]  # a table
at = [
  "06:00",  # [not.a.table]
  "18:30",
]
text = """
[no]
key = 1
\\""" = """
plain = \'\'\'
[nor]
\'\'\'
inline = { x = 1, y = [1, [2]] }

[[store]]
path = "/a"
[store.sync]
age = 1
[[store.volume]]
name = "x"
[[store.volume]]
name = "y"
[[store]]
path = "/b"
[store.sync]
[[store.volume]]
name = "z"
[deep.er]
key = -1.5e3'''

PLACES: dict[Place, int] = {
    ("top",): 2,
    ("quoted key",): 3,
    ("a", "b", "c"): 4,
    ("a",): 4,
    ("sync",): 6,
    ("sync", "at"): 7,
    ("sync", "text"): 11,
    ("sync", "plain"): 15,
    ("sync", "inline"): 18,
    ("store",): 20,
    ("store", 0): 20,
    ("store", 0, "path"): 21,
    ("store", 0, "sync"): 22,
    ("store", 0, "sync", "age"): 23,
    ("store", 0, "volume", 0, "name"): 25,
    ("store", 0, "volume", 1): 26,
    ("store", 0, "volume", 1, "name"): 27,
    ("store", 1, "path"): 29,
    ("store", 1, "sync"): 30,
    ("store", 1, "volume", 0, "name"): 32,
    ("deep",): 33,
    ("deep", "er", "key"): 34,
}


def test_lines_of_all_places() -> None:
    """The text is TOML, and each key and header is found where it stands; what only looks like one isn't."""
    tomllib.loads(TEXT)
    found = lines_of(TEXT)
    assert {place: found.get(place) for place in PLACES} == PLACES
    assert {place[0] for place in found} == {"top", "quoted key", "a", "sync", "store", "deep"}
    assert ("sync", "key") not in found
