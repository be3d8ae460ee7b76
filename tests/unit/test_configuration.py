"""The configuration file: all keys optional, nothing guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmafs.errors import InputError, NoStoreError
from dmafs.service.client import session
from dmafs.service.configuration import Configuration, load_configuration


def test_defaults(tmp_path: Path) -> None:
    """Without a file, and with an empty one, the defaults hold."""
    assert load_configuration(tmp_path) == Configuration()
    (tmp_path / "dmafs.conf").write_text("# nothing\n")
    assert load_configuration(tmp_path) == Configuration()


def test_values(tmp_path: Path) -> None:
    """Sizes may have units, times may be whole numbers."""
    (tmp_path / "dmafs.conf").write_text(
        'segment_size = "8MiB"\nreserve = 0\nclone_quota = "1MiB"\ntick_s = 2\nallow_other = true\n'
    )
    found = load_configuration(tmp_path)
    assert (found.segment_size, found.reserve, found.tick_s, found.allow_other) == (8 << 20, 0, 2.0, True)
    assert found.volume_limits().segments.data_sectors == 16384
    assert found.volume_limits().clone_bytes == 1 << 20


def test_store_that_is_a_file_is_left_to_the_store(tmp_path: Path) -> None:
    """What is wrong with the store's path isn't an error of the configuration."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert load_configuration(path) == Configuration()
    with pytest.raises(NoStoreError, match=f"store {path}"), session(path):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "unknown = 1",
        "tick_s = true",
        "tick_s = 0",
        'tick_s = "1"',
        "tick_s = nan",
        "tick_s = inf",
        pytest.param(f"tick_s = 1{'0' * 400}", id="tick_s = 1e400"),
        "threads = 1.5",
        "threads = 1",
        "threads = -4",
        'segment_size = "64MB"',
        "segment_size = 511",
        "allow_other = 1",
        "idle_images =",
        "[section]\nkey = 1",
    ],
)
def test_what_is_not_right_is_refused(tmp_path: Path, text: str) -> None:
    """Unknown keys, wrong types, values out of range and bad syntax are errors that name the file."""
    (tmp_path / "dmafs.conf").write_text(text)
    with pytest.raises(InputError) as caught:
        load_configuration(tmp_path)
    assert str(tmp_path) in caught.value.message or "64MB" in caught.value.message
    assert caught.value.hint
