#!/usr/bin/python3 -I
"""The command dmafs, with the libraries of its package and no others."""

import sys

sys.path.insert(0, "/usr/lib/dmafs")

from dmafs.cli.main import entry  # noqa: E402 - it is found by the line above

entry()
