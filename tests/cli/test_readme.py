"""README.md's stories, run as they are printed, with what they print compared; and that a difference is noticed."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import readme
from tests.cli.readme import BAD_DAY_STORY, NEEDS, README, STORIES, TOUR_STORY, Story
from tests.cli.terminal import SCRATCH, Terminal
from tests.cli.transcript import Block, Comparison, Step, TranscriptError, blocks, masked, rewritten
from tests.mount.harness import assert_same, pread, run

TEXT = README.read_text()
TABLE_BYTES = 1 << 20
"""What is before the partition."""


def play(story: Story, also: readme.Steps | None = None) -> dict[int, list[str]]:
    """Play a story. One that goes on over a full hour has one snapshot more than the text: it is played once more."""
    while True:
        hour = time.time() // 3600
        try:
            with Terminal(readme.ZONE) as terminal:
                return readme.play(terminal, story, TEXT, also=also)
        except TranscriptError:
            if time.time() // 3600 == hour:
                raise


@pytest.fixture(scope="module")
def tour() -> dict[int, list[str]]:
    """What the tour's commands print, by their lines; as the text has it."""
    return play(TOUR_STORY)


def test_all_blocks_are_played_or_say_why_not() -> None:
    played = [block for story in STORIES for block in readme.story_blocks(story, TEXT)]
    found = blocks(TEXT)
    assert [block for block in found if not block.needs and block not in played] == []
    needs = [block.needs for block in found if block.needs]
    assert {need: needs.count(need) for need in needs} == NEEDS
    assert all(readme.story_blocks(Story((heading,)), TEXT) for story in STORIES for heading in story.headings)


def test_the_tour(tour: dict[int, list[str]]) -> None:
    assert len(tour) == sum(len(block.steps) for block in readme.story_blocks(TOUR_STORY, TEXT))


@pytest.mark.parametrize("story", STORIES[2:], ids=lambda story: story.headings[0])
def test_other_stories(story: Story) -> None:
    assert play(story)


class Oracle:
    """Copies of what the accidents of the bad day destroy, made right before, and compared with what comes back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compared: list[str] = []
        self.steps: readme.Steps = {
            "rm -r data/etc/apt": lambda terminal: self._keep(terminal, "data/etc/apt"),
            "dmafs umount past": self._compare_folder,
            'sqlite3 data/shop.db "drop': lambda terminal: self._keep(terminal, "data/shop.db"),
            'sqlite3 past/shop.db ".dump': lambda terminal: self._compare(terminal, "past/shop.db", "data/shop.db"),
            "dd if=/dev/zero": self._keep_table,
            "sfdisk --dump $disk | grep": self._compare_table,
            "rm primary.img": lambda terminal: self._keep(terminal, "primary.img"),
            "mv new.img": lambda terminal: self._compare(terminal, "new.img", "primary.img"),
            "ls -d data": lambda terminal: self._compare_folder(terminal, "data/etc/apt, at the end"),
        }

    def _place(self, terminal: Terminal, name: str) -> Path:
        return terminal.path(f"{SCRATCH}/badday/{name}")

    def _keep(self, terminal: Terminal, name: str) -> None:
        run("cp", "-a", "--sparse=always", self._place(terminal, name), self.folder / Path(name).name)

    def _compare(self, terminal: Terminal, name: str, kept: str) -> None:
        assert_same(self._place(terminal, name), self.folder / Path(kept).name)
        self.compared.append(name)

    def _compare_folder(self, terminal: Terminal, name: str = "data/etc/apt") -> None:
        run("diff", "-r", "--no-dereference", self._place(terminal, "data/etc/apt"), self.folder / "apt")
        same = "%y %m %u %g %P\\n"
        listings = [
            run("find", place, "-type", "d", "-printf", same, "-o", "-printf", f"%s %l {same}").stdout.splitlines()
            for place in (self._place(terminal, "data/etc/apt"), self.folder / "apt")
        ]
        assert len(listings[0]) > 1
        assert sorted(listings[0]) == sorted(listings[1])
        self.compared.append(name)

    def _keep_table(self, terminal: Terminal) -> None:
        (self.folder / "table").write_bytes(pread(self._place(terminal, "primary.img"), TABLE_BYTES, 0))

    def _compare_table(self, terminal: Terminal) -> None:
        table = (self.folder / "table").read_bytes()
        assert table.count(0) < len(table)
        assert pread(self._place(terminal, "primary.img"), TABLE_BYTES, 0) == table
        self.compared.append("table")


def test_the_bad_day(tmp_path: Path) -> None:
    """Each of the four accidents is undone by the commands, bit for bit."""
    oracle = Oracle(tmp_path)
    printed = play(BAD_DAY_STORY, oracle.steps)
    assert len(printed) == sum(len(block.steps) for block in readme.story_blocks(BAD_DAY_STORY, TEXT))
    assert set(oracle.compared) == {
        *["data/etc/apt", "past/shop.db", "table", "new.img", "data/etc/apt, at the end"],
    }
    shutil.rmtree(tmp_path / "apt")


# -- differences are noticed -------------------------------------------------------------------------------------------


def changed(line: str) -> Iterator[str]:
    """Return a line with each word changed, in turn, that isn't of those that may differ."""
    plain = masked(line)[0]
    for word in re.finditer(r"\S+", line):
        other = f"{line[: word.start()]}{word[0][:-1]}#{line[word.end() :]}"
        if masked(other)[0] != plain:
            yield other


