"""What is tried of texts from outside: names and times, requests, configurations. See ``test_mutants``."""

from __future__ import annotations

import errno
import json
import logging
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

import numpy as np
import pyfuse3
import pytest
import trio

from dmafs.core.moments import Volumes, clone_group, require_clone, require_mark, snapshot_group
from dmafs.core.store import Store, create_volume
from dmafs.core.work import run
from dmafs.errors import CheckBusyError, InputError, NoSuchPointError, NotFoundError
from dmafs.service.appliance import Appliance
from dmafs.service.configuration import Configuration
from dmafs.service.control import application
from dmafs.service.devices import mapped_volumes
from dmafs.service.document import Document
from dmafs.service.exposition import Exposition
from dmafs.service.lines import Place
from dmafs.service.loading import machine_of
from dmafs.service.report import diff_of, image_at, volume_of
from dmafs.tree.backend import Backend
from dmafs.tree.guard import text_of
from dmafs.tree.names import Names
from dmafs.tree.nodes import TOP, CloneFolder, Directory, Moment, Node, SnapshotFolder
from dmafs.units import (
    AtName,
    AtSeq,
    AtTime,
    TimeNs,
    format_time,
    parse_bytes,
    parse_canonical,
    parse_duration_s,
    parse_share,
    parse_spelling,
    parse_time_of_day,
    valid_name,
)
from tests.fuzz.mutation import mutants, seeded, shown, text_mutants

Rng = np.random.Generator
NOW: Final = TimeNs(1_785_249_005_250_000_000)
SPELLINGS: Final = [
    "2026-07-28T143005.123456789Z",
    "2026-07-28T14:30:05.5Z",
    "2026-07-28 14:30+02:00",
    "20260728T143005Z",
    "2026-07-28T14:30",
    "yesterday 14:00",
    "today 09:30:01.5",
    "@1785249005.25",
    "2h ago",
    "1h30min ago",
    "1w2d3h4min5s6ms7us8ns ago",
    "seq:4711",
    "before-upgrade",
    "before-upgrade~5min",
    "latest",
]
WORDS: Final = [
    "~",
    " ago",
    "seq:",
    "@",
    "T",
    "Z",
    "+",
    ":",
    ".",
    "..",
    "/",
    "\0",
    "9" * 300,
    "w",
    "min",
    "-0",
    "e",
    "٣",
]


def spellings(rng: Rng, count: int) -> None:
    """Times and names: a point within the range of times, or a refusal that says what was refused, bounded."""
    for mutant in text_mutants(seeded(rng), SPELLINGS, count, words=WORDS):
        try:
            found = parse_spelling(mutant, now=NOW, timezone="Europe/Berlin")
        except NoSuchPointError as error:
            assert len(error.message) < 1200, shown(mutant)
            assert error.message.isprintable(), shown(mutant)
            continue
        assert valid_name(mutant.partition("~")[0]) == isinstance(found, AtName), shown(mutant)
        match found:
            case AtTime(time_ns):
                assert 0 <= time_ns < 2**63, shown(mutant)
                assert parse_canonical(format_time(time_ns)) == time_ns, shown(mutant)
            case AtSeq(seq, offset_ns):
                assert 0 <= seq < 2**63, shown(mutant)
                assert 0 <= offset_ns < 2**63, shown(mutant)
            case AtName(name, offset_ns):
                assert valid_name(name), shown(mutant)
                assert 0 <= offset_ns < 2**63, shown(mutant)


def quantities(rng: Rng, count: int) -> None:
    """Sizes, durations, shares and times of day: a number in range, or a refusal."""
    kept = ["4096", "64MiB", "64 MiB", "1G", "24h", "1h30min", "0s", "10%", "2.5%", "23:59", "00:00", "1w2d"]
    limits = ((parse_bytes, 2**63), (parse_duration_s, 2**63), (parse_share, 1), (parse_time_of_day, 86400))
    for number, mutant in enumerate(text_mutants(seeded(rng), kept, count, words=WORDS)):
        parse, limit = limits[number % 4]
        try:
            found = parse(mutant)
        except InputError as error:
            assert len(error.message) < 1200, shown(mutant)
        else:
            assert 0 <= found < limit, shown(mutant)


