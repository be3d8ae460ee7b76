"""``mount.fuse.dmafs``: what mount(8) runs for ``mount -t fuse.dmafs`` and for such lines of /etc/fstab."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from dmafs.cli import output
from dmafs.cli.main import guarded
from dmafs.errors import InputError
from dmafs.service.background import LOG_FILE, Starter, start
from dmafs.service.logs import set_up
from dmafs.service.machine import choose_machine_file

NAME: Final = "mount.fuse.dmafs"
USAGE: Final = 1
BUG: Final = 4
INTERRUPTED: Final = 8
FAILED: Final = 32
"""Exit statuses of mount(8)."""

PLAIN: Final = frozenset(
    [
        # for mount itself
        *("rw", "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers", "owner"),
        *("noowner", "group", "nogroup", "loud", "silent", "async"),
        # the tree has neither devices nor programs
        *("dev", "nodev", "suid", "nosuid", "exec", "noexec"),
        # its times are those of the events
        *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
        *("lazytime", "nolazytime"),
    ]
)
"""Options that need nothing done."""
_FOR_OTHERS: Final = re.compile(r"[xX]-.*|comment=.*|user=.*|uhelper=.*")
_REFUSED: Final = {
    "ro": "the disk is written through the tree, and images of the past can't be written anyway",
    "remount": "a daemon loads its settings again at SIGHUP",
    "allow_other": "it is a setting, see dmafs.conf(5)",
}
_SETTINGS: Final = "what can be set is in dmafs.conf(5)"


class Wanted(NamedTuple):
    """What the options of the mount ask for."""

    config: Path | None = None
    log: Path = LOG_FILE


def parser() -> argparse.ArgumentParser:
    """Return the parser of what mount(8) gives its helpers; the man page is tested against it."""
    made = argparse.ArgumentParser(prog=NAME, description="Serve a store in the background; for mount(8) to call.")
    made.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    made.add_argument("mount_point", metavar="DIR", type=Path, help="an empty directory")
    made.add_argument("-o", metavar="OPTIONS", action="append", default=[], dest="options", help="options, with commas")
    made.add_argument("-t", metavar="TYPE", choices=["fuse.dmafs"], help="the type, which is fuse.dmafs")
    made.add_argument("-f", action="store_true", dest="fake", help="only look at the options")
    made.add_argument("-n", action="store_true", help="nothing: there is no mtab")
    made.add_argument("-s", action="store_true", dest="sloppy", help="don't mind unknown options")
    made.add_argument("-v", action="store_true", dest="verbose", help="log what happens, not only what goes wrong")
    return made


def wanted(lists: Sequence[str], *, sloppy: bool = False) -> Wanted:
    """Return what lists of options ask for, the last one of each. InputError for one that isn't understood."""
    found: dict[str, Path] = {}
    for option in (option for options in lists for option in options.split(",") if option):
        name, assigned, value = option.partition("=")
        if name in Wanted._fields and assigned:
            if not Path(value).is_absolute():
                raise InputError(f"option {option} doesn't name a file by its whole path", hint=f"{name}=/...")
            found[name] = Path(value)
        elif option in _REFUSED:
            raise InputError(f"option {option} can't be had", hint=_REFUSED[option])
        elif not (option in PLAIN or _FOR_OTHERS.fullmatch(option) or sloppy):
            raise InputError(f"option {option} isn't known", hint=_SETTINGS)
    return Wanted(**found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount, and return an exit status of mount(8); in the daemon, its own at its end."""
    try:
        options = parser().parse_args(arguments)
    except SystemExit as ended:
        return USAGE if ended.code else 0
    set_up(logging.INFO if options.verbose else logging.WARNING, os.environ)
    try:
        asked = wanted(options.options, sloppy=options.sloppy)
    except InputError as error:
        output.fail(error)
        return USAGE
    if options.fake:
        return 0
    store, mount_point = options.store.absolute(), options.mount_point.absolute()
    choose_machine_file(asked.config)

    def serve(starter: Starter) -> int:
        from dmafs.service.daemon import serve  # noqa: PLC0415 - who waits needs neither FUSE nor trio

        serve(store, mount_point, starter)
        return 0

    parent = os.getpid()
    try:
        status = start(lambda starter: guarded(lambda: serve(starter)), asked.log)
    except KeyboardInterrupt:
        return INTERRUPTED
    if os.getpid() != parent or status == 0:
        return status
    return BUG if status == 1 else FAILED


def entry() -> None:
    """Run the helper, or the daemon that it has become, and exit."""
    status = main()
    output.settle_errors()
    sys.exit(status)
