"""The short cut of `tests/long/fuzz.py`, and whether its watch sees what it is there to see."""

import pickle
import random
import subprocess
import sys

import pytest

from booster_soccer.store import manifests
from tests.long import fuzz


def test_hostile_inputs_do_no_harm():
    counts = fuzz.main(fuzz.Config(examples=200))
    assert counts.pop("info") == 40 and set(counts.values()) == {20}


@pytest.mark.parametrize(
    "act",
    [
        lambda place: open(place.parent / "outside", "w").close(),
        lambda place: open("/etc/hostname").close(),
        lambda place: subprocess.run([sys.executable, "-c", ""]),
        lambda place: pickle.loads(pickle.dumps(subprocess.run)),
    ],
)
def test_the_watch_sees_harm(tmp_path, act):
    sys.addaudithook(fuzz._audit)
    (tmp_path / "inside").mkdir()
    with pytest.raises(AssertionError), fuzz.watched(tmp_path / "inside"):
        act(tmp_path / "inside")
    with fuzz.watched(tmp_path / "inside"):
        (tmp_path / "inside" / "file").write_text("allowed")


def test_a_loader_without_checksums_is_found_out(tmp_path, monkeypatch):
    attacks = fuzz.Attacks(tmp_path)
    monkeypatch.setattr(manifests, "read_content", lambda path, manifest, name: (path / name).read_bytes())
    with pytest.raises(AssertionError, match="loaded with changed bytes"):
        for number in range(100):
            attacks.bytes(random.Random(number))
