"""A run kept on a volume that is no disk: whole or not at all, whatever it is killed at."""

import json
import os
import shutil
from pathlib import Path

import pytest

from booster_soccer.store import checkpoints
from cloud.volume import Mirror, VolumeError, listing, publish
from tests import small_checkpoints
from tests.volume_stub import Guard, Killed, mounted


def write(directory: Path, files: dict[str, str]) -> None:
    """New files in place of old ones, as the store writes them."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(content)


def content(directory: Path) -> dict[str, str]:
    return {name: (directory / name).read_text() for name in listing(directory)}


FIRST = {"run.resume/manifest.json": "m1", "run.resume/arrays": "a" * 1000, "run.metrics.jsonl": "1\n"}
SECOND = {"run.resume/manifest.json": "m2", "run.resume/arrays": "b" * 1000, "run.resume.previous/arrays": "a" * 1000}


@pytest.fixture
def places(tmp_path):
    return tmp_path / "disk" / "run", tmp_path / "volume" / "run"


def elsewhere(tmp_path: Path, volume: Path) -> tuple[Mirror, int]:
    """The run on another machine's empty disk."""
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    mirror = Mirror(tmp_path / "other" / "run", volume)
    return mirror, mirror.restore()


def test_a_run_goes_on_elsewhere_as_it_was_saved(places, tmp_path):
    local, volume = places
    with Guard(volume).active():
        mirror = Mirror(local, volume)
        assert mirror.restore() == 0 and listing(local) == {}
        write(local, FIRST)
        assert mirror.save() and not mirror.save()  # the second time there is nothing new
        with open(local / "run.metrics.jsonl", "a") as log:
            log.write("2\n")
        write(local, SECOND)
        assert mirror.save()
        other, number = elsewhere(tmp_path, volume)
        assert number == 2 and content(other.local) == FIRST | SECOND | {"run.metrics.jsonl": "1\n2\n"}
        assert not other.save()
        shutil.rmtree(other.local / "run.resume.previous")
        assert other.save() and "run.resume.previous/arrays" not in content(elsewhere(tmp_path, volume)[0].local)


def test_what_is_there_already_is_not_copied_again_and_what_nobody_needs_goes(places):
    local, volume = places
    mirror = Mirror(local, volume)
    write(local, {"segment": "s" * 5000, "state": "0"})
    mirror.save()
    before = {path.name: path.stat().st_mtime_ns for path in (volume / "files").iterdir()}
    for state in "123":
        write(local, {"state": state})
        mirror.save()
    after = {path.name: path.stat().st_mtime_ns for path in (volume / "files").iterdir()}
    assert before.items() & after.items() and len(after) == 3  # the segment once, the two newest states
    assert len(list((volume / "snapshots").iterdir())) == 2


def test_killed_at_any_moment_of_a_save_one_whole_state_is_there(places, tmp_path):
    local, volume = places
    at, seen = 1, set()
    while True:
        shutil.rmtree(tmp_path, ignore_errors=True)
        mirror = Mirror(local, volume)
        write(local, FIRST)
        mirror.save()
        write(local, {"old": "o"})
        mirror.save()
        write(local, SECOND)
        (local / "old").unlink()
        try:
            with Guard(volume, die_at=at).active():
                mirror.save()
            finished = True
        except Killed:
            finished = False
        other, number = elsewhere(tmp_path, volume)
        assert content(other.local) == (FIRST | {"old": "o"} if number == 2 else FIRST | SECOND)
        seen.add(number)
        write(other.local, SECOND | {"next": "n"})  # and the next save is whole, whatever the killed one left
        other.save()
        expected = content(other.local)
        assert content(elsewhere(tmp_path, volume)[0].local) == expected
        if finished:
            break
        at += 1
    assert seen == {2, 3} and at > 6


def test_a_damaged_snapshot_gives_way_to_the_one_before_and_is_mended(places, tmp_path, capsys):
    local, volume = places
    mirror = Mirror(local, volume)
    write(local, FIRST)
    mirror.save()
    write(local, SECOND)
    mirror.save()
    newest = json.loads((volume / "snapshots" / "00000002.json").read_text())["files"]
    digest, size = newest["run.resume/arrays"]
    (volume / "files" / digest).write_text("x" * size)
    other, number = elsewhere(tmp_path, volume)
    assert number == 1 and content(other.local) == FIRST
    assert "snapshot 2" in capsys.readouterr().out
    write(other.local, SECOND)
    other.save()
    assert elsewhere(tmp_path, volume)[1] == 3
    for path in (volume / "snapshots").iterdir():
        path.write_text(path.read_text()[:-5])
    with pytest.raises(VolumeError, match="no snapshot in .* is whole: choose another run name"):
        elsewhere(tmp_path, volume)


