"""The FUSE tree: names, inodes and operations."""
