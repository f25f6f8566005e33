"""`--engine auto`: which engine a run takes, what it says and records, and that timing leaves no trace."""

import gc
import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest

import train_mjx_sac as train
from booster_soccer.rollout import engines
from booster_soccer.rollout.collect import NativeLoop
from booster_soccer.store import checkpoints
from tests.small_pretraining import COLLECT, LANES, RECORDS, Still, config, no_judge


@pytest.fixture(autouse=True)
def judge_is_quick(monkeypatch):
    monkeypatch.setattr(train, "judge", no_judge)


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU, with loops that collect nothing."""
    monkeypatch.setattr(train, "platform", lambda: "gpu")
    for loop in ("NativeLoop", "MjxLoop"):
        monkeypatch.setattr(train, loop, type(loop, (Still,), {"NAN_FROM": 10**9}))


def speeds(monkeypatch, **of_engine: float) -> None:
    """Give each engine a speed instead of timing it."""
    by_loop = {"NativeLoop": of_engine["native"], "MjxLoop": of_engine["mjx"]}
    monkeypatch.setattr(engines, "steps_per_s", lambda loop, _: by_loop[type(loop).__name__])


def no_timing(*_):
    pytest.fail("an engine was timed")


def test_without_a_gpu_native_is_taken_untimed_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "steps_per_s", no_timing)
    monkeypatch.setattr(train, "NativeLoop", Still)
    result = checkpoints.load(train.main(config(tmp_path / "run", engine="auto", total_steps=5 * LANES)))
    assert result.manifest["config"]["engine"] == "native"
    said = [line for line in capsys.readouterr().out.splitlines() if "auto" in line]
    assert len(said) == 1 and "native is taken" in said[0] and "no GPU" in said[0] and engines.SLOW_ON_A_CPU in said[0]


@pytest.mark.parametrize(("native", "mjx", "taken"), [(2000.0, 30000.0, "mjx"), (9000.0, 8000.0, "native")])
@pytest.mark.usefixtures("gpu")
def test_the_faster_engine_is_taken_and_kept_by_the_run(tmp_path, monkeypatch, capsys, native, mjx, taken):
    speeds(monkeypatch, native=native, mjx=mjx)
    settings = config(tmp_path / "run", engine="auto", total_steps=5 * LANES, resume_buffer="refill",
                      records=replace(RECORDS, keep_state=True, checkpoint_every=LANES))  # fmt: skip
    first = checkpoints.load(train.main(settings))
    said = capsys.readouterr().out
    assert f"native {native:,.0f} steps/s, mjx {mjx:,.0f} steps/s: {taken} is taken" in said
    assert f"cpu: {taken} engine" in said

    monkeypatch.setattr(engines, "steps_per_s", no_timing)
    assert train.main(replace(settings, resume=True)) == first.path  # finished
    (tmp_path / "run").rename(tmp_path / "moved")
    longer = checkpoints.load(train.main(replace(settings, resume=True, total_steps=8 * LANES)))
    assert f"cpu: {taken} engine" in capsys.readouterr().out
    for checkpoint in (first, longer):
        assert checkpoint.manifest["config"]["engine"] == taken
    assert longer.manifest["metrics"]["steps"] == 8 * LANES


@pytest.mark.parametrize("buffer", ["saved", "refill"])
@pytest.mark.usefixtures("gpu")
def test_a_run_goes_on_with_another_engine_if_its_buffer_is_a_new_one(tmp_path, capsys, buffer):
    settings = config(tmp_path / "run", engine="mjx", total_steps=5 * LANES, resume_buffer=buffer,
                      records=replace(RECORDS, keep_state=True, checkpoint_every=LANES))  # fmt: skip
    train.main(settings)
    (tmp_path / "run").rename(tmp_path / "moved")
    other = replace(settings, engine="native", resume=True, total_steps=8 * LANES)
    if buffer == "refill":
        longer = checkpoints.load(train.main(other))
        assert f"resuming at step {5 * LANES} with a new replay buffer" in capsys.readouterr().out
        assert longer.manifest["config"]["engine"] == "native" and longer.manifest["metrics"]["steps"] == 8 * LANES
    else:
        with pytest.raises(checkpoints.WrongRun, match="was run with engine = mjx, not native"):
            train.main(other)


def test_timing_leaves_no_trace_in_what_is_learned(tmp_path, monkeypatch):
    """Both engines are native here: timed with updates, then gone, and the run has the bits of one not timed."""
    monkeypatch.setattr(engines, "_TIMED_S", 0.01)
    monkeypatch.setattr(engines, "_WARM_ACTIONS", 3)
    small = {"total_steps": 30 * LANES}
    named = checkpoints.load(train.main(config(tmp_path / "named", **small)))

    made = []

    class Watched(NativeLoop):
        def __init__(self, *settings):
            gc.collect()
            assert [loop for loop in made if loop() is not None] == []  # no two at once
            super().__init__(*settings)
            made.append(weakref.ref(self))

    for loop in ("NativeLoop", "MjxLoop"):
        monkeypatch.setattr(train, loop, Watched)
    monkeypatch.setattr(train, "platform", lambda: "gpu")
    timed = checkpoints.load(train.main(config(tmp_path / "timed", engine="auto", **small)))
    assert len(made) == 3
    for name, values in named.arrays.items():
        np.testing.assert_array_equal(timed.arrays[name], values, err_msg=name)


def test_speed_counts_every_lane_but_not_what_is_compiled_first(monkeypatch):
    """By a clock that goes on by a second with each look at it: the first 40 actions of every lane come before."""
    closed, calls = [], []

    class Loop(Still):
        ITERATIONS_PER_CALL, config = 20, COLLECT

        def iterate(self, state, learn, statistics):
            calls.append(learn)
            return super().iterate(state, learn, statistics)

        def close(self):
            closed.append(True)

    monkeypatch.setattr(engines.time, "perf_counter", itertools.count().__next__)
    monkeypatch.setattr(engines, "_TIMED_S", 3.0)
    assert engines.steps_per_s(Loop(), None) == pytest.approx(20 * LANES)
    assert calls == [True] * 5 and closed == [True]


def test_a_loop_that_refers_to_itself_is_gone_before_the_next_is_made(monkeypatch):
    made = []

    def new_loop(engine):
        assert [loop for loop in made if loop() is not None] == []
        loop = Still()
        loop.itself = loop  # as MjxLoop, by its jitted method
        made.append(weakref.ref(loop))
        return loop, None

    monkeypatch.setattr(engines, "steps_per_s", lambda loop, state: 1.0)
    engines.faster(new_loop)
    assert len(made) == 2 and made[1]() is None
