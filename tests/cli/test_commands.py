"""Every command of the parser, by a table: what it does when all is well, its JSON by a schema, how it fails.

A command, or an action of one, that isn't in the table fails the suite, as does an option --json that isn't tried.
Each entry stands for itself, on one daemon's store that has the snapshot `kept`. In the words of
commands {store}, {mnt} and {root} are the rig's; {other} is a store that nobody serves, {past} a folder to mount on,
{nothing} a name that isn't there.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import jsonschema_rs
import pytest

from dmafs import answers
from dmafs.cli.main import parser
from tests.cli import said
from tests.logs import FLUSH, log_of, mark, write
from tests.mount.harness import MIB, Rig

NO_STORE: Final = (11, "store .*/nothing can't be opened: no such file or directory", "make one with: dmafs create")
BUSY: Final = (12, "is in use by another process", "dmafs ")
NO_POINT: Final = (21, "before the first recoverable point of volume disk", "history begins at ")
NO_VOLUME: Final = (22, "volume nobody", "")
NO_SNAPSHOT: Final = (23, "no snapshot named nobody", "list them with: dmafs ls STORE")
NO_MAPPED: Final = (3, "no volume of this store has a mapped device", "only volumes made with --tap dm")

Failure = tuple[int, str, str]
LOCAL: Final = r" \(20\d\d-\S+ \S+ [+-]\d{4}\)"


@dataclass(frozen=True)
class Entry:
    """Of a command: *good* words and all that they print on standard output; words that *fail*, with the exit code, and
    what is in the error and the hint; words that say something as JSON, with its type.
    """

    good: tuple[tuple[str, str], ...] = ()
    fails: tuple[tuple[str, Failure], ...] = ()
    as_json: tuple[tuple[str, Any], ...] = ()
    before_json: str = ""  # begins what is ended by the words that say it as JSON
    after: str = ""  # ends what the words before have begun
    elsewhere: str = ""  # where the good path is tried, if it can't be here


COMMANDS: Final[dict[str, Entry]] = {
    "create": Entry(
        good=(("create {root}/made --source {root}/free", r"volume disk made in .*/made; now run: dmafs serve .*\n"),),
        fails=(
            ("create {store} --source {root}/disk.primary", (7, "volume disk already exists in ", "choose another")),
            ("create {root}/new --source {nothing}", (4, "source .*/nothing can't be opened", "check the path")),
            ("create {root}/new --source {root}/free --tap log", (3, "belong together", "give both or none")),
        ),
        as_json=(("create {root}/made-2 --source {root}/free-2", said.Made),),
    ),
    "import": Entry(
        good=(("import {root}/imported --log {root}/recorded --size 1M", r"(?s).*volume disk .*"),),
        fails=(
            ("import {root}/new --log {nothing} --size 1M", (4, "source .*/nothing can't be opened", "check the path")),
            ("import {root}/new --log {root}/recorded --size 1X", (3, "size '1X' not understood", "use whole bytes")),
        ),
        as_json=(("import {root}/imported-2 --log {root}/recorded --size 1M", said.Imported),),
    ),
    "serve": Entry(
        fails=(
            ("serve {nothing} {root}/past", NO_STORE),
            ("serve {store} {root}/past", BUSY),
            ("serve {other} {nothing}", (30, "nothing", "mkdir ")),
        ),
        elsewhere="test_the_daemon_serves",
    ),
    "status": Entry(
        good=(("status {store}", r"(?s)store .*: served by process \d+\n.*volume disk: protected, 16 MiB from .*\n"),),
        fails=(("status {nothing}", NO_STORE),),
        as_json=(("status {store}", answers.Status), ("status {other}", answers.Status)),
    ),
    "mark": Entry(
        good=(("mark {store} named", "mark named set\n"),),
        fails=(("mark {nothing} named", NO_STORE),),
        as_json=(("mark {store} named-too", answers.Named),),
    ),
    "snapshot create": Entry(
        good=(("snapshot create {store} taken", "snapshot taken taken\n"),),
        fails=(
            ("snapshot create {nothing} kept", NO_STORE),
            ("snapshot create {store} kept", (7, "kept", "")),
            ("snapshot create {store} a/b", (3, "a/b", "a name has 1 to 64 ")),
        ),
        as_json=(("snapshot create {store} taken-2", answers.Named),),
    ),
    "snapshot list": Entry(
        good=(
            (
                "snapshot list {store}",
                rf"SNAPSHOT +TIME +STATE +PINNED +VOLUMES\n(?:.*\n)*kept +\S+Z{LOCAL} +exact +disk seq 0\n(?:.*\n)*",
            ),
        ),
        fails=(("snapshot list {nothing}", NO_STORE),),
        as_json=(("snapshot list {store}", answers.Snapshots),),
    ),
    "snapshot rename": Entry(
        good=(("snapshot rename {store} taken called", "snapshot taken is called called now\n"),),
        fails=(
            ("snapshot rename {store} nobody called-2", NO_SNAPSHOT),
            ("snapshot rename {store} taken kept", (7, "kept", "")),
            ("snapshot rename {store} taken a/b", (3, "a/b", "a name has 1 to 64 ")),
        ),
        as_json=(("snapshot rename {store} called taken", answers.Renamed),),
    ),
    "snapshot pin": Entry(
        good=(("snapshot pin {store} kept", "snapshot kept pinned\n"),),
        fails=(
            ("snapshot pin {store} nobody", NO_SNAPSHOT),
            ("snapshot drop {store} kept", (25, "kept is pinned", "dmafs snapshot unpin")),
        ),
        as_json=(("snapshot pin {store} kept", answers.Pinned),),
    ),
    "snapshot unpin": Entry(
        good=(("snapshot unpin {store} kept", "snapshot kept unpinned\n"),),
        fails=(("snapshot unpin {store} nobody", NO_SNAPSHOT),),
        as_json=(("snapshot unpin {store} kept", answers.Pinned),),
    ),
    "snapshot drop": Entry(
        good=(("snapshot drop {store} taken", "snapshot taken dropped\n"),),
        fails=(("snapshot drop {store} nobody", NO_SNAPSHOT),),
        as_json=(("snapshot drop {store} taken-2", answers.Dropped),),
    ),
    "ls": Entry(
        good=(("ls {store}", rf"TIME +VOLUME +SEQ +KIND +STATE +NAME\n(?:20\d\d-\S+Z{LOCAL}  disk .*\n)+"),),
        fails=(("ls {nothing}", NO_STORE),),
        as_json=(("ls {store}", answers.Points),),
    ),
    "read": Entry(
        good=(("read {store} disk --at kept --offset 1080 --length 1", "S"),),  # the first letter of ext4's magic
        fails=(
            ("read {store} disk --at '1h ago' --offset 0 --length 1", NO_POINT),
            ("read {store} nobody --at kept --offset 0 --length 1", NO_VOLUME),
        ),
    ),
    "diff": Entry(
        good=(
            (
                "diff {store} disk kept '0s ago'",
                rf"(?:[ab] \S+Z{LOCAL}  seq 0\n){{2}} +OFFSET +LENGTH\n +total +0  bytes in 0 extents\n",
            ),
        ),
        fails=(
            ("diff {store} disk kept '1h ago'", NO_POINT),
            ("diff {store} nobody kept kept", NO_VOLUME),
            ("diff {store} disk kept someday!", (21, "point 'someday!' not understood", "accepted are")),
        ),
        as_json=(("diff {store} disk kept '0s ago'", said.Diff),),
    ),
    "metrics": Entry(
        good=(("metrics {store}", r'(?s).*\ndmafs_captured_events_total\{kind="data",volume="disk"\} .*\n'),),
        fails=(("metrics {nothing}", NO_STORE),),
    ),
    "at": Entry(
        good=(
            (
                "at {store} kept",
                rf"(?s)moment \S+Z{LOCAL}\nvolume disk: snapshot kept, seq 0\n  time .*  path +/.*disk.img\n",
            ),
        ),
        fails=(("at {nothing} kept", NO_STORE), ("at {store} kept --volume nobody", NO_VOLUME)),
        as_json=(("at {store} kept", said.At),),
    ),
    "cp": Entry(
        good=(
            (
                "cp {store} @kept {root}/copy",
                rf"volume disk at \S+Z{LOCAL} copied to \S+/copy: 16 MiB, .* of it data\n",
            ),
        ),
        fails=(
            ("cp {store} kept {root}/other-copy", (3, "'kept' is not VOLUME@TIME", "for instance")),
            ("cp {store} @kept {root}/free", (7, "free", "--force")),
            ("cp {store} '@1h ago' {root}/other-copy", NO_POINT),
        ),
        as_json=(("cp {store} @kept {root}/copy --force", said.Copied),),
    ),
    "mount": Entry(
        good=(
            (
                "mount {store} @kept {past}",
                rf"ext4 of volume disk at \S+Z{LOCAL} mounted at \S+/past\n  /dev/loop\d+, .*\n",
            ),
            ("umount {past}", r"/\S+/past unmounted\n"),
        ),
        fails=(
            ("mount {store} @kept {nothing}", (30, "nothing is not a directory", "make it: mkdir")),
            ("mount {store} @kept {past} --partition 3", (3, "the image has no partition 3", "leave --partition out")),
            ("mount {other} '@0s ago' {past}", (30, "the tree of store .* can't be reached", "serve it: dmafs serve")),
        ),
        as_json=(("mount {store} @kept {past}", said.Mounted),),
        after="umount {past}",
    ),
    "umount": Entry(
        good=(("mount {store} @kept {past}", r"(?s)ext4 .*"), ("umount {past}", r"/\S+/past unmounted\n")),
        fails=(("umount {past}", (30, "nothing is mounted at ", "findmnt lists")),),
        as_json=(("umount {past}", said.Unmounted),),
        before_json="mount {store} @kept {past}",
    ),
    "sync": Entry(
        good=(("sync {store}", r"volume disk: mirror at seq \d+; before it only snapshots remain\n"),),
        fails=(("sync {nothing}", NO_STORE),),
        as_json=(("sync {store}", answers.Syncs),),
    ),
    "thin": Entry(
        good=(
            (
                "thin {store} --dry-run",
                r"SNAPSHOT +TIME +HOLDS +FATE +REASONS\n(?:.*\n)*kept .* 0 B  keep  .*named.*\n(?:.*\n)*",
            ),
        ),
        fails=(("thin {nothing}", NO_STORE),),
        as_json=(("thin {store}", answers.Thinned),),
    ),
    "clone create": Entry(
        good=(("clone create {store} try --at kept", "clone try made\n"),),
        fails=(
            ("clone create {store} try", (7, "try", "")),
            ("clone create {other} try", (10, "no daemon serves the store", "start")),
        ),
        as_json=(("clone create {store} try-2", answers.Named),),
    ),
    "clone list": Entry(
        good=(("clone list {store}", r"NAME +TIME +STORED  STATE\ntry .*  closed\ntry-2 .*  closed\n"),),
        fails=(("clone list {nothing}", NO_STORE),),
        as_json=(("clone list {store}", answers.Clones),),
    ),
    "clone drop": Entry(
        good=(("clone drop {store} try", "clone try dropped\n"),),
        fails=(("clone drop {store} nobody", (24, "no clone named nobody", "list them with: dmafs clone list")),),
        as_json=(("clone drop {store} try-2", answers.Named),),
    ),
    "verify": Entry(
        good=(("verify {store}", "volume disk: no differences in 16 MiB\n"),),
        fails=(("verify {store} nobody", NO_VOLUME), ("verify {store} --rate 1X", (3, "size '1X' not ", "use whole"))),
        as_json=(("verify {store}", said.Compared),),
    ),
    "resync": Entry(
        good=(("resync {store}", "volume disk: no differences in 16 MiB\n"),),
        fails=(("resync {store} nobody", NO_VOLUME),),
        as_json=(("resync {store}", said.Compared),),
    ),
    "scrub": Entry(
        good=(("scrub {store}", r"volume disk: no damage in .*\n"),),
        fails=(("scrub {store} nobody", NO_VOLUME),),
        as_json=(("scrub {store}", said.ScrubbedVolumes),),
    ),
    "check": Entry(
        good=(("check {other}", "volume disk: no errors, no notes; data was not read\n"),),
        fails=(("check {store}", BUSY), ("check {nothing}", NO_STORE)),
        as_json=(("check {other}", said.Inspection),),
    ),
    "config check": Entry(
        good=(("config check {store}", r"configuration .*/store/dmafs.conf: no errors\n"),),
        fails=(("config check {nothing}", (3, "configuration .*/nothing isn't there", "give the path")),),
        as_json=(("config check {store}", said.Configuration),),
    ),
    "config show": Entry(
        good=(("config show {store}", r'(?s).*\nsegment_size +"64MiB" +default\n.*'),),
        fails=(("config show {nothing}", NO_STORE),),
        as_json=(("config show {store}", said.SettingsInEffect), ("config show {other}", said.SettingsInEffect)),
    ),
    "tap status": Entry(fails=(("tap status {store}", NO_MAPPED),), elsewhere="tests/vm"),
    "tap attach": Entry(fails=(("tap attach {store}", NO_MAPPED),), elsewhere="tests/vm"),
    "tap detach": Entry(fails=(("tap detach {store}", NO_MAPPED),), elsewhere="tests/vm"),
    "completion": Entry(
        good=(("completion bash", r"(?s).*complete .* dmafs\n"),),
        fails=(("completion csh", (2, "invalid choice: 'csh'", "")),),
    ),
}


def leaves(root: argparse.ArgumentParser, above: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command of a parser, those with actions (sub-commands, or choices called so) once for each."""
    inner = [action for action in root._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for name, command in action.choices.items():
            yield from leaves(command, f"{above} {name}".strip())
    if not inner:
        actions = [action.choices for action in root._actions if action.dest == "action" and action.choices]
        for choice in actions[0] if actions else [""]:
            yield f"{above} {choice}".strip(), root


def has_json(command: argparse.ArgumentParser) -> bool:
    return any("--json" in action.option_strings for action in command._actions)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        image = made.root / "image"
        image.write_bytes(bytes(16 * MIB))
        made.mkfs(str(image))
        made.create(content=image.read_bytes())
        for name in ("free", "free-2", "spare"):
            (made.root / name).write_bytes(bytes(MIB))
        made.dmafs("create", made.root / "other", "--source", made.root / "spare")
        made.folder("past")
        (made.root / "recorded").write_bytes(log_of([write(1, bytes([1]) * 512), FLUSH, mark("end")]))
        made.start()
        made.dmafs("snapshot", "create", made.store, "kept")
        yield made
        made.stop()


def words(rig: Rig, command: str) -> list[str]:
    places = {"store": rig.store, "mnt": rig.mnt, "root": rig.root, "other": rig.root / "other"}
    return shlex.split(command.format(**places, past=rig.root / "past", nothing=rig.root / "nothing"))


def test_every_command_is_in_the_table() -> None:
    """With a good path, a failure, and its JSON if it has any; or it says where else that is tried."""
    found = dict(leaves(parser()))
    assert sorted(COMMANDS) == sorted(found)
    for name, command in found.items():
        entry = COMMANDS[name]
        assert entry.fails, f"no failure of {name} is tried"
        assert entry.good or entry.elsewhere, f"no good path of {name} is tried"
        assert bool(entry.as_json) == has_json(command) or entry.elsewhere == "tests/vm", (
            f"--json of {name} isn't tried"
        )
        tried = [line for line, _ in (*entry.good, *entry.fails, *entry.as_json)]
        assert any(line.startswith(name) for line in tried), f"the entry of {name} tries something else"


@pytest.mark.parametrize("name", COMMANDS)
def test_command(rig: Rig, name: str) -> None:
    """What succeeds says nothing on standard error, what fails nothing on standard output."""
    entry = COMMANDS[name]
    for command, pattern in entry.good:
        done = rig.dmafs(*words(rig, command))
        assert re.fullmatch(pattern, done.stdout), f"{command}: {done.stdout}"
        assert done.stderr == "", command
    if entry.before_json:
        rig.dmafs(*words(rig, entry.before_json))
    for command, kind in entry.as_json:
        done = rig.dmafs(*words(rig, command), "--json")
        jsonschema_rs.validate(said.schema(kind), json.loads(done.stdout))
        assert done.stderr == "", command
    for command, (code, error, hint) in entry.fails:
        done = rig.dmafs(*words(rig, command), code=code)
        assert done.stdout == "", command
        assert re.search(error, done.stderr), f"{command}: {done.stderr}"
        if code == 2:  # wrong usage, as argparse says it
            continue
        lines = done.stderr.splitlines()
        assert lines[0].startswith("dmafs: error: "), done.stderr
        assert len(lines) == 2, f"{command}: there is an error and a hint, and nothing else\n{done.stderr}"
        assert lines[1].startswith("hint: "), done.stderr
        assert hint in lines[1], f"{command}: {done.stderr}"
    if entry.after:
        rig.dmafs(*words(rig, entry.after))


def test_the_daemon_serves() -> None:
    with Rig() as rig:
        rig.create(size=MIB)
        rig.start()
        assert re.search(r"^dmafs: serving \S+/store at \S+/mnt$", rig.log(), re.MULTILINE)
        rig.stop()


def test_json_that_isnt_as_its_schema_says_is_noticed(rig: Rig) -> None:
    """A key too many, one too few, or a value of another kind."""
    report = json.loads(rig.dmafs("status", rig.store, "--json").stdout)
    schema = said.schema(answers.Status)
    volume = report["volumes"][0]
    for changed in (
        {**volume, "new": 1},
        {key: volume[key] for key in volume if key != "state"},
        {**volume, "gaps": 1},
    ):
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, {**report, "volumes": [changed]})
