"""The scripts that shells complete with: bash's is tried, of all it is known that they name every command."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from dmafs.cli.completion import SHELLS
from dmafs.cli.main import main, parser


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def commands() -> list[str]:
    found = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return list(found.choices)


def completed(script: Path, folder: Path, *words: str) -> set[str]:
    """Return what bash offers for the last word, in a folder."""
    quoted = " ".join(f"'{word}'" for word in words)
    program = f"""
        source {script}
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        $(complete -p dmafs | grep -o -- '-F [^ ]*' | cut -c 4-) dmafs '{words[-1]}' '{words[-2]}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_in_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For each shell."""
    text = script(shell, capsys)
    assert len(commands()) > 15
    for name in commands():
        assert name in text


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands, their options, values and folders, the last but not files where a folder is meant."""
    file, folder = tmp_path / "script", tmp_path / "here"
    file.write_text(script("bash", capsys))
    (folder / "stores").mkdir(parents=True)
    (folder / "storm").touch()
    assert completed(file, folder, "dmafs", "sn") == {"snapshot"}
    assert completed(file, folder, "dmafs", "thin", "--d") == {"--dry-run"}
    assert completed(file, folder, "dmafs", "completion", "z") == {"zsh"}
    assert completed(file, folder, "dmafs", "status", "sto") == {"stores"}
    assert completed(file, folder, "dmafs", "create", "--source", "sto") == {"stores", "storm"}


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With those that there are."""
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "csh"])
    assert "bash" in capsys.readouterr().err
