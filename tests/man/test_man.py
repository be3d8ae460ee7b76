"""Claims about the man pages and the README: they say what the program does, and nothing else.

The pages are mdoc(7), whose macros tell an option (``Fl``) from an argument (``Ar``) and a table's cells (``Ta``) from
text, so the sources are compared, not their rendering.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import re
import shlex
import struct
import subprocess
import tomllib
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest

from dmafs import errors
from dmafs.cli import fstab
from dmafs.cli.main import parser
from dmafs.core import index, ondisk, seal
from dmafs.core.clone import CLONES_MAX
from dmafs.core.copy import CHUNK_SECTORS
from dmafs.core.extent import MAX_EXTENT_SECTORS
from dmafs.core.forward import UNREAD_MAX
from dmafs.core.layers import STACK_WARM
from dmafs.core.moments import LATEST
from dmafs.core.names import CONFIGURATION_NAME, SOCKET_NAME
from dmafs.core.partitions import PARTITIONS_MAX
from dmafs.core.scrub import DAMAGE_MAX, STEP_BYTES
from dmafs.core.segment import BATCH_BYTES, DATA_AHEAD, RECORDS_AHEAD
from dmafs.core.store import VOLUMES_MAX
from dmafs.core.verify import EXTENTS_MAX, PART_SECTORS
from dmafs.errors import DmafsError
from dmafs.service.admission import SCRAPERS_MAX
from dmafs.service.background import LOG_BYTES, LOG_FILE
from dmafs.service.configuration import DURATION, SIZE, Configuration, StoreTable, VolumeTable
from dmafs.service.daemon import FUSE_TASKS
from dmafs.service.document import Document
from dmafs.service.following import TICKS_MAX
from dmafs.service.loading import machine_of
from dmafs.service.machine import MACHINE_FILE
from dmafs.service.mounting import MAX_BACKGROUND
from dmafs.service.reloading import OF_THE_MACHINE, RESTART
from dmafs.service.telling import WAITING_MAX
from dmafs.taps import logreader
from dmafs.tree.around import AREA, AREAS_MAX, WISHES_MAX
from dmafs.tree.operations import HANDLES_MAX
from dmafs.tree.views import KEPT_MAX
from dmafs.units import SECTOR, TimeNs, format_bytes, parse_spelling

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted((ROOT / "man").iterdir())
README: Final = (ROOT / "README.md").read_text()
NOW: Final = TimeNs(1785249005_000000000)


# -- reading the pages ----------------------------------------------------------------------------------------------


def page(name: str) -> str:
    return (ROOT / "man" / name).read_text()


def part(text: str, title: str, macro: str = "Sh") -> str:
    """Return what stands below a heading, up to the next one of its level or a higher one."""
    ends = r"\.Sh " if macro == "Sh" else r"\.S[hs] "
    match = re.search(rf"^\.{macro} {re.escape(title)}\n(.*?)(?=^{ends}|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"no {macro} {title}"
    return match[1]


def subheadings(text: str) -> list[str]:
    return re.findall(r"^\.Ss (.*)$", text, re.MULTILINE)


def rows(text: str) -> list[tuple[str, ...]]:
    """Return the cells of the tables in *text*, without their heads."""
    lines = re.findall(r"^\.It (.* Ta .*)$", text, re.MULTILINE)
    return [tuple(line.split(" Ta ")) for line in lines if not line.startswith("Em ")]


def plain(text: str) -> str:
    return text.replace(r"\-", "-").replace(r"\(dq", '"')


def literals(text: str) -> list[str]:
    """Return the lines of the literal displays."""
    displays = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", text, re.MULTILINE | re.DOTALL)
    return [plain(line) for display in displays for line in display.splitlines()]


def options_in(text: str) -> set[str]:
    """Return all that ``Fl`` marks."""
    macros = [line for line in text.splitlines() if line.startswith(".")]
    return {f"-{name}" for line in macros for name in re.findall(r"\bFl (-?[a-z]+(?:-[a-z]+)*)", line)}


def arguments_in(text: str) -> set[str]:
    """Return all that ``Ar`` marks in the heads of list items."""
    return {name for line in re.findall(r"^\.It (.*)$", text, re.MULTILINE) for name in re.findall(r"\bAr (\S+)", line)}


def synopses(text: str) -> list[str]:
    """Return the command lines of SYNOPSIS as argparse would write them."""
    lines: list[str] = []
    for line in part(text, "SYNOPSIS").splitlines():
        if line.startswith(".Nm"):
            lines.append("dmafs")
            continue
        words = re.sub(r"\b(?:Ar|Cm) ", "", re.sub(r"\bFl ", "-", line.removeprefix(".")))
        lines[-1] += " " + re.sub(r"^Pq (.*)", r"(\1)", re.sub(r"^Op (.*)", r"[\1]", words))
    return lines


# -- what the parser knows ------------------------------------------------------------------------------------------


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the commands of a parser: none, or some."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return all commands, with those of commands as ``snapshot create``."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name, command in choices(parser()).items():
        found |= {f"{name} {inner}": one for inner, one in choices(command).items()} or {name: command}
    return found


COMMAND_PAGES: Final = [path.name for path in PAGES if path.name.endswith(".1") and path.name != "dmafs.1"]
TELLING: Final = {"-v", "--verbose", "-q", "--quiet"}
"""Options that all commands have: dmafs(1) tells of them."""


def page_of(name: str) -> str:
    """Return the text of the page that describes a command."""
    [found] = [page(one) for one in COMMAND_PAGES if name in subheadings(page(one))]
    return found


def usage(command: argparse.ArgumentParser) -> str:
    text = command.format_usage().removeprefix("usage: ")
    words = re.sub(r"\{(.*?)\}", lambda choices: choices[1].replace(",", " | "), text)
    return " ".join(words.split())


def actions(command: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in command._actions if not isinstance(action, argparse._HelpAction)]


def option_strings(command: argparse.ArgumentParser) -> set[str]:
    return {string for action in actions(command) for string in action.option_strings}


def parses(line: str) -> int:
    """Parse the ``dmafs`` commands of a shell line and return their number; argparse exits at what it doesn't know."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found = 0
    command: list[str] = []
    for word in [*words, ";"]:
        if not re.fullmatch(r"[|&;<>()]+", word):
            command.append(word)
            continue
        if command and command[0] == "dmafs":
            parser().parse_args(command[1:])
            found += 1
        command = []
    return found


