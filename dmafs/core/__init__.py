"""The core: extents, journals, mirror, maps and syncs; synchronous, all I/O through ``storage``."""
