"""What README.md prints of a terminal: its console blocks, taken apart, compared with a run, and written anew from one.

A block is ```console; each line of it that begins with ``$ `` is a command, the lines up to the next are what it
prints. A block that can't be played here says why in its fence, ```console needs=device-mapper, which Markdown doesn't
show.

What a run prints is compared word for word, but for what can't be the same in two runs: of that there is a list of
shapes, SHAPES, each with what has to be the same within a run. So a time may be any time, but where the text has one
time twice the run has to have one time twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

PROMPT: Final = "$ "
_FENCE: Final = re.compile(r"^```(?P<language>\S*)(?: (?P<rest>.*))?$")
_NEEDS: Final = re.compile(r"needs=([a-z-]+)")


@dataclass(frozen=True)
class Step:
    """A command, and the lines that it prints; *line* is the command's in the document, from 0."""

    command: str
    output: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Block:
    """A console block below a heading. *needs* is why it can't be played here, or empty."""

    heading: str
    needs: str
    steps: tuple[Step, ...]


class TranscriptError(Exception):
    """The document's form is wrong, or a run differs from it."""


def blocks(text: str) -> list[Block]:
    """Return all console blocks of a Markdown document, in order."""
    found: list[Block] = []
    heading = ""
    lines = text.splitlines()
    fence: tuple[str, str, int] | None = None
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if match and fence is None:
            fence = match["language"], match["rest"] or "", number
        elif line == "```" and fence is not None:
            language, rest, begin = fence
            if language == "console":
                found.append(Block(heading, _needs(rest, begin), tuple(_steps(lines, begin + 1, number))))
            fence = None
        elif fence is None and line.startswith("#"):
            heading = line.lstrip("#").strip()
    if fence is not None:
        raise TranscriptError(f"line {fence[2] + 1}: the block has no end")
    return found


def _needs(rest: str, line: int) -> str:
    match = _NEEDS.fullmatch(rest)
    if rest and match is None:
        raise TranscriptError(f"line {line + 1}: {rest!r} is not needs=SOMETHING")
    return match[1] if match else ""


def _steps(lines: list[str], begin: int, end: int) -> Iterator[Step]:
    at = begin
    if not lines[begin].startswith(PROMPT):
        raise TranscriptError(f"line {begin + 1}: a console block begins with a command")
    while at < end:
        following = next((n for n in range(at + 1, end) if lines[n].startswith(PROMPT)), end)
        yield Step(lines[at].removeprefix(PROMPT), tuple(lines[at + 1 : following]), at)
        at = following


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Something that differs from run to run. If it *binds*, equal ones in the text are equal ones in the run."""

    name: str
    pattern: str
    binds: bool = False


_SIZE: Final = r"(?:\d+(?:\.\d)? (?:B|KiB|MiB)|\d+\.\d GiB)\b(?! from| copied|: )"
SHAPES: Final = (
    Shape("time", r"\b\d{4}-\d\d-\d\dT\d\d:?\d\d:?\d\d\.\d{9}Z", binds=True),
    Shape("local time", r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{9} [+-]\d{4}\b", binds=True),
    Shape("local second", r"(?<=Z \()\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}(?=\))"),
    Shape("hour", r"(?<=next )\d{4}-\d\d-\d\dT\d\d:00:00\.0{9}Z"),
    Shape("date of ls", r"\b[A-Z][a-z]{2} [ \d]\d \d\d:\d\d\b"),
    Shape("digest", r"\b[0-9a-f]{64}\b", binds=True),
    Shape("clone of a mount", r"\bmount-[0-9a-f]{12}\b", binds=True),
    Shape("process", r"(?<=process )\d+\b|(?<=^\[1\] )\d+$", binds=True),
    Shape("loop device", r"/dev/loop\d+\b"),
    Shape("blocks of ls", r"(?<=^total )\d+$"),
    Shape("seq", r"(?<=seq )[1-9]\d*\b"),
    Shape("seq in a table", r"(?<=\)  disk  )(?: {10}| {11}| {12}) *[1-9]\d*\b"),
    Shape("extent", r"^ +\d+ +\d+$"),
    Shape("extents", r"(?<=^           total) +\d+  bytes in \d+ extents?$"),
    Shape("duration", r"\b\d+(?:\.\d)? m?s(?= (?:earlier|later)\b)"),
    Shape("events", r"\b[1-9]\d* events\b"),
    Shape("size", rf"(?<= ) *{_SIZE}"),
    Shape("size of du", r"^\d+(?:\.\d)?[KM](?=\t)"),
)
_SHAPES: Final = re.compile("|".join(f"(?P<s{number}>{shape.pattern})" for number, shape in enumerate(SHAPES)))


@dataclass
class Comparison:
    """Compares lines of a text with those of one run, and remembers which value of the run stands for which one."""

    shapes: re.Pattern[str] = _SHAPES
    _bound: dict[tuple[str, str], str] = field(default_factory=dict)

    def compare(self, step: Step, printed: list[str]) -> None:
        """Raise TranscriptError if what a command *printed* isn't what the text has."""
        problem = ""
        if len(printed) != len(step.output):
            problem = f"{len(printed)} lines instead of {len(step.output)}"
        else:
            for wanted, line in zip(step.output, printed, strict=True):
                problem = problem or self._problem(wanted, line)
        if problem:
            told = "\n".join(["the text has:", *step.output, "the run has:", *printed])
            raise TranscriptError(f"line {step.line + 1}, $ {step.command}\n{problem}\n{told}")

    def _problem(self, wanted: str, line: str) -> str:
        plain, values = masked(wanted)
        plain_line, values_line = masked(line)
        if plain != plain_line:
            return f"{plain_line!r} instead of {plain!r}"
        for (name, value), (_, in_run) in zip(values, values_line, strict=True):
            if self._bound.setdefault((name, value), in_run) != in_run:
                return f"the {name} {value} of the text was {self._bound[name, value]} before, and is {in_run} now"
        return ""


def masked(line: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a line with names in place of what varies, and those values that bind."""
    values: list[tuple[str, str]] = []

    def name_of(match: re.Match[str]) -> str:
        assert match.lastgroup is not None
        shape = SHAPES[int(match.lastgroup[1:])]
        if shape.binds:
            values.append((shape.name, _canonical(shape, match[0])))
        return f"<{shape.name}>"

    return _SHAPES.sub(name_of, line), values


def _canonical(shape: Shape, value: str) -> str:
    """Return the one spelling of a time; other values have one."""
    return value.replace(":", "") if shape.name == "time" else value


# -- writing anew ------------------------------------------------------------------------------------------------------


def rewritten(text: str, printed: dict[int, list[str]]) -> str:
    """Return the document with what a run has *printed* by the commands on those lines."""
    lines = text.splitlines()
    for block in reversed(blocks(text)):
        for step in reversed(block.steps):
            if step.line in printed:
                lines[step.line + 1 : step.line + 1 + len(step.output)] = printed[step.line]
    return "\n".join(lines) + "\n"