# -- all pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_render_without_warnings(path: Path) -> None:
    """Neither groff, which man uses, nor mandoc's check has anything to say about a page."""
    for command in (["groff", "-mandoc", "-ww", "-z", "-Tutf8"], ["mandoc", "-T", "lint", "-W", "warning"]):
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), command[0]


def test_there_is_a_page_for_each_name_and_they_refer_to_each_other() -> None:
    """Each reference to a page of ours leads to one; dmafs(1) names all others, and they name it."""
    names = {path.name for path in PAGES}
    assert {"dmafs.1", "dmafs.conf.5", "dmafs-store.5", "mount.fuse.dmafs.8"} == names - set(COMMAND_PAGES)
    for path in PAGES:
        found = {".".join(pair) for pair in re.findall(r"^\.Xr (\S*dmafs\S*) (\d)", path.read_text(), re.MULTILINE)}
        assert found <= names - {path.name}
        assert path.name == "dmafs.1" or "dmafs.1" in found
        assert path.name != "dmafs.1" or found == names - {path.name}
        title, section = path.name.rsplit(".", 1)
        assert f".Dt {title.upper()} {section}\n" in path.read_text()


# -- dmafs(1) -------------------------------------------------------------------------------------------------------


def test_synopsis_is_the_parsers_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page has the lines of its commands as argparse prints them, but for what all have, and dmafs(1) its own."""
    monkeypatch.setenv("COLUMNS", "500")
    assert synopses(page("dmafs.1")) == [usage(parser()).replace("-v | -q", "-v | q")]
    expected = {name: usage(command).replace(" [-h] [-v | -q]", "") for name, command in commands().items()}
    for one in COMMAND_PAGES:
        assert synopses(page(one)) == [expected[name] for name in subheadings(page(one))], one


def test_commands_are_the_parsers() -> None:
    """dmafs(1) lists all commands in the parser's order, with the page that describes each; there is no other."""
    listed = re.findall(r"^\.It Cm (\S+)\n.*\n\.Xr (\S+) (1) \.$", part(page("dmafs.1"), "COMMANDS"), re.MULTILINE)
    assert [name for name, *_ in listed] == list(choices(parser()))
    pages = {name: f"{title}.{number}" for name, title, number in listed}
    described = [(name, one) for one in COMMAND_PAGES for name in subheadings(page(one))]
    assert sorted(name for name, _ in described) == sorted(commands())
    assert all(pages[name.split()[0]] == one for name, one in described)


