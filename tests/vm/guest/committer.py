"""Commits one row to an SQLite database for each line that it reads, and answers each: ``python -m ... FILE JOURNAL``.

A process of its own, since WAL has a mapped file: whoever writes to that while the file system is frozen waits in a
page fault, and with it every thread of its process that wants to map memory, even the one that would thaw it.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import sys


def main() -> None:
    """Commit."""
    path, journal = sys.argv[1:]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"pragma journal_mode = {journal}")
        database.execute("pragma synchronous = extra")  # full leaves the unlink in the cache
        database.execute("create table rows (id integer primary key, filler blob)")
        database.execute("create index fillers on rows (filler)")
        for number, _ in enumerate(sys.stdin, 1):
            database.execute("begin")
            database.execute("insert into rows values (?, ?)", (number, random.randbytes(random.randrange(3000))))
            database.execute("update rows set filler = ? where id = ?", (random.randbytes(100), number // 2))
            database.execute("commit")
            print(number, flush=True)


if __name__ == "__main__":
    main()
