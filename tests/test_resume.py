"""Going on exactly: replay segments, random generators, SIGTERM, and a broken lane.

The life cycle of a run, with a toy learner: `test_run.py`; runs that are killed: `test_sac.py`, `test_finetune.py`.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from booster_soccer.arrays import restore_rng, rng_array
from booster_soccer.errors import UserError
from booster_soccer.store.replay import Replay, Segments
from booster_soccer.store.signals import StopSignal

ROOT = Path(__file__).parents[1]
SHAPES = {"obs": (3,), "reward": ()}


def rows(first: int, last: int) -> dict[str, np.ndarray]:
    number = np.arange(first, last, dtype=np.float32)
    return {"obs": np.stack([number, number + 0.5, -number], axis=1), "reward": number}


def filled(capacity: int, added: int) -> Replay:
    replay = Replay(capacity, SHAPES)
    for first in range(0, added, 4):
        replay.add(**rows(first, min(first + 4, added)))
    return replay


def assert_same(a: Replay, b: Replay) -> None:
    assert (a.added, len(a)) == (b.added, len(b))
    for name, values in a.arrays.items():
        assert values.tobytes() == b.arrays[name].tobytes(), name


# --- replay segments ----------------------------------------------------------------------------------


def test_the_ring_keeps_the_newest_rows_at_their_places():
    replay = filled(10, 23)  # rows 13 to 22; row r lies at r modulo 10
    np.testing.assert_array_equal(replay.arrays["reward"], [20, 21, 22, 13, 14, 15, 16, 17, 18, 19])
    np.testing.assert_array_equal(replay.rows(20, 23)["reward"], [20, 21, 22])


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(capacity=st.integers(4, 40), saves=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_segments_bring_the_ring_back(tmp_path_factory, capacity, saves):
    segments = Segments(tmp_path_factory.mktemp("run") / "replay")
    replay, added, tables = Replay(capacity, SHAPES), 0, []
    for more in saves:
        for first in range(added, added + more, 4):
            replay.add(**rows(first, min(first + 4, added + more)))
        added += more
        tables = [*tables[-1:], segments.write(replay)]
        segments.delete_all_but(*tables)
    again = Replay(capacity, SHAPES)
    Segments(segments.directory).read(tables[-1], again, added)
    assert_same(again, replay)


def test_a_save_writes_only_what_was_added_and_keeps_what_two_saves_need(tmp_path, monkeypatch):
    monkeypatch.setattr("booster_soccer.store.replay.SEGMENT_ROWS", 8)
    segments, replay = Segments(tmp_path / "replay"), Replay(20, SHAPES)

    def save(added: int) -> dict:
        replay.add(**rows(replay.added, added))
        return segments.write(replay)

    def files() -> list[tuple[int, int]]:
        return sorted(tuple(map(int, path.stem.split("-"))) for path in segments.directory.iterdir())

    first = save(12)
    before = {path: path.stat().st_mtime_ns for path in segments.directory.iterdir()}
    assert files() == [(0, 8), (8, 12)]
    second = save(30)  # rows 10 to 29 are left
    assert files() == [(0, 8), (8, 12), (12, 20), (20, 28), (28, 30)]  # none goes over the ring's end
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    (segments.directory / "notes.txt").write_text("mine")
    segments.delete_all_but(first, second)
    assert len(list(segments.directory.iterdir())) == 6
    segments.delete_all_but(second)
    (segments.directory / "notes.txt").unlink()
    assert files() == [(8, 12), (12, 20), (20, 28), (28, 30)]
    # A run that goes on from the first save writes over what a lost one left.
    left = segments.directory / "000000000012-000000000016.safetensors"
    left.write_bytes(b"half written")
    again, other = Replay(20, SHAPES), Segments(segments.directory)
    other.read(second, again, 30)
    again.add(**rows(30, 33))
    other.read(other.write(again), filled(20, 0), 33)


def test_damaged_segments_are_refused(tmp_path):
    segments = Segments(tmp_path / "replay")
    table = segments.write(filled(20, 12))
    (path,) = segments.directory.iterdir()
    good = path.read_bytes()
    for content in (b"", good[:-1], good[:8], bytes([*good[:-1], good[-1] ^ 1])):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged: give --resume-buffer refill"):
            segments.read(table, Replay(20, SHAPES), 12)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        segments.read(table, Replay(20, SHAPES), 12)
    path.write_bytes(good)
    for shapes in ({"obs": (4,), "reward": ()}, {"obs": (3,)}):
        with pytest.raises(UserError, match="other arrays"):
            segments.read(table, Replay(20, shapes), 12)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    segments, replay = Segments(tmp_path / "replay"), filled(20, 12)
    table = segments.write(replay)
    replay.add(**rows(12, 15))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device; free space"):
        patch.setattr(os, "fsync", full)
        segments.write(replay)
    assert len(list(segments.directory.iterdir())) == 1
    again = Replay(20, SHAPES)
    segments.read(table, again, 12)
    assert_same(again, filled(20, 12))


@pytest.mark.parametrize(
    "change",
    [
        {"first": np.array([0.0])},
        {"first": np.array([[0]])},
        {"first": np.array([3])},
        {"first": np.array([-1])},
        {"last": np.array([11])},
        {"last": np.array([2**62])},
        {"first": np.array([0, 12]), "last": np.array([12, 12])},
        {"sha256": np.zeros((1, 31), np.uint8)},
        {"sha256": np.zeros((0, 32), np.uint8)},
        {"more": np.zeros(1)},
    ],
)
def test_a_wrong_table_is_refused(tmp_path, change):
    segments = Segments(tmp_path / "replay")
    table = segments.write(filled(20, 12))
    with pytest.raises(UserError, match="not whole"):
        segments.read(table | change, Replay(20, SHAPES), 12)


# --- random generators --------------------------------------------------------------------------------


def test_a_random_generator_goes_on():
    rng, other = np.random.default_rng(1), np.random.default_rng(2)
    rng.integers(0, 5, 3, dtype=np.int32)  # leaves half a draw behind
    restore_rng(other, rng_array(rng))
    assert other.bit_generator.state == rng.bit_generator.state


# --- SIGTERM ------------------------------------------------------------------------------------------

_PROGRAM = """
import ctypes, sys, time
from booster_soccer.store import signals
signals._DEADLINE_S = 1.0
with signals.StopSignal() as stop:
    print("ready", flush=True)
    {body}