@pytest.mark.parametrize("name", commands())
def test_options_and_arguments_of_a_command_are_the_parsers(name: str) -> None:
    """A command's part describes each of its options and arguments, and no other."""
    text = part(page_of(name), name, "Ss")
    known = actions(commands()[name])
    assert options_in(text) == option_strings(commands()[name]) - TELLING
    assert arguments_in(text) == {str(action.metavar) for action in known if action.metavar}
    for action in known:
        choices = list(action.choices or [])
        if action.option_strings and choices:
            assert f".It Fl {action.option_strings[0][1:]} Cm {' | '.join(choices)}\n" in text
        if isinstance(action.default, str) and not action.option_strings:
            assert f".Li {action.default} " in text


def test_general_options_are_the_parsers() -> None:
    """OPTIONS describes what goes before the command; nowhere else is there an option that no parser has."""
    text = page("dmafs.1")
    general = option_strings(parser()) | {"-h", "--help"}
    assert options_in(part(text, "OPTIONS")) == general
    assert options_in(text) == general | {"--json"}
    for command in commands().values():
        assert option_strings(command) >= TELLING


def test_exit_statuses_are_the_errors() -> None:
    """The table has each class of the tree of errors with its exit code and errno, ascending."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DmafsError)]
    expected = [(str(kind.exit_code), kind.__name__, errno.errorcode[kind.errno]) for kind in kinds]
    found = [row[:3] for row in rows(part(page("dmafs.1"), "EXIT STATUS"))]
    assert found == sorted(expected, key=lambda row: int(row[0]))


def test_files_have_the_programs_names() -> None:
    """The files named are those that the program uses."""
    files = set(re.findall(r"^\.It Pa (\S+)$", part(page("dmafs.1"), "FILES"), re.MULTILINE))
    assert files == {str(MACHINE_FILE), *(f"STORE/{name}" for name in (CONFIGURATION_NAME, SOCKET_NAME, "VOLUME/"))}


def spellings() -> list[str]:
    items = re.findall(r"^\.It Li (.*)$", part(page("dmafs.1"), "TIME"), re.MULTILINE)
    table = README.partition("| spelling |")[2].partition("\n\n")[0].splitlines()[2:]
    readmes = [text for line in table for text in re.findall(r"`([^`]+)`", line.split("|")[1])]
    return sorted({text for item in items for text in item.split(" , ")}.union(readmes))


@pytest.mark.parametrize("text", spellings())
def test_spellings_of_times_are_understood(text: str) -> None:
    """Each example of a time is one for the grammar; ``latest`` is the tree's own."""
    if text != LATEST:
        parse_spelling(text, now=NOW, timezone="Europe/Berlin")


def shown_commands() -> list[str]:
    """Return the lines of the pages' displays that call the program."""
    lines = [line for path in PAGES for line in literals(path.read_text())]
    return [line for line in lines if re.search(r"(?<![/.\w])dmafs ", line)]


@pytest.mark.parametrize("line", shown_commands())
def test_examples_parse(line: str) -> None:
    """Each command line of the pages is one for the parser."""
    assert parses(line)