def test_a_disk_that_is_newer_than_the_volume_stays(places, tmp_path):
    """The task was killed between two saves, and is tried again on the same machine."""
    local, volume = places
    mirror = Mirror(local, volume)
    write(local, FIRST)
    mirror.save()
    write(local, SECOND)
    assert Mirror(local, volume).restore() == 1 and content(local)["run.resume/manifest.json"] == "m2"
    other, _ = elsewhere(tmp_path, volume)  # but another machine has gone on meanwhile
    write(other.local, {"run.resume/manifest.json": "m3"})
    other.save()
    assert Mirror(local, volume).restore() == 2 and content(local)["run.resume/manifest.json"] == "m3"


def test_a_state_that_moves_while_it_is_listed_is_listed_again(places, monkeypatch):
    local, volume = places
    write(local, FIRST)
    link, moved = os.link, []

    def move_once(source, target):
        if not moved:
            moved.append(True)
            os.rename(local / "run.resume", local / "run.resume.previous")
            write(local, {"run.resume/manifest.json": "m2", "run.resume/arrays": "b"})
        link(source, target)

    monkeypatch.setattr(os, "link", move_once)
    Mirror(local, volume).save()
    [snapshot] = (volume / "snapshots").iterdir()
    assert set(json.loads(snapshot.read_text())["files"]) == set(content(local)) and moved


def test_results_lie_as_plain_files_without_the_state(tmp_path):
    local, target = tmp_path / "run", tmp_path / "volume" / "run"
    write(local, FIRST | SECOND | {"pretrain/manifest.json": "m", "pretrain/arrays": "a", "gates.json": "{}"})
    with Guard(tmp_path / "volume").active():
        publish(local, target)
        assert content(target) == {
            "pretrain/manifest.json": "m", "pretrain/arrays": "a", "gates.json": "{}", "run.metrics.jsonl": "1\n"
        }  # fmt: skip
        write(local, {"pretrain/arrays": "b"})
        publish(local, target)
        assert content(target)["pretrain/arrays"] == "b" and content(target)["pretrain/manifest.json"] == "m"


def test_a_published_directory_has_no_manifest_until_it_is_whole(tmp_path):
    local, volume = tmp_path / "run", tmp_path / "volume"
    write(local, {"pretrain/manifest.json": "m", "pretrain/arrays": "a", "pretrain/zeros": "z"})
    publish(local, volume)
    write(local, {"pretrain/arrays": "b", "pretrain/zeros": "y"})
    for at in range(1, 20):
        try:
            with Guard(volume, die_at=at).active():
                publish(local, volume)
            break
        except Killed:
            there = content(volume)
            new = there.get("pretrain/arrays") == "b" and there.get("pretrain/zeros") == "y"
            old = there.get("pretrain/arrays") == "a" and there.get("pretrain/zeros") == "z"
            assert new or old or "pretrain/manifest.json" not in there
    assert content(volume) == content(local) and at > 4


def check_checkpoints(tmp_path: Path, mirror: Mirror, volume: Path) -> None:
    """One of ours, saved by a run, loads on another machine's disk, and from the results as they lie on the volume."""
    small_checkpoints.save(mirror.local / "policy", stage="converted")
    assert mirror.save()
    publish(mirror.local, volume / "results")
    other, _ = elsewhere(tmp_path, volume / "runs" / "run")
    places = mirror.local, other.local, volume / "results"
    assert len({checkpoints.load(place / "policy").hash for place in places}) == 1


def test_a_real_checkpoint_on_a_volume(tmp_path):
    volume = tmp_path / "volume"
    with Guard(volume).active():
        mirror = Mirror(tmp_path / "disk" / "run", volume / "runs" / "run")
        mirror.restore()
        check_checkpoints(tmp_path, mirror, volume)


def check_refusals(volume: Path) -> None:
    """What is no disk refuses to rename, to link, to append and to write in the middle."""
    (volume / "a").write_text("a")
    for move in (os.rename, os.replace, os.link):
        with pytest.raises(OSError):
            move(volume / "a", volume / "b")
    for mode in ("ab", "r+b"):
        with pytest.raises(OSError), (volume / "a").open(mode):
            pass


def test_the_stand_in_refuses_what_a_volume_refuses(tmp_path):
    with Guard(tmp_path).active():
        check_refusals(tmp_path)


def test_on_a_fuse_file_system(tmp_path):
    """The same restrictions, made by the kernel; each write takes a while."""
    with mounted(tmp_path / "backing", tmp_path / "volume", 0.01) as volume:
        check_refusals(volume)
        mirror = Mirror(tmp_path / "disk" / "run", volume / "runs" / "run")
        assert mirror.restore() == 0
        for files in (FIRST, SECOND, {"large": "l" * 3_000_000}):
            write(mirror.local, files)
            assert mirror.save()
        publish(mirror.local, volume / "results")
        other, number = elsewhere(tmp_path, volume / "runs" / "run")
        assert number == 3 and content(other.local) == content(mirror.local) == FIRST | SECOND | {
            "large": "l" * 3_000_000
        }
        assert (volume / "results" / "large").stat().st_size == 3_000_000
        check_checkpoints(tmp_path, mirror, volume)