sys.exit(signals.STOPPED if stop.received else 0)
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("while not stop.received: time.sleep(0.01)\n    print('saved')", "saved"),
        # Code that does not look, as a compiler.
        ("while True: ctypes.CDLL(None).sleep(60)", "out of time"),
        ("try:\n        with stop.interrupting(): time.sleep(60)\n    except signals.Stopped: print('saved')", "saved"),
        # What is closed after the state is saved takes too long.
        (
            "while not stop.received: time.sleep(0.01)\n    import atexit; atexit.register(time.sleep, 60)\n"
            "    print('saved', flush=True)\n    raise SystemExit(signals.STOPPED)",
            "out of time",
        ),
    ],
)
def test_sigterm_ends_a_run_in_time_with_its_own_status(body, says):
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.format(body=body)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert says in output
    assert process.returncode == 143


def test_the_handler_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.received:
            time.sleep(0.001)
    assert signal.getsignal(signal.SIGTERM) == before


# --- whole runs ---------------------------------------------------------------------------------------


def test_a_broken_lane_is_reset_and_counted_and_the_others_do_not_notice():
    """NaN in one lane's physics: the other lanes' states stay the same to the bit, with randomised physics."""
    import jax

    from booster_soccer.agents.sac import Sac, SacConfig
    from booster_soccer.envs.tasks import Tasks
    from booster_soccer.rollout.collect import CollectConfig, NativeLoop, Statistics

    config = CollectConfig(num_envs=5, buffer_size=64, max_actions=8, dr_level=1)
    learner = Sac(SacConfig())
    state = learner.init(jax.random.key(0))
    loop, untouched = NativeLoop(config, learner, Tasks(), seed=0, state=state), None
    start = loop.arrays()
    trajectories, sums = [], []
    for broken in (None, 3):
        statistics = Statistics()
        trajectory = []
        for step in range(20):
            if step == 5 and broken is not None:
                loop.engine.state[broken, 12] = np.nan
            loop.iterate(state, False, statistics)  # the learner stays as it is
            untouched = np.arange(5) != 3
            seen = loop.lanes.critic_obs
            trajectory.append([np.array(x)[untouched] for x in (loop.engine.state, loop.engine.sensordata, seen)])
            assert np.isfinite(loop.engine.state).all() and np.isfinite(seen).all()
        trajectories.append(trajectory)
        sums.append(statistics.take())
        loop.restore(start, Replay(64, {name: values.shape[1:] for name, values in loop.replay.arrays.items()}))
    loop.close()
    assert [line["diverged"] for line in sums] == [0, 1]
    for a, b in zip(*trajectories):
        for x, y in zip(a, b):
            assert x.tobytes() == y.tobytes()
