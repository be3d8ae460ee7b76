"""The core: extents, journals, mirror, maps and syncs. Synchronous; knows neither trio nor FUSE; all I/O through ``storage``."""