def steps_of(found: list[Block]) -> Iterator[Step]:
    for block in found:
        yield from block.steps


def test_a_changed_line_of_output_is_noticed(tour: dict[int, list[str]]) -> None:
    """Whichever word of whichever line it is, a line too many, or one too few."""
    tried = 0
    for step in steps_of(readme.story_blocks(TOUR_STORY, TEXT)):
        outputs = [(*step.output, "another line"), step.output[:-1]] if step.output else [("another line",)]
        for number, line in enumerate(step.output):
            outputs += [(*step.output[:number], other, *step.output[number + 1 :]) for other in changed(line)]
        for output in outputs:
            with pytest.raises(TranscriptError):
                Comparison().compare(Step(step.command, output, step.line), tour[step.line])
            tried += 1
    assert tried > 200, "there is more than that in the tour"


def test_what_is_one_time_in_the_text_is_one_in_the_run() -> None:
    text = Step("x", ("2026-12-01T024829.997945691Z", "2026-12-01T02:48:29.997945691Z"), 0)
    Comparison().compare(text, ["2027-01-01T000000.000000001Z", "2027-01-01T00:00:00.000000001Z"])
    with pytest.raises(TranscriptError, match=r"was 2027-01-01T000000\.000000001Z before"):
        Comparison().compare(text, ["2027-01-01T000000.000000001Z", "2027-01-01T00:00:00.000000002Z"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("$ dmafs mark store name\n", "2 lines instead of 0"),
        ("$ dmafs create store --source disk\nvolume disk made in stores\n", "instead of"),
        ("$ true\n$ false\n", "ended with 1, not 0"),
        ("$ echo one\none\ntwo\n", "1 lines instead of 2"),
    ],
)
def test_a_changed_command_is_noticed(text: str, problem: str) -> None:
    document = f"# A story\n\n```console\n$ cd {SCRATCH} && truncate -s 1M disk\n{text}```\n"
    with Terminal() as terminal, pytest.raises(TranscriptError, match=problem):
        readme.play(terminal, Story(("A story",)), document)


def test_a_document_is_written_anew_with_the_outputs_of_a_run() -> None:
    document = "# A\n```console\n$ one\nold\n$ two\n$ three\nold\nold\n```\n"
    assert rewritten(document, {2: ["new", "new"], 4: ["two"]}) == document.replace(
        "$ one\nold\n$ two\n", "$ one\nnew\nnew\n$ two\ntwo\n"
    )


@pytest.mark.parametrize(
    "text", ["```console\nno command\n```\n", "```console because\n$ x\n```\n", "```console\n$ x\n"]
)
def test_a_block_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(TranscriptError):
        blocks(text)
