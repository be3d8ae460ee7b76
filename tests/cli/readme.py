"""README.md's console blocks, played in a terminal; run as a program it writes the outputs of such runs into README.md.

What the text can't say is here: what a person waits for, since it takes a person longer, and what a command that fails
by intention ends with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dmafs.client import connect
from tests.cli.terminal import SCRATCH, Terminal
from tests.cli.transcript import Block, Comparison, TranscriptError, blocks, rewritten
from tests.mount.harness import wait_until

README: Final = Path(__file__).parents[2] / "README.md"
ZONE: Final = "Europe/Berlin"
TOUR: Final = "Five minutes with it"
BAD_DAY: Final = "The bad day"
RECOVERIES: Final = ("A deleted directory", "A dropped table", "An overwritten partition table", "A lost disk")
NEEDS: Final = {
    "fresh-machine": 1,  # the two commands for a clone of the repository
    "device-mapper": 1,  # tests/vm has it, in guests
    "recorded-log": 1,  # tests/mount/test_import.py records one
    "node-exporter": 1,  # a folder of another program's
}
"""Why blocks are not played here, and how many there are of each."""

HUMAN_S: Final = 2.0
"""Between what people do there is as much at least; file systems' times may be so far from the captured ones."""
MISTAKES: Final = """\
sync = { exact = "24h", age = "12h" }


[retention]
dayly = 14
"""
SETTINGS: Final = "# what is kept\n\n\n[retention]\ndaily = 14\n"

Action = Callable[[Terminal], None]
Steps = Mapping[str, Action]
"""What is done, unseen, before each command that begins so."""


@dataclass(frozen=True)
class Story:
    """What goes with the blocks below some headings: *before* a command that begins so, something is done unseen.

    *codes* are the exit codes of a command, each time that it comes; a command that isn't there ends with 0.
    """

    headings: tuple[str, ...]
    before: Steps = field(default_factory=dict)
    codes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def protected(folder: str) -> Action:
    """Wait as a person would who sees a copy under way: until it is complete."""

    def wait(terminal: Terminal) -> None:
        def is_protected() -> bool:
            with connect(terminal.path(f"{folder}/store")) as client:
                return all(report["state"] == "protected" for report in client.status()["volumes"])

        wait_until(is_protected, "the initial copy")

    return wait


def human(_terminal: Terminal) -> None:
    """Let pass what passes between two things that people do."""
    then = time.monotonic() + HUMAN_S
    wait_until(lambda: time.monotonic() > then, "a person")


def configured(text: str) -> Action:
    """Write the configuration of a store that the text speaks of."""

    def write(terminal: Terminal) -> None:
        made(terminal)
        terminal.path(f"{SCRATCH}/store/dmafs.conf").write_text(text)

    return write


def made(terminal: Terminal) -> None:
    """Make a store, unless there is one."""
    if not terminal.path(f"{SCRATCH}/store").exists():
        terminal.run(f"cd {SCRATCH} && mkdir mnt && truncate -s 1M disk && dmafs create store --source disk")


def served(terminal: Terminal) -> None:
    """Make a store, and a daemon for it."""
    made(terminal)
    terminal.run("dmafs serve store mnt &", lines=2)
    protected(SCRATCH)(terminal)


def play(
    terminal: Terminal, story: Story, text: str, *, compared: bool = True, also: Steps | None = None
) -> dict[int, list[str]]:
    """Run all commands below the story's headings, and return what each printed, by its line in the *text*.

    Raise TranscriptError at the first whose output isn't the text's, unless they aren't to be *compared*.
    """
    comparison = Comparison()
    printed: dict[int, list[str]] = {}
    codes = {command: iter(several) for command, several in story.codes.items()}
    for block in story_blocks(story, text):
        for step in block.steps:
            for before in (story.before, also or {}):
                for beginning, action in before.items():
                    if step.command.startswith(beginning):
                        action(terminal)
            code = next(codes[step.command]) if step.command in codes else 0
            printed[step.line] = terminal.run(step.command, lines=len(step.output), code=None)
            if compared:
                comparison.compare(step, printed[step.line])
            if terminal.status != code:
                told = "\n".join([f"ended with {terminal.status}, not {code}", *printed[step.line]])
                raise TranscriptError(f"line {step.line + 1}, $ {step.command}\n{told}")
    return printed


def story_blocks(story: Story, text: str) -> list[Block]:
    """Return what is played of a text."""
    found = blocks(text)
    return [block for heading in story.headings for block in found if block.heading == heading and not block.needs]


TOUR_STORY: Final = Story(
    (TOUR,),
    before={
        "dmafs status store": protected(f"{SCRATCH}/tour"),
        "rm -r files/etc/apt": human,
    },
)
BAD_DAY_STORY: Final = Story(
    (BAD_DAY, *RECOVERIES),
    before={
        "disk=": protected(f"{SCRATCH}/badday"),
        "rm -r data/etc/apt": human,
        'sqlite3 data/shop.db "drop': human,
    },
    codes={
        "ls data/etc/apt": (2,),
        "diff -rq --no-dereference past/etc data/etc": (1, 0),
        'sqlite3 data/shop.db "select * from orders"': (1, 0, 0),
        "sfdisk --dump $disk": (1,),
        "dmafs serve store mnt": (4,),
    },
)
CONFIGURATION_STORY: Final = Story(
    ("Configuration",),
    before={
        "dmafs config check": configured(MISTAKES),
        "dmafs config show": configured(SETTINGS),
    },
    codes={"dmafs config check store": (3,)},
)
MONITORING_STORY: Final = Story(("Monitoring",), before={"dmafs metrics": served})
STORIES: Final = (TOUR_STORY, BAD_DAY_STORY, CONFIGURATION_STORY, MONITORING_STORY)


def main() -> None:
    """Write the outputs of new runs into README.md."""
    text = README.read_text()
    printed: dict[int, list[str]] = {}
    for story in STORIES:
        with Terminal(ZONE) as terminal:
            printed |= play(terminal, story, text, compared=False)
    README.write_text(rewritten(text, printed))


if __name__ == "__main__":
    main()
