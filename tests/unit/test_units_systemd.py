"""Claims about contrib/systemd: systemd understands the units, and the ways to use them that its README shows."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "contrib" / "systemd"
README = (FOLDER / "README.md").read_text()
GENERATOR = Path("/lib/systemd/system-generators/systemd-fstab-generator")
SYSTEM = Path("/lib/systemd/system")
INSTANCE = "backup-store"
PROGRAM = "/usr/local/bin/dmafs"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return a folder with our units as they would be installed, on a system where the program is."""
    folder = tmp_path / "units"
    folder.mkdir()
    for unit in FOLDER.glob("*.service"):
        text = unit.read_text()
        assert PROGRAM in text
        (folder / unit.name).write_text(text.replace(PROGRAM, "/bin/true"))
        wants = folder / "multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / unit.name.replace("@", f"@{INSTANCE}")).symlink_to(folder / unit.name)
    return folder


def analyze(units: Path, *names: str) -> str:
    """Return what systemd has to say about units, and about a start of the whole system with all that are installed."""
    command = [
        "systemd-analyze",
        "verify",
        "--man=no",
        *(str(units / name) for name in names),
        str(SYSTEM / "multi-user.target"),
    ]
    path = f"{units}:{units.parent / 'normal'}:{SYSTEM}"
    done = subprocess.run(
        command,
        env={**os.environ, "SYSTEMD_UNIT_PATH": path, "SYSTEMD_LOG_LEVEL": "warning"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "dmafs" in line or "cycle" in line or ".mount" in line]
    return "\n".join(ours) + (f"exit {done.returncode}" if done.returncode and ours else "")


@pytest.mark.parametrize(("name", "most"), [("dmafs", 3.5), ("dmafs-tap", 2.3)])
def test_the_units_are_hardened(units: Path, name: str, most: float) -> None:
    """What systemd says of how much they are exposed, from 0 to 10, is what our README says."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(units / f"{name}@.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    [exposure] = re.findall(r"Overall exposure level for .*: ([0-9.]+) ", done.stdout)
    assert 0 < float(exposure) <= most
    assert f"{most}" in README


@pytest.mark.parametrize("name", ["dmafs", "dmafs-tap"])
def test_systemd_understands_the_units(units: Path, name: str) -> None:
    """Each key and value is known."""
    assert analyze(units, f"{name}@{INSTANCE}.service") == ""


def test_what_systemd_does_not_understand_is_noticed(units: Path) -> None:
    """The check itself works."""
    unit = units / "dmafs@.service"
    unit.write_text(unit.read_text().replace("LockPersonality=yes", "LockPersonalty=yes"))
    assert "LockPersonalty" in analyze(units, f"dmafs@{INSTANCE}.service")


def fstab_lines() -> list[str]:
    return [line for block in re.findall(r"```fstab\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def generated(units: Path, fstab: str) -> str:
    """Make the units of an fstab, as at boot, and return the mount's."""
    file = units.parent / "fstab"
    file.write_text(fstab)
    folders = [units.parent / name for name in ("normal", "early", "late")]
    for folder in folders:
        folder.mkdir()
    subprocess.run([GENERATOR, *folders], env={**os.environ, "SYSTEMD_FSTAB": str(file)}, check=True, timeout=60)
    return (folders[0] / "data.mount").read_text()


@pytest.mark.parametrize("line", fstab_lines(), ids=["dm", "fuse"])
@pytest.mark.parametrize("nofail", [True, False])
def test_lines_of_fstab_make_an_order_that_can_be(units: Path, line: str, nofail: bool) -> None:  # noqa: FBT001
    """The mount requires the unit and comes after it, also where the machine waits for it: there is no cycle."""
    text = generated(units, line if nofail else line.replace(",nofail", ""))
    [required] = re.findall(r"x-systemd.requires=([^,\s]+)", line)
    assert f"Requires={required}" in text
    assert re.search(rf"^After=.*{re.escape(required)}", text, re.MULTILINE)
    assert ("Before=local-fs.target" in text) is not nofail
    assert analyze(units, f"dmafs@{INSTANCE}.service", f"dmafs-tap@{INSTANCE}.service") == ""


@pytest.mark.parametrize("name", ["dmafs", "dmafs-tap"])
@pytest.mark.parametrize("change", [("DefaultDependencies=no\n", ""), ("UMask=0077", "PrivateTmp=yes")])
def test_a_cycle_would_be_noticed(units: Path, name: str, change: tuple[str, str]) -> None:
    """With the usual dependencies of a service, or those of a private /tmp, the order can't be."""
    unit = units / f"{name}@.service"
    unit.write_text(unit.read_text().replace(*change))
    generated(units, fstab_lines()[0].replace(",nofail", ""))
    assert "cycle" in analyze(units)


def test_the_disk_goes_before_the_daemon_and_the_tap_last(units: Path) -> None:
    """On the way down the order is reversed: the mount is after the daemon, the daemon after the tap."""
    text = generated(units, fstab_lines()[0])
    assert re.search(rf"^After=dmafs@{INSTANCE}.service", text, re.MULTILINE)
    assert "After=dmafs-tap@%i.service" in (FOLDER / "dmafs@.service").read_text()
    for unit in FOLDER.glob("*.service"):
        assert "Conflicts=shutdown.target" in unit.read_text(), "without it nothing stops the unit"


def test_the_daemon_has_no_mounts_of_its_own() -> None:
    """No setting of its unit hides its tree from others."""
    keys = set(re.findall(r"^(\w+)=", (FOLDER / "dmafs@.service").read_text(), re.MULTILINE))
    hiding = r"Private(Tmp|Devices|Mounts)|ProtectSystem|ProtectHome|ProtectKernel.*|ProtectControlGroups|ProtectProc"
    assert not [
        key for key in keys if re.fullmatch(rf"{hiding}|.*Paths|.*Directory|TemporaryFileSystem|MountFlags", key)
    ]


def test_the_readme_tells_of_both_units() -> None:
    """Each unit is in the README's table, and the instance is the one that systemd makes of the example's path."""
    for unit in FOLDER.glob("*.service"):
        assert f"| `{unit.name}` |" in README
    done = subprocess.run(
        ["systemd-escape", "--path", "/backup/store"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == INSTANCE
