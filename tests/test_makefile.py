"""`make` from a checkout: needs are checked first, half an environment is made anew, and only its own is deleted.

A script stands for Python and notes what it is asked for.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_PYTHON = """#!/bin/bash
# Of the version in $VERSION; makes environments of itself, and "installs" unless it fails or make's shell is killed.
echo "$*" >> "$LOG"
case "$*" in
    *version_info*) exec {python} -c "import sys; sys.version_info = ($VERSION, 0); ${{2#import sys; }}" ;;
    "-m venv"*) new="${{@: -1}}"; rm -rf "$new"; mkdir -p "$new/bin"; touch "$new/pyvenv.cfg"; cp "$0" "$new/bin" ;;
    "-m pip install"*) test "$FAILS" = kill && kill -9 $PPID; test -z "$FAILS" ;;
    "chain.py"*) printf '%s\\n' "$@" > arguments; exit ${{STATUS:-0}} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    place = tmp_path / "my checkout"
    place.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place)
    python = tmp_path / "python"
    python.write_text(_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return place


def make(place: Path, *arguments: str, version: str = "3, 11", **environment: str) -> subprocess.CompletedProcess:
    environment = {"LOG": str(place.parent / "log"), "VERSION": version, "PATH": os.environ["PATH"]} | environment
    command = ["make", f"PYTHON={place.parent / 'python'}", *arguments]
    return subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True)


def asked(place: Path) -> str:
    """What Python was asked for since the last call."""
    log = place.parent / "log"
    said = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return said


@pytest.mark.parametrize("version", ["3, 10", "3, 13", "2, 7"])
def test_a_wrong_python_is_told_before_anything_is_loaded(checkout, version):
    done = make(checkout, "setup", version=version)
    assert done.returncode != 0 and "is not Python 3.11 or 3.12: give one" in done.stderr
    assert "pip" not in asked(checkout) and not (checkout / ".venv").exists()


def test_an_environment_is_made_once(checkout):
    assert make(checkout, "setup", version="3, 12").returncode == 0
    assert asked(checkout).count("pip install") == 2
    assert make(checkout, "setup").returncode == 0 and asked(checkout) == ""
    (checkout / "constraints.txt").touch()
    assert make(checkout, "setup").returncode == 0
    again = asked(checkout)
    assert again.count("pip install") == 2 and "-m venv" not in again


def test_half_an_environment_is_made_anew(checkout):
    """Cut short in the installation; without pip; and with a Python that has gone. What only failed goes on."""
    assert make(checkout, "setup", FAILS="yes").returncode != 0
    asked(checkout)
    assert make(checkout, "setup", FAILS="kill").returncode != 0
    assert "-m venv" not in asked(checkout)
    done = make(checkout, "setup")
    assert done.returncode == 0 and "an installation was cut short" in done.stdout
    assert "-m venv --clear .venv" in asked(checkout)

    (checkout / ".venv" / ".ready").unlink()
    python = checkout / ".venv" / "bin" / "python"
    whole = python.read_text()
    python.write_text(whole.replace('echo "$*"', 'test "$*" = "-m pip --version" && exit 1\necho "$*"'))
    assert make(checkout, "setup").returncode == 0 and "-m venv --clear .venv" in asked(checkout)

    python.unlink()
    python.symlink_to("/nowhere/python3.11")
    assert make(checkout, "setup").returncode == 0 and "-m venv --clear .venv" in asked(checkout)


@pytest.mark.parametrize("target", ["run", "resume"])
def test_a_run_with_a_seed_and_a_space_in_its_name(checkout, target):
    done = make(checkout, target, "SEED=3", "RUN=runs/my run", STATUS="143")
    arguments = (checkout / "arguments").read_text().splitlines()
    settings = ["--preset", "demo", "--seed", "3", "--out", "runs/my run"]
    assert arguments == ["chain.py", *settings, *["--resume"] * (target == "resume")]
    assert "to go on: make resume PRESET=demo SEED=3 RUN='runs/my run'" in done.stderr and done.returncode != 0
    assert "to go on" not in make(checkout, target).stderr


def test_clean_deletes_what_make_made_and_nothing_else(checkout):
    make(checkout, "setup")
    mine = [checkout / "runs" / "demo" / "x", checkout / "runs" / "__pycache__" / "y", checkout / "notes"]
    for path in (*mine, checkout / ".ruff_cache" / "x", checkout / "pkg" / "__pycache__" / "z"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert make(checkout, "clean").returncode == 0
    assert all(path.exists() for path in mine)
    assert not any((checkout / name).exists() for name in (".venv", ".ruff_cache", "pkg/__pycache__"))
    theirs = checkout / "theirs"
    theirs.mkdir()
    done = make(checkout, "clean", "VENV=theirs")
    assert done.returncode != 0 and "is no environment of Python's" in done.stderr and theirs.exists()