# -- dmafs.conf(5) --------------------------------------------------------------------------------------------------


TABLE_FIELDS = {
    "Top level": [field for field in dataclasses.fields(Configuration) if "table" not in field.metadata],
    **{
        f"[{field.name}]": dataclasses.fields(field.metadata["table"])
        for field in dataclasses.fields(Configuration)
        if "table" in field.metadata
    },
    "[[store]]": [
        field
        for field in dataclasses.fields(StoreTable)
        if field.name not in {known.name for known in dataclasses.fields(Configuration)} and "kind" in field.metadata
    ],
    "[[store.volume]]": dataclasses.fields(VolumeTable),
}


def shown_default(field: dataclasses.Field[object]) -> str:
    """Return a default as the page's table shows it: as the file would, sizes with a blank."""
    default = field.metadata["default"]
    if field.metadata["kind"] is SIZE:
        return format_bytes(SIZE.read(default))
    if field.metadata["required"]:
        return "required"
    return "none" if default in ([], "", None) else str(default).lower()


def shown_minimum(field: dataclasses.Field[object]) -> str:
    kind, minimum = field.metadata["kind"], field.metadata["minimum"]
    if minimum is None:
        return r"\-"
    return format_bytes(minimum) if kind is SIZE else f"{minimum:g}" + ("s" if kind is DURATION else "")


def test_tables_are_the_configurations() -> None:
    """The page has a part for each table, and no other."""
    assert subheadings(part(page("dmafs.conf.5"), "KEYS")) == list(TABLE_FIELDS)


@pytest.mark.parametrize("title", TABLE_FIELDS)
def test_keys_are_the_configurations(title: str) -> None:
    """Each part has each key with unit, default and minimum, in the order of the class, and explains each."""
    text = part(page("dmafs.conf.5"), title, "Ss")
    expected = [
        (field.name, field.metadata["kind"].name, shown_default(field), shown_minimum(field))
        for field in TABLE_FIELDS[title]
    ]
    assert rows(text) == expected
    assert re.findall(r"^\.It Ic (\S+)$", text, re.MULTILINE) == [row[0] for row in expected]


def test_units_are_the_configurations() -> None:
    """Each unit is explained, and there is no other."""
    units = {field.metadata["kind"].name for table in TABLE_FIELDS.values() for field in table}
    explained = re.findall(r"^\.Em (\w+)", part(page("dmafs.conf.5"), "DESCRIPTION"), re.MULTILINE)
    assert set(explained) == units - {"number"}


def examples() -> list[str]:
    """Return the configurations that page and README show."""
    displays = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", page("dmafs.conf.5"), re.MULTILINE | re.DOTALL)
    return [*map(plain, displays), *re.findall(r"```toml\n(.*?)```", README, re.DOTALL)]


@pytest.mark.parametrize("text", examples())
def test_example_configurations_are_right(text: str) -> None:
    """The examples are files that the program takes, and change something; some of each kind."""
    document = Document(text.encode(), Path("/example"))
    if "store" in document.values:
        assert machine_of(document).store
    else:
        assert document.table(Configuration) != Configuration()
    document.finish()


def test_there_are_examples_of_both_files() -> None:
    """In the page and in the README."""
    assert ["[[store]]" in text for text in examples()] == [False, True, False, True, False]


def test_what_needs_a_restart_is_the_programs() -> None:
    """The page names each such key, in the program's order, and no other."""
    named = re.findall(r"^\.Ic \[?(\w+)", part(page("dmafs.conf.5"), "LOADING IT AGAIN"), re.MULTILINE)
    assert named == [*RESTART, *OF_THE_MACHINE]