class _Known:
    """A backend with one volume, one snapshot, one clone, and a point at each even second."""

    def volume_names(self) -> list[str]:
        return ["disk"]

    def resolve(self, text: str) -> TimeNs:
        found = parse_spelling(text, now=NOW, timezone="UTC")
        if isinstance(found, AtTime):
            return TimeNs(found.time // 2_000_000_000 * 2_000_000_000)
        raise NoSuchPointError("none")

    def seqs_at(self, _time_ns: int) -> dict[str, int]:
        return {"disk": 1}

    def snapshot_ids(self) -> list[str]:
        return ["kept"]

    def snapshot_seqs(self, identifier: str) -> dict[str, int]:
        if identifier != "kept":
            raise NotFoundError("none")
        return {"disk": 1}

    def clones(self, name: str) -> dict[str, Any]:
        if name != "scratch":
            raise NotFoundError("none")
        return {}

    def live(self, volume: str) -> None:
        assert volume == "disk"

    def has_tap(self, volume: str) -> bool:
        return volume == "disk"


def names(rng: Rng, count: int) -> None:
    """Bytes as names in every folder of the tree: a node whose own name they are, or ENOENT."""
    tree = Names(cast("Backend", _Known()))
    folders: list[Node] = [
        Directory(""),
        *map(Directory, TOP),
        Moment(NOW),
        SnapshotFolder("kept"),
        CloneFolder("scratch"),
    ]
    kept = [*(text.encode().ljust(28, b"0") for text in SPELLINGS), b"disk.img".ljust(28), b"kept" * 7]
    kept += [b"../../../../../etc/passwd\0\0\0", b"\xff\xfe" * 14, "é時間".encode().ljust(28)]
    small = [name.encode() for name in (*TOP, "disk.img", "kept", "latest", "scratch")]
    for number, mutant in enumerate(mutants(rng, kept, count)):
        name = mutant if number % 3 else mutant[: int(rng.integers(0, 29))]
        if number % 17 == 0:
            name = small[number % len(small)] + mutant[:1] * (number % 2)
        try:
            node = tree.child(folders[number % len(folders)], text_of(name))
        except (NotFoundError, pyfuse3.FUSEError) as error:
            assert error.errno == errno.ENOENT, shown(name)
        else:
            assert b"/" not in name, shown(name)
            assert node == tree.child(folders[number % len(folders)], text_of(name)), shown(name)


# --- configurations

CONFIGURATION: Final = """segment_size = "8MiB"
reserve = "1GiB"
tick_s = 0.5
allow_other = false
threads = 8
[sync]
age = "24h"
exact = "12h"
free = "10%"
at = ["03:00", "12:30"]
marks = ["before-*"]
[snapshots]
every = "1h"
before = ["fsfreeze", "--freeze", "/data"]
hook_timeout = "20s"
[retention]
daily = 14
quota = "20%"
[resync]
rate = "128MiB"
"""
TOML_WORDS: Final = [
    *(
        "[sync]\n",
        "[[sync]]\n",
        "[x]\n",
        "= ",
        '"',
        "'''",
        "\\u0000",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "-1",
        "[" * 2000,
        "{",
    ),
    *("a.b.c = 1\n", "true", "1979-05-27", "0x", "#", "\n", "9" * 400, '"%"', '"100%"', '"1ns"', "age = 1\n", "[]"),
]


def configurations(rng: Rng, count: int) -> None:
    """A configuration whose values are in range, or a refusal that names the file and the line."""
    path = Path("/it/dmafs.conf")
    lines = CONFIGURATION.splitlines(keepends=True)
    parts = [CONFIGURATION, *lines, "".join(lines[:5]), "".join(lines[5:11]), "".join(lines[11:15]), ""]
    assert Document(b"", path).table(Configuration) == Configuration()
    for mutant in text_mutants(seeded(rng), parts, count, words=TOML_WORDS):
        document = Document(mutant.encode(errors="surrogatepass"), path)
        found = document.table(Configuration)
        if _is_right(document, mutant):
            _in_range(found, mutant)


def _is_right(document: Document, text: str) -> bool:
    """Say whether a document has no mistakes; check that each has what it needs, and that lines are those of keys."""
    for problem in document.problems:
        assert document.message(problem).startswith(f"configuration {document.path}"), shown(text)
        assert problem.hint, shown(text)
        assert 0 <= problem.line <= text.count("\n") + 1, shown(text)
        assert problem.line or problem.text.startswith("no TOML"), shown((text, problem))
    _check_lines(document, text.split("\n"), document.values, ())
    if document.problems:
        with pytest.raises(InputError, match=re.escape(str(document.path))):
            document.finish()
    else:
        document.finish()
    return not document.problems


def _check_lines(document: Document, lines: list[str], values: dict[str, Any], place: Place) -> None:
    """Look for each plain key of a table in the line that it is said to be in."""
    for key, value in values.items():
        inner = (*place, key)
        line = document.line(inner)
        assert line, shown((lines, inner))
        if inner in document.lines and re.fullmatch("[A-Za-z0-9_-]+", key):
            assert key in lines[line - 1], shown((lines, inner, line))
        if isinstance(value, dict):
            _check_lines(document, lines, value, inner)
        elif isinstance(value, list) and (*inner, 0) in document.lines:
            for number, each in enumerate(value):
                _check_lines(document, lines, each, (*inner, number))


def _in_range(found: Configuration, mutant: str) -> None:
    assert found.segment_size >= 1 << 20, shown(mutant)
    assert 0.01 <= found.tick_s < float("inf"), shown(mutant)
    assert found.threads >= 2, shown(mutant)
    assert all(type(word) is str and "\0" not in word for word in found.snapshots.before), shown(mutant)
    found.volume_limits()
    found.sync.policy()
    found.snapshots.schedule()


BELOW_STORE: Final = CONFIGURATION.replace("\n[", "\n[store.")
MACHINE: Final = f"""# of this machine
[[store]]
path = "/backup/store"
mount = "/mnt/dmafs"
{BELOW_STORE}
[[store.volume]]
name = "disk"
source = "/dev/sdb"
tap = "dm"
[[store.volume]]
name = "guest"
source = "/vm/disk.img"
tap = "log"
log = "/vm/disk.log"
[[store]]
path = "/backup/other"
"""
MACHINE_WORDS: Final = [
    *TOML_WORDS,
    *("[[store]]\n", "[store.sync]\n", "[[store.volume]]\n", "[store]\n", 'path = "/x"\n', 'name = "y"\n', "store."),
    *('tap = "fuse"\n', 'source = "/dev/sdb"\n', '"/"', '"."', "[[store.sync]]\n", '"""', "\\", "\r\n", "'"),
]


def machines(rng: Rng, count: int) -> None:
    """The machine's file: stores and volumes with all that they need, each once, or a refusal as of a store's file."""
    lines = MACHINE.splitlines(keepends=True)
    parts = [MACHINE, *lines, "".join(lines[:4]), "".join(lines[:12]), "".join(lines[-12:]), ""]
    good = Document(MACHINE.encode(), Path("/it/dmafs.toml"))
    assert len(machine_of(good).store) == 2
    assert _is_right(good, MACHINE)
    for mutant in text_mutants(seeded(rng), parts, count, words=MACHINE_WORDS):
        document = Document(mutant.encode(errors="surrogatepass"), Path("/it/dmafs.toml"))
        machine = machine_of(document)
        if not _is_right(document, mutant):
            continue
        assert len({entry.path for entry in machine.store}) == len(machine.store), shown(mutant)
        for entry in machine.store:
            _in_range(entry, mutant)
            assert entry.path.is_absolute(), shown(mutant)
            assert len({volume.name for volume in entry.volume}) == len(entry.volume), shown(mutant)
            for volume in entry.volume:
                assert volume.source.is_absolute(), shown(mutant)
                assert (volume.log is None) == (volume.tap != "log"), shown(mutant)


# --- requests


class _Asked:
    """An appliance of a real store that does nothing, but checks all as the real one does."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        self.status = dict

    async def take_snapshot(self, name: str) -> None:
        for volume in self._volumes.values():
            volume.require_snapshot(name)

    async def rename_snapshot(self, identifier: str, name: str) -> None:
        snapshot_group(self._volumes, identifier)
        for volume in self._volumes.values():
            volume.snapshots.require_free(name)

    async def mark(self, name: str) -> None:
        for volume in self._volumes.values():
            require_mark(volume, name)

    async def sync(self) -> dict[str, str]:
        return {}

    async def pin(self, identifier: str) -> None:
        snapshot_group(self._volumes, identifier)

    unpin = drop_snapshot = pin

    async def thin(self, *, dry_run: bool) -> dict[str, bool]:
        return {"dry": dry_run}

    async def tap(self, action: str, volume: str | None) -> dict[str, Any]:
        return {action: mapped_volumes(self._volumes, volume)}

    async def create_clone(self, name: str, at: str | None) -> None:
        require_clone(self._volumes, name)
        if at is not None:
            image_at(self._volumes, "disk", at)

    async def drop_clone(self, name: str) -> None:
        clone_group(self._volumes, name)

    @property
    def volumes(self) -> Volumes:
        return self._volumes

    async def read_at(self, image: Any, offset: int, length: int) -> AsyncIterator[bytes]:
        assert 0 <= offset <= offset + length <= image.size
        yield b"x"

    async def diff(self, volume: str, a: str, b: str) -> bytes:
        return json.dumps(run(diff_of(self._volumes, volume, a, b))).encode()

    def begin_check(self, _kind: str, volume: str, rate: int | None) -> None:
        assert rate is None or 0 <= rate < 10**18
        volume_of(self._volumes, volume)
        raise CheckBusyError("busy")


REQUESTS: Final = [
    "GET /status?",
    "GET /points?",
    "GET /snapshots?",
    "DELETE /snapshots?id=kept",
    "POST /snapshots?name=before-upgrade",
    "POST /rename?id=2026-07-28T143005.123456789Z&name=kept",
    "POST /marks?name=all-is-well",
    "POST /sync?",
    "POST /pin?id=2026-07-28T143005.123456789Z",
    "POST /unpin?id=kept",
    "POST /thin?dry_run=1",
    "GET /clones?",
    "POST /clones?name=try&at=2h ago",
    "DELETE /clones?name=try",
    "GET /read?volume=disk&at=0s ago&offset=0&length=512",
    "GET /diff?volume=disk&a=0s ago&b=seq:0",
    "GET /moment?at=0s ago",
    "GET /moment?volume=disk&at=seq:0",
    "POST /verify?volume=disk&rate=0",
    "POST /resync?volume=disk",
    "POST /tap?action=status&volume=disk",
]
REQUEST_WORDS: Final = [*WORDS, "&", "=", "?", "%", "%00", "%ff", "name=", "volume=disk", "at=", "#", ";", "\r\n", "é"]


def requests(rng: Rng, count: int) -> None:
    """Requests: an answer of ours with its status; what isn't right is never done, and nothing else is raised."""
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "source").write_bytes(bytes(1 << 16))
        create_volume(root / "store", "disk", source=root / "source", tap="fuse")
        store = Store(root / "store")
        try:
            for volume in store.volumes.values():
                volume.pointers.update(copied=True)
            trio.run(_ask_all, store.volumes, list(text_mutants(seeded(rng), REQUESTS, count, words=REQUEST_WORDS)))
        finally:
            store.close()


async def _ask_all(volumes: Volumes, mutated: list[str]) -> None:
    application_ = application(appliance := cast("Appliance", _Asked(volumes)), Exposition(appliance, {}))
    counts: dict[int, int] = {}
    for mutant in mutated:
        status, body = await _ask(application_, mutant)
        counts[status] = counts.get(status, 0) + 1
        assert status in {200, 307, 400, 404, 405, 409}, shown((mutant, status, body))
        assert len(body) < 1 << 16
    assert counts[200]
    assert counts[400]
    assert counts[404]


async def _ask(application_: Any, text: str) -> tuple[int, bytes]:  # an ASGI application
    method, _, target = text.partition(" ")
    path, _, query = target.partition("?")
    sent: list[Mapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method.upper(),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": quote(query, safe="=&%;+?/~:@").encode(),
        "headers": [],
        "client": None,
        "server": ("dmafs", None),
    }
    await application_(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
