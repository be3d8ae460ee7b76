"""The Python API: what the commands ask of a store, with and without a daemon, with typed answers.

::

    from pathlib import Path

    from dmafs.client import connect

    with connect(Path("/backup/store")) as store:
        for volume in store.status()["volumes"]:
            print(volume["name"], volume["state"])
        store.mark("before-upgrade")

The answers are described in ``dmafs.answers``, what can go wrong in ``dmafs.errors``.
"""

from __future__ import annotations

from dmafs.service.session import Session, Show, connect

__all__ = ["Session", "Show", "connect"]