def test_example_values_are_understood() -> None:
    """The ways to write a value are ways to write one of its unit."""
    text = part(page("dmafs.conf.5"), "DESCRIPTION").partition("The file is TOML")[2]
    kinds = {field.metadata["kind"].name: field.metadata["kind"] for table in TABLE_FIELDS.values() for field in table}
    kind, values = "", []
    for line in text.splitlines():
        if line.startswith(".Em "):
            kind = line.split()[1]
        elif line.startswith(".Li "):
            value = tomllib.loads(f"x = {re.sub(' [.,;]$', '', plain(line.removeprefix('.Li ')))}")["x"]
            values.append((kind, kinds[kind].read(value)))
    assert [value for kind, value in values if kind == "size"] == [64 << 20, 64 << 20, 1 << 30]
    assert [value for kind, value in values if kind == "duration"] == [86400, 5400]
    assert {kind for kind, _ in values} == set(kinds) - {"number", "seconds"}


def test_bounds_are_the_programs() -> None:
    """The table of bounds has the constants of the program, and the defaults of the keys that it names."""
    found = {row[0]: row[1:] for row in rows(part(page("dmafs.conf.5"), "BOUNDS"))}
    constants = {
        "requests of the tree": FUSE_TASKS,
        "requests in the kernel": MAX_BACKGROUND,
        "one event of a write": format_bytes(MAX_EXTENT_SECTORS * SECTOR),
        "flushes at once": 1,
        "open files of the tree": HANDLES_MAX,
        "images with known partitions": KEPT_MAX,
        "partitions shown of an image": PARTITIONS_MAX,
        "read-around, areas remembered": AREAS_MAX,
        "read-around, windows that wait": WISHES_MAX,
        "read-around, one window": format_bytes(AREA),
        "zeros ahead, of data": format_bytes(DATA_AHEAD),
        "zeros ahead, of records": format_bytes(RECORDS_AHEAD),
        "a step of a sync or drop": format_bytes(BATCH_BYTES),
        "a step of the first copy": format_bytes(CHUNK_SECTORS * SECTOR),
        "a step of a verify": format_bytes(PART_SECTORS * SECTOR),
        "extents a verify names": EXTENTS_MAX,
        "a step of a scrub": format_bytes(STEP_BYTES),
        "places a scrub names": DAMAGE_MAX,
        "full segments nobody has read": UNREAD_MAX,
        "layers not merged": STACK_WARM,
        "window of a log, entries": logreader.WINDOW_ROWS,
        "window of a log, read at once": format_bytes(logreader.BATCH_BYTES),
        "barriers of ticks": TICKS_MAX,
        "clones of a store": CLONES_MAX,
        "volumes of a store": VOLUMES_MAX,
        "connections to the port for metrics": SCRAPERS_MAX,
        "alarms that wait for the command": WAITING_MAX,
    }
    assert {what: most for what, (most, key) in found.items() if key == r"\-"} == {
        what: str(most) for what, most in constants.items()
    }
    defaults = {(table, field.name): field for table, keys in TABLE_FIELDS.items() for field in keys}
    for most, key in found.values():
        if key != r"\-":
            table, _, name = key.rpartition(" ")
            field = defaults[table or "Top level", name]
            assert most == ("no limit" if field.metadata["default"] == 0 else shown_default(field)), key


# -- mount.fuse.dmafs(8) --------------------------------------------------------------------------------------------


def test_options_and_arguments_of_the_helper_are_its_parsers() -> None:
    """The page describes each, in the synopsis and below."""
    text = page("mount.fuse.dmafs.8")
    description, known = part(text, "DESCRIPTION"), actions(fstab.parser())
    assert options_in(description) == option_strings(fstab.parser())
    assert arguments_in(description) == {str(action.metavar) for action in known if action.metavar}
    assert arguments_in(description) == set(re.findall(r"\bAr (\S+)", part(text, "SYNOPSIS")))


