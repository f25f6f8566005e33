"""A full disk, a read-only directory, a volume that cannot rename over a name: the last state stays, in one line.

The file systems are real ones, mounted for the test (that needs root on Linux); what no file system here can do is
a fault injection and says so. Whole runs on a disk that fills up: `tests/long/full_disk.py`.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import submit
from booster_soccer import errors
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.store import checkpoints
from booster_soccer.store.places import check_output_dir
from booster_soccer.store.replay import Replay, Segments
from booster_soccer.tracking import report

HIDDEN = 8
ARRAYS = {
    "actor.input.weight": np.full((HIDDEN, OBS_SIZE), 0.1, np.float32),
    "actor.input.bias": np.zeros(HIDDEN, np.float32),
    "actor.hidden.weight": np.full((HIDDEN, HIDDEN), 0.1, np.float32),
    "actor.hidden.bias": np.zeros(HIDDEN, np.float32),
    "actor.output.weight": np.full((12, HIDDEN), 0.1, np.float32),
    "actor.output.bias": np.zeros(12, np.float32),
}
OBS = np.linspace(-1, 1, 16 * OBS_SIZE, dtype=np.float32).reshape(16, OBS_SIZE)


def save(path: Path, steps: int) -> Path:
    """A checkpoint of about 60 KB."""
    more = {"optimizer": {"moments": np.full(12_000, steps, np.float32)}}
    return checkpoints.save(path, "converted", ARRAYS, OBS, {}, 0, steps, [], {}, more, overwrite=True)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def printed(capsys, main, *args) -> str:
    """What `errors.run` says: one line on stderr, exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        errors.run(main, *args)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@contextlib.contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[Path]:
    """Mount a file system at `place` for the test; skips it where that is not allowed."""
    place.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB: three checkpoints of `save` fit, four do not."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as place:
        yield place


@pytest.fixture
def read_only(tmp_path) -> Iterator[Path]:
    """A directory, with a checkpoint in it, on a file system that is read-only for root too."""
    source = tmp_path / "source"
    save(source / "run", 1)
    with mounted(tmp_path / "read-only", "--bind", str(source)) as place:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        yield place


# --- a full disk ----------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(small_disk, capsys):
    for steps in (1, 2):
        save(small_disk / "run", steps)
    (small_disk / "of somebody else").write_bytes(bytes(90_000))
    before = contents(small_disk)
    said = printed(capsys, save, small_disk / "run", 3)
    assert "No space left on device" in said and "the last one is kept" in said
    assert contents(small_disk) == before  # nothing half written is left, and nothing gone
    assert checkpoints.load_latest(small_disk / "run").manifest["steps"] == 2
    (small_disk / "of somebody else").unlink()
    save(small_disk / "run", 3)
    assert checkpoints.load(small_disk / "run").manifest["steps"] == 3


def test_a_full_disk_leaves_replay_segments_and_nothing_half_written(small_disk, capsys):
    segments, replay = Segments(small_disk / "replay"), Replay(30_000, {"reward": ()})
    replay.add(reward=np.ones(1000, np.float32))
    table = segments.write(replay)
    with contextlib.suppress(OSError), open(small_disk / "of somebody else", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = contents(small_disk)
    replay.add(reward=np.ones(29_000, np.float32))
    assert "No space left on device" in printed(capsys, segments.write, replay)
    assert "No space left on device" in printed(capsys, lambda: report.write_json({"x": 1}, small_disk / "x.json"))
    assert contents(small_disk) == before
    again = Replay(30_000, {"reward": ()})
    Segments(segments.directory).read(table, again, 1000)
    assert again.added == 1000


# --- a read-only place ----------------------------------------------------------------------------------


def test_a_read_only_place_is_refused_before_any_work(read_only, capsys):
    before = contents(read_only)
    for out in ("run", "new", "deep/new"):
        assert f"cannot write into {read_only}" in printed(capsys, check_output_dir, read_only / out)
        assert "Read-only file system" in printed(capsys, save, read_only / out, 2)
    assert checkpoints.load(read_only / "run").manifest["steps"] == 1
    assert "Read-only" in printed(capsys, report.finished, read_only / "x.json", {})
    assert "Read-only" in printed(capsys, submit.main, submit.Config(read_only / "run", read_only / "package"))
    replay = Replay(10, {"reward": ()})
    replay.add(reward=np.ones(5, np.float32))
    assert "Read-only" in printed(capsys, Segments(read_only / "replay").write, replay)
    assert contents(read_only) == before


# --- no rename over an existing name --------------------------------------------------------------------


def test_a_volume_that_cannot_rename_over_a_name(tmp_path, monkeypatch):
    """Fault injection: `os.rename` refuses an existing target, `os.replace` everything."""
    rename = os.rename

    def refuse(source, target, **_):
        if os.path.lexists(target):
            raise FileExistsError(17, "File exists", str(target))
        rename(source, target)

    def never(source, target, **_):
        raise PermissionError(1, "Operation not permitted", str(target))

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", never)
    for steps in (1, 2, 3, 4):
        save(tmp_path / "run", steps)
        assert checkpoints.load(tmp_path / "run").manifest["steps"] == steps
    assert checkpoints.load(tmp_path / "run.previous").manifest["steps"] == 3


def test_a_rename_that_fails_for_another_reason_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Fault injection: every rename fails."""
    for steps in (1, 2):
        save(tmp_path / "run", steps)

    def never(source, target, **_):
        raise PermissionError(1, "Operation not permitted", str(target))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="Operation not permitted; the last one is"):
        patch.setattr(os, "rename", never)
        save(tmp_path / "run", 3)
    assert checkpoints.load_latest(tmp_path / "run").manifest["steps"] == 2
    save(tmp_path / "run", 3)
    assert checkpoints.load(tmp_path / "run").manifest["steps"] == 3
