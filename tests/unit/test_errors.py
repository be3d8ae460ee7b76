"""Claims about dmafs.errors: the tree in the module's docstring is what the classes are."""

from __future__ import annotations

import errno
import inspect
import re

import pytest

from dmafs import errors
from dmafs.errors import DmafsError

_LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+Error) +exit +(?P<code>\d+)  (?P<errno>E[A-Z]+)")


def documented() -> list[tuple[int, str, int, str]]:
    """Return depth, name, exit code and errno of each line of the tree."""
    found = [match for line in inspect.cleandoc(errors.__doc__ or "").splitlines() if (match := _LINE.match(line))]
    return [(len(m["indent"]) // 4, m["name"], int(m["code"]), m["errno"]) for m in found]


def classes() -> list[type[DmafsError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DmafsError)]


def test_every_class_is_in_the_tree_and_nothing_else() -> None:
    """The docstring lists exactly the classes of the module."""
    assert sorted(name for _, name, _, _ in documented()) == sorted(kind.__name__ for kind in classes())


@pytest.mark.parametrize(("depth", "name", "code", "number"), documented(), ids=[line[1] for line in documented()])
def test_exit_code_and_errno_are_the_documented_ones(depth: int, name: str, code: int, number: str) -> None:
    """Each class has the exit code, errno and depth that the tree draws."""
    kind = getattr(errors, name)
    assert kind.exit_code == code
    assert kind.errno == getattr(errno, number)
    assert kind.__mro__.index(DmafsError) + 1 == depth


def test_parents_are_the_documented_ones() -> None:
    """Each class derives from the one that the tree draws it below."""
    path: list[str] = []
    for depth, name, _, _ in documented():
        del path[depth - 1 :]
        parent = path[-1] if path else "Exception"
        assert getattr(errors, name).__base__.__name__ == parent
        path.append(name)


def test_exit_codes_are_distinct_and_not_the_command_lines() -> None:
    """No two classes share an exit code, and none takes 0, 1 or that of a signal."""
    codes = [kind.exit_code for kind in classes()]
    assert len(set(codes)) == len(codes)
    assert all(2 <= code < 100 for code in codes)


def test_message_and_hint_are_kept() -> None:
    """An error keeps what happened and what to do about it apart; its text is the message."""
    error = errors.NoStoreError("directory /x is no store", hint="make one")
    assert (str(error), error.message, error.hint) == (
        "directory /x is no store",
        "directory /x is no store",
        "make one",
    )
    assert DmafsError("a").hint == ""
