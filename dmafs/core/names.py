"""What the files of a store are called that aren't of a volume."""

from __future__ import annotations

from typing import Final

SOCKET_NAME: Final = "control.sock"
CONFIGURATION_NAME: Final = "dmafs.conf"
