"""Nothing is overwritten and nothing lost, wherever a save is interrupted."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from booster_soccer.errors import UserError
from booster_soccer.store import checkpoints, places
from tests.small_checkpoints import FILES, OPTIMIZER, contents, one_line, save


@pytest.fixture
def copy(tmp_path) -> Path:
    """A checkpoint to work on."""
    return save(tmp_path / "run")


# --- nothing is overwritten, nothing is lost ------------------------------------------------------------


def test_overwrite_keeps_the_previous_one_and_no_more(tmp_path):
    path = tmp_path / "run"
    for steps in (1, 2, 3):
        assert save(path, steps, overwrite=True) == path
    assert checkpoints.load(path).manifest["steps"] == 3
    assert checkpoints.load(tmp_path / "run.previous").manifest["steps"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.previous"]


def test_without_overwrite_a_checkpoint_stays(copy):
    before = contents(copy.parent)
    assert "already holds a checkpoint" in one_line(save, copy, steps=2)
    assert contents(copy.parent) == before


def test_an_empty_directory_and_a_link_to_one_are_used(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link")
    save(tmp_path / "link", steps=2, overwrite=True)
    assert checkpoints.load_latest(tmp_path / "link").manifest["steps"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real", "real.previous"]


@pytest.mark.parametrize("name", ["run", "run.previous", "run.writing", "run.broken"])
@pytest.mark.parametrize("content", ["notes.txt", "manifest.json", "deep/arrays.safetensors", None])
def test_something_else_is_never_touched(copy, name, content):
    place = copy.parent / name
    if place.exists():
        shutil.rmtree(place)
    if content is None:
        place.write_text("a file")
    else:
        (place / content).parent.mkdir(parents=True)
        (place / content).write_text("[]")
        (place / "notes.txt").write_text("mine")
    before = contents(copy.parent)
    for overwrite in (False, True):
        assert f"{place} holds something else" in one_line(save, copy, steps=2, overwrite=overwrite)
    assert f"{place} holds something else" in one_line(places.check_output_dir, copy)
    assert contents(copy.parent) == before


def test_weights_of_somebody_else_are_never_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"theirs")
    assert "something else" in one_line(save, tmp_path / "run", overwrite=True)
    assert contents(tmp_path) == {"run/model.safetensors": b"theirs"}


def test_another_stage_and_the_parent_are_never_overwritten(tmp_path):
    path = save(tmp_path / "run", stage="converted")
    before = contents(tmp_path)
    assert "'converted'" in one_line(save, path, stage="finetuned", overwrite=True)
    parent = checkpoints.load(path)
    assert "starts from" in one_line(save, path, steps=2, overwrite=True, parents=[parent])
    assert contents(tmp_path) == before


def test_check_output_dir(copy, tmp_path, monkeypatch):
    places.check_output_dir(copy)
    places.check_output_dir(tmp_path / "not" / "yet")
    places.check_output_dir(tmp_path / "run" / "inside")
    (tmp_path / "file").write_text("x")
    assert "cannot write into" in one_line(places.check_output_dir, tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)  # a read-only volume, also for root
    assert f"cannot write into {tmp_path}" in one_line(places.check_output_dir, tmp_path / "not" / "yet")


@pytest.mark.parametrize("name", ["optimizer.safetensors", "arrays", "golden", "../x", "Manifest", ""])
def test_names_of_extra_arrays(tmp_path, name):
    with pytest.raises(ValueError, match="extra_arrays"):
        save(tmp_path / "run", extra_arrays={name: OPTIMIZER})
    assert list(tmp_path.iterdir()) == []


# --- load_latest ----------------------------------------------------------------------------------------


def test_a_broken_newest_is_reported_and_the_one_before_used(tmp_path, capsys):
    path = tmp_path / "run"
    for steps in (1, 2):
        save(path, steps, overwrite=True)
    assert checkpoints.load_latest(path).manifest["steps"] == 2
    assert capsys.readouterr().err == ""
    (path / "arrays.safetensors").write_bytes(b"torn")
    assert checkpoints.load_latest(path, ("converted",)).manifest["steps"] == 1
    warned = capsys.readouterr().err
    assert warned.startswith("warning: ") and warned.count("\n") == 1
    assert "arrays.safetensors is damaged" in warned and "more:" not in warned

    # The next save sets the broken one aside, and does not lose the one that was used.
    save(path, 3, overwrite=True)
    assert [checkpoints.load(tmp_path / name).manifest["steps"] for name in ("run", "run.previous")] == [3, 1]
    assert (tmp_path / "run.broken" / "arrays.safetensors").read_bytes() == b"torn"


@pytest.mark.parametrize("damage", ["missing", "no manifest", "empty manifest"])
def test_a_newest_without_manifest(tmp_path, capsys, damage):
    path = tmp_path / "run"
    for steps in (1, 2):
        save(path, steps, overwrite=True)
    if damage == "missing":
        shutil.rmtree(path)
    else:
        (path / "manifest.json").unlink()
    if damage == "empty manifest":
        (path / "manifest.json").touch()
    assert checkpoints.load_latest(path).manifest["steps"] == 1
    assert "warning" in capsys.readouterr().err
    places.check_output_dir(path)
    save(path, 3, overwrite=True)
    assert [checkpoints.load(tmp_path / name).manifest["steps"] for name in ("run", "run.previous")] == [3, 1]


def test_none_usable_is_an_error(tmp_path):
    path = tmp_path / "run"
    assert "not there" in one_line(checkpoints.load_latest, path)
    for steps in (1, 2):
        save(path, steps, overwrite=True)
    (path / "arrays.safetensors").write_bytes(b"torn")
    (tmp_path / "run.previous" / "golden.safetensors").unlink()
    message = one_line(checkpoints.load_latest, path)
    assert "arrays.safetensors is damaged" in message and "golden.safetensors is missing" in message


# --- interrupted anywhere -------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the code under test runs after it."""


