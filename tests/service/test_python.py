"""Claims about dmafs.client: the README's example does what it says, with a daemon and without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from dmafs.client import connect
from dmafs.errors import ControlError, ExistsError, InputError, NoStoreError, NoSuchPointError, StoreError
from tests.mount.harness import MIB, Rig, pwrite

README: Final = (Path(__file__).parents[2] / "README.md").read_text()
SIZE: Final = 4 * MIB
CONTENT: Final = b"from the beginning"


def example(store: Path) -> str:
    """Return the program of the README, for another store."""
    section = README.partition("\n## From Python\n")[2].partition("\n## ")[0]
    [program] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert program.count("/backup/store") == 1
    return str(program.replace("/backup/store", str(store)))


def told(capsys: pytest.CaptureFixture[str], store: Path) -> list[str]:
    """Run the example, and return what it prints, without how far the check was."""
    exec(compile(example(store), "README.md", "exec"), {})  # noqa: S102 - that is what is tested
    return re.sub(r"\d+% ", "", capsys.readouterr().out).splitlines()


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the same whoever is asked; what was written since counts."""
    expected = [
        f"disk protected {SIZE}",
        repr(CONTENT),
        "0 bytes were written since",
        "0 extents differ from the source",
    ]
    with Rig() as rig:
        rig.create(size=SIZE, content=CONTENT)
        rig.start()
        assert told(capsys, rig.store) == expected
        pwrite(rig.tap(), bytes(range(256)) * 16, 65536, sync=True)
        again = told(capsys, rig.store)
        rig.stop()
        assert told(capsys, rig.store) == again
    assert "snapshot before-upgrade" in again.pop(1)
    assert again == [*expected[:2], "4096 bytes were written since", expected[3]]


def test_errors_are_the_same_with_a_daemon_and_without(rig: Rig, tmp_path: Path) -> None:
    """Their classes and texts come through the socket."""
    with pytest.raises(NoStoreError), connect(tmp_path):
        pass
    with connect(rig.store) as asked:
        with pytest.raises(ExistsError) as exists:
            asked.take_snapshot("kept")
        with pytest.raises(InputError, match="is not within"):
            list(asked.read("disk", at="latest", offset=SIZE, length=1))
        with pytest.raises(NoSuchPointError):
            asked.moment("nowhere")
        assert asked.clones()["clones"][0]["name"] == "scratch"
        assert [volume["state"] for volume in asked.status()["volumes"]] == ["protected"]
    rig.stop()
    try:
        with connect(rig.store) as asked:
            with pytest.raises(ExistsError, match=re.escape(exists.value.message)):
                asked.take_snapshot("kept")
            with pytest.raises(NoSuchPointError):
                asked.moment("nowhere")
            with pytest.raises(StoreError, match="no daemon serves the store"):
                asked.create_clone("one")
    finally:
        rig.start()


def test_a_daemon_that_is_killed_is_an_error_of_the_control_interface(rig: Rig) -> None:
    """What was being asked ends with one; the next client has the store itself."""
    with connect(rig.store) as asked:
        parts = asked.read("disk", at="0s ago", offset=0, length=SIZE)
        next(parts)
        newest = asked.status()["volumes"][0]["newest"]["seq"]
        rig.kill()
        with pytest.raises(ControlError):
            asked.status()
        with pytest.raises(ControlError):
            list(parts)
    rig.start()
    with connect(rig.store) as asked:
        assert asked.status()["volumes"][0]["newest"]["seq"] >= newest