def test_mount_options_are_the_helpers() -> None:
    """Those with a value are described, those of mount are among those that are understood, those refused are so."""
    text = part(page("mount.fuse.dmafs.8"), "MOUNT OPTIONS")
    assert re.findall(r"^\.It Cm (\w+) Ns = Ns Ar FILE$", text, re.MULTILINE) == list(fstab.Wanted._fields)
    taken, _, refused = text.partition("Any other is an error:")
    named = {
        name for line in re.findall(r"^\.Cm (.*)$", taken, re.MULTILINE) for name in re.findall(r"[\w-][\w.-]*", line)
    }
    assert {name for name in named if name not in {*fstab.PLAIN, *fstab.Wanted._fields}} == {"x-systemd.requires"}
    assert fstab.wanted([",".join(named - set(fstab.Wanted._fields))]) == fstab.Wanted()
    for name in re.findall(r"^\.Cm (\w+)", refused, re.MULTILINE):
        with pytest.raises(errors.InputError, match=f"option {name} can't be had"):
            fstab.wanted([name])


def test_files_and_statuses_of_the_helper_are_its_own() -> None:
    """And the line for fstab is one that it takes."""
    text = page("mount.fuse.dmafs.8")
    assert f".It Pa {LOG_FILE}\n" in part(text, "FILES")
    assert f"more than {format_bytes(LOG_BYTES)} " in text
    found = [int(row[0]) for row in rows(part(text, "EXIT STATUS"))]
    assert found == [0, fstab.USAGE, fstab.BUG, fstab.INTERRUPTED, fstab.FAILED]
    [line] = literals(text)
    _, _, kind, options, _, _ = line.split()
    assert fstab.parser().parse_args(["store", "dir", "-t", kind, "-o", options]).t == kind
    assert fstab.wanted([options]) == fstab.Wanted()


# -- dmafs-store(5) -------------------------------------------------------------------------------------------------


def documented_tables() -> dict[str, list[tuple[int, int]]]:
    """Return (offset, bytes) of each table in the docstring of ``ondisk``."""
    found: dict[str, list[tuple[int, int]]] = {}
    title = ""
    for line in (ondisk.__doc__ or "").splitlines():
        if heading := re.match(
            r"(Segment header|Descriptor record|Seal|Pointer slot|Digest header|Index header)", line
        ):
            title = heading[1]
        if cells := re.match(r" +(\d+) +(\d+)  \S", line):
            found.setdefault(title, []).append((int(cells[1]), int(cells[2])))
    return found


TABLES = [
    ("Segment header", "Segment header", ondisk._HEADER, ondisk.HEADER_SIZE),
    ("Descriptor records", "Descriptor record", ondisk._RECORD, ondisk.RECORD_SIZE),
    ("Seals", "Seal", seal.SEAL, seal.SEAL_SIZE),
    ("Pointer slots", "Pointer slot", ondisk._SLOT, ondisk.SLOT_SIZE),
    ("Indexes", "Index header", index.HEADER, ondisk.HEADER_SIZE),
    ("Digest table", "Digest header", ondisk._DIGESTS, ondisk.HEADER_SIZE),
]


@pytest.mark.parametrize(("heading", "title", "layout", "size"), TABLES, ids=[table[1] for table in TABLES])
def test_tables_are_the_formats(heading: str, title: str, layout: struct.Struct, size: int) -> None:
    """Each table has the offsets and sizes of the packed fields, and of the module's own table."""
    found = [(int(row[0]), int(row[1])) for row in rows(part(page("dmafs-store.5"), heading, "Ss")) if len(row) == 3]
    widths = [
        width
        for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format.lstrip("<"))
        for width in ([int(count)] if code in "sx" else [struct.calcsize(f"<{code}")] * int(count or 1))
    ]
    widths.append(8)  # the checksum
    offsets = [sum(widths[:number]) for number in range(len(widths))]
    assert found == list(zip(offsets, widths, strict=True)) == documented_tables()[title]
    assert sum(widths) == size