class Interrupter:
    """Counts every change that `checkpoints` makes on disk, and stops before a given one."""

    def __init__(self, monkeypatch, stop_before: int, error: BaseException, can_rename: bool):
        self.count, self.stop_before, self.error = 0, stop_before, error
        for name in ("rename", "unlink", "rmdir", "mkdir", "makedirs", "fsync"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name), name, can_rename))
        write = places.write_file

        def torn_write(path: Path, content: bytes) -> None:
            if self.count + 1 == self.stop_before:
                path.write_bytes(content[: len(content) // 2])
            self.tick()
            write(path, content)

        for module in (checkpoints, places):
            monkeypatch.setattr(module, "write_file", torn_write)

    def tick(self) -> None:
        self.count += 1
        if self.count == self.stop_before:
            raise self.error

    def counted(self, function: Callable, name: str, can_rename: bool) -> Callable:
        def call(*args, **kwargs):
            self.tick()
            if name == "rename":
                assert not os.path.lexists(args[1]), "a rename over an existing name"
                if not can_rename:
                    raise OSError(errno.EXDEV, "Invalid cross-device link")
            if name == "fsync":
                return None  # slow, and no kill can tell
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("can_rename", [True, False])
@pytest.mark.parametrize(
    ("error", "newest"),
    [
        (Killed(), "whole"),
        (Killed(), "damaged"),
        (OSError(errno.ENOSPC, "No space left on device"), "whole"),
    ],
)
def test_an_interruption_anywhere_loses_nothing(tmp_path, monkeypatch, capsys, can_rename, error, newest):
    before = tmp_path / "before"
    for steps in (1, 2):
        save(before / "run", steps, overwrite=True)
    usable = 2
    if newest == "damaged":
        (before / "run" / "optimizer.safetensors").write_bytes(b"torn")
        usable = 1
    for name in ("run", "run.previous"):  # what a user may have put there
        (before / name / "a_report").mkdir()
        (before / name / "a_report" / "curves.txt").write_text("x")
        (before / name / "notes.txt").write_text("x")
    stop_before, finished = 0, False
    while not finished:
        stop_before += 1
        path = Path(shutil.copytree(before, tmp_path / str(stop_before))) / "run"
        with monkeypatch.context() as patch:
            Interrupter(patch, stop_before, error, can_rename)
            try:
                save(path, 3, overwrite=True)
                finished = True
            except Killed:
                pass
            except UserError as refused:
                assert str(refused).startswith("cannot write checkpoint") and "No space left" in str(refused)
        for manifest in path.parent.glob("*/manifest.json"):  # the mark of a complete directory
            assert {p.name for p in manifest.parent.iterdir()} >= set(FILES)
        kept = checkpoints.load_latest(path).manifest["steps"]
        assert kept == 3 if finished else kept in (usable, 3)
        with monkeypatch.context() as patch:
            Interrupter(patch, 0, error, can_rename)
            save(path, 4, overwrite=True)
        assert checkpoints.load(path).manifest["steps"] == 4
        assert checkpoints.load(path.with_name("run.previous")).manifest["steps"] == kept
        assert not path.with_name("run.writing").exists()
    assert stop_before > 10


def test_a_first_save_interrupted_is_done_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Interrupter(patch, 6, Killed(), can_rename=True)
        with pytest.raises(Killed):
            save(tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run.writing"]
    save(tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_the_last_one(copy):
    before = contents(copy.parent)
    large = {"replay": {"obs": np.zeros(100_000, np.float32)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a real write that stops half-way
    try:
        message = one_line(save, copy, steps=2, overwrite=True, extra_arrays=large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message and "free space" in message
    assert contents(copy.parent) == before


def test_a_read_only_directory_is_one_clear_line(copy):
    before = contents(copy.parent)
    copy.parent.chmod(0o555)
    modes = {p: p.stat().st_mode for p in copy.parents}
    private = [p for p in copy.parents if p.stat().st_uid == os.getuid() and not modes[p] & 0o005]
    for p in private:
        p.chmod(0o755)
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 0)  # root may write anywhere
    try:
        written = one_line(save, copy, steps=2, overwrite=True)
        checked = one_line(places.check_output_dir, copy)
    finally:
        if os.getuid() == 65534:
            os.setresuid(0, 0, 0)
        copy.parent.chmod(0o755)
        for p in private:
            p.chmod(modes[p])
    assert "Permission denied" in written and "make the place writable" in written
    assert f"cannot write into {copy.parent}" in checked
    assert contents(copy.parent) == before


def test_a_name_too_long_is_one_clear_line(tmp_path):
    assert "File name too long" in one_line(save, tmp_path / ("x" * 300))


def test_an_unreadable_checkpoint_is_one_clear_line(copy, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert "Permission denied" in one_line(checkpoints.load, copy)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", refuse)
        assert "Permission denied" in one_line(checkpoints.load, copy)
