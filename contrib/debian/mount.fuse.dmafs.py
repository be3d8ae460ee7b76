#!/usr/bin/python3 -I
"""What mount(8) runs, with the libraries of its package and no others."""

import sys

sys.path.insert(0, "/usr/lib/dmafs")

from dmafs.cli.fstab import entry  # noqa: E402 - it is found by the line above

entry()