def test_magic_sizes_and_offsets_are_the_modules() -> None:
    """Numbers in the text are the constants."""
    text = page("dmafs-store.5")
    magic = dict(re.findall(r"Ta 8 Ta (magic) \\\(dq(\w+)\\\(dq", part(text, "Segment header", "Ss")))
    magic_of_slots = re.findall(r"Ta 8 Ta magic \\\(dq(\w+)\\\(dq", part(text, "Pointer slots", "Ss"))
    assert magic == {"magic": ondisk._HEADER_MAGIC.decode()}
    assert magic_of_slots == [ondisk._SLOT_MAGIC.decode()]
    flat = " ".join(line for line in text.splitlines())
    first, second = ondisk.SLOT_OFFSETS
    for phrase in (
        f"format version {ondisk.FORMAT_VERSION}.",
        f"(exit status {errors.VersionError.exit_code})",
        f"The first {ondisk.HEADER_SIZE} bytes",
        f"{ondisk.RECORD_SIZE} bytes each, from offset {ondisk.HEADER_SIZE} of",
        f"{ondisk.SLOT_SIZE} bytes each, at offsets {first} and {second} of",
        f"which has {ondisk.POINTERS_SIZE} bytes",
        f"at most {MAX_EXTENT_SECTORS} sectors",
        f"A sector is {SECTOR} bytes",
    ):
        assert phrase in flat, phrase


def test_flags_are_the_modules() -> None:
    """The table of flags has each kind of record and no other; what is no indicator is an event."""
    found = {
        int(row[0]): row[1] for row in rows(part(page("dmafs-store.5"), "Descriptor records", "Ss")) if len(row) == 2
    }
    assert sorted(found) == sorted(int(flag) for flag in ondisk.Flag)
    assert {flag for flag, text in found.items() if text.startswith("event ")} == set(ondisk.EVENT_FLAGS)


def test_keys_of_volume_json_are_the_modules() -> None:
    """The keys named are those that are written."""
    [sentence] = re.findall(r"JSON object with the keys ([^.]*)\.", page("dmafs-store.5"))
    info = ondisk.VolumeInfo(UUID(int=1), "disk", 1, "/dev/sdb", "fuse", 1)
    assert re.split(r", | and ", sentence) == list(json.loads(info.encode()))


# -- README.md ------------------------------------------------------------------------------------------------------


def consoles() -> list[str]:
    blocks = re.findall(r"^```console(?: needs=[a-z-]+)?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("line", sorted({line for line in consoles() if "dmafs " in line}))
def test_readmes_commands_parse(line: str) -> None:
    """Each command line of the README is one for the parser."""
    assert parses(line)


def test_readme_shows_every_command() -> None:
    """The tour leaves no command out."""
    shown = {word for line in consoles() for word in re.findall(r"\bdmafs ([a-z]+)", line)}
    assert shown == set(choices(parser()))


def paths() -> set[str]:
    """Return links, programs run, and code that begins with a folder of the repository."""
    folders = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."))
    links = re.findall(r"\]\(([^)#]+)\)", README)
    programs = [line for line in consoles() if line.startswith("./")]
    code = re.findall(rf"`((?:{folders})/[^`*<]*)`", README)
    return {path for path in [*links, *programs, *code] if "://" not in path}


@pytest.mark.parametrize("path", sorted(paths()))
def test_readmes_paths_are_there(path: str) -> None:
    """A path that the README names is in the repository, a folder written with a slash."""
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


def test_readme_names_all_rooms_and_pages() -> None:
    """The table of paths leaves no room of the program out, and every page is linked."""
    rooms = {f"dmafs/{path.name}/" for path in (ROOT / "dmafs").iterdir() if (path / "__init__.py").is_file()}
    assert rooms - {"dmafs/core/"} <= paths()
    assert {f"man/{path.name}" for path in PAGES} <= paths()


def test_readmes_packages_are_the_setups() -> None:
    """What is to be installed by hand is what the setup installs to build and mount."""
    [command] = re.findall(r"`apt-get install ([^`]+)`", README)
    setup = (ROOT / "contrib" / "setup.sh").read_text()
    [listed] = re.findall(r"^DMAFS_PACKAGES=\(\n(.*?)^\)", setup, re.MULTILINE | re.DOTALL)
    assert set(command.split()) <= set(re.sub(r"#.*", "", listed).split())
