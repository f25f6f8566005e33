"""Collection: one body for two engines. Native and MJX loops of the same settings start, store, cut and learn alike."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from booster_soccer.agents import sac
from booster_soccer.agents.sac import Batch, Sac, SacState
from booster_soccer.envs import constants as c
from booster_soccer.envs import randomization
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.envs.randomization import LEVELS, Level
from booster_soccer.envs.tasks import Tasks
from booster_soccer.preprocess.observation import SLICES
from booster_soccer.rollout.collect import (
    ROW_SHAPES,
    MjxLoop,
    NativeLoop,
    Statistics,
    first_cuts,
)
from booster_soccer.store.replay import Replay
from tests.small_pretraining import CALL, COLLECT, LANES, LEARNER

SEED, NOISE_STD = 0, LEVELS[COLLECT.dr_level].obs_noise_std
_TIME_LEFT = -c.NUM_JOINTS - 1  # in what critics see: the last action comes last


class Loop(NamedTuple):
    """A collecting loop and how it was at its start."""

    loop: NativeLoop | MjxLoop
    learner: dict[str, np.ndarray]
    lanes: dict[str, np.ndarray]

    def begin(self) -> SacState:
        """Bring the loop to its start, with an empty buffer; the learner's state then."""
        self.loop.restore(self.lanes, Replay(self.loop.replay.capacity, ROW_SHAPES))
        return sac.restore(Sac(LEARNER).init(jax.random.key(SEED)), self.learner)

    def run(self, state: SacState, iterations: int, learn: bool = False) -> tuple[SacState, dict[str, float]]:
        """So many iterations; the learner's state, and the means of what happened."""
        statistics = Statistics()
        for _ in range(iterations // self.loop.ITERATIONS_PER_CALL):
            state, _ = self.loop.iterate(state, learn, statistics)
        return state, statistics.take()

    def rows(self) -> Batch:
        """What the buffer holds, oldest first, with leading axes iterations and lanes."""
        replay = self.loop.replay
        parts = [replay.rows(first, first + LANES) for first in range(replay.added - len(replay), replay.added, LANES)]
        return Batch(**{name: np.array([part[name] for part in parts]) for name in ROW_SHAPES})


@pytest.fixture(scope="module")
def loops() -> Iterator[dict[str, Loop]]:
    """A loop on each engine, with randomised observations but nominal physics, so that both have the same."""
    learner, made = Sac(LEARNER), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomization, "LEVELS", [Level(0.0, 0.0, 0.0, level.obs_noise_std) for level in LEVELS])
        for name, kind in (("native", NativeLoop), ("mjx", MjxLoop)):
            state = learner.init(jax.random.key(SEED))
            loop = kind(COLLECT, learner, Tasks(), SEED, state)
            made[name] = Loop(loop, sac.state_arrays(state), loop.arrays())
        yield made
    made["native"].loop.close()


both = pytest.mark.parametrize("engine", ["native", "mjx"])


def action_counts(critic_obs: np.ndarray) -> np.ndarray:
    """Actions since the lane's reset (...), from the time that is left."""
    return np.rint((1.0 - critic_obs[..., _TIME_LEFT]) * c.EPISODE_ACTIONS).astype(int)


# --- the same for both ------------------------------------------------------------------------------------


def test_both_start_alike(loops):
    native, mjx = (loop.lanes for loop in loops.values())
    for name in (name for name in native if name.startswith("task.") or name == "first_cut"):
        np.testing.assert_array_equal(native[name], mjx[name], err_msg=name)
    # MJX's accelerometer reads zero at every start, as in the official drop (`envs/mjx_engine.py: reset`).
    seen = [np.delete(lanes["critic_obs"], SLICES["accelerometer_b"], axis=1) for lanes in (native, mjx)]
    np.testing.assert_allclose(*seen, rtol=0, atol=1e-5)


def test_both_store_the_same_for_the_same_start(loops):
    """One action, from the same draws and the same first sight: the physics differs by rounding only."""
    rows, seen = {}, loops["native"].lanes["critic_obs"]
    for name, loop in loops.items():
        state = loop.begin()
        if name == "mjx":
            carry = loop.loop.carry
            loop.loop.carry = carry._replace(lanes=carry.lanes._replace(critic_obs=jnp.array(seen)))
        loop.run(state, CALL)
        rows[name] = jax.tree.map(lambda x: x[0], loop.rows())
        np.testing.assert_array_equal(rows[name].critic_obs, seen)
    np.testing.assert_allclose(*(row.action for row in rows.values()), rtol=0, atol=1e-5)
    following = [np.delete(row.next_critic_obs, SLICES["accelerometer_b"], axis=1) for row in rows.values()]
    np.testing.assert_allclose(*following, rtol=0, atol=1e-2)
    np.testing.assert_allclose(*(row.reward for row in rows.values()), rtol=0, atol=1e-2)
    np.testing.assert_array_equal(*(row.terminated for row in rows.values()))


def test_from_the_same_view_both_make_the_same_rows(loops):
    """Whatever the physics brought: shaping, noise and statistics are one body with one set of draws."""
    native, mjx = (loop.loop for loop in loops.values())
    state, _ = loops["native"].run(loops["native"].begin(), CALL)
    action = np.random.default_rng(0).uniform(-1, 1, (LANES, c.NUM_JOINTS)).astype(np.float32)
    native.engine.step(np.asarray(joint_target_rad(action)))
    view, count = native.engine.view(), CALL + 1
    ours = native._after(state, native.lanes, view, action, count)
    theirs = jax.jit(mjx.body.after)(state, native.lanes, view, action, count)
    ours, theirs = (jax.tree.leaves(got[0].normalizer) + jax.tree.leaves(got[1:]) for got in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


# --- each of them -----------------------------------------------------------------------------------------


@both
def test_only_first_episodes_are_cut_and_each_at_its_own_action(loops, engine):
    """So that lanes do not reset all at once; later episodes last `max_actions`. Nobody falls in 0.14 s."""
    cut = first_cuts(COLLECT, np.random.default_rng(SEED))
    assert len(set(cut)) > 2 and cut.min() >= 1 and cut.max() <= COLLECT.max_actions
    np.testing.assert_array_equal(loops[engine].lanes["first_cut"], cut)
    loops[engine].run(loops[engine].begin(), CALL)
    done = np.arange(CALL)[:, None]
    expected = np.where(done < cut, done, (done - cut) % COLLECT.max_actions)
    np.testing.assert_array_equal(action_counts(loops[engine].rows().critic_obs), expected)
    np.testing.assert_array_equal(loops[engine].loop.lanes.first_cut, np.full(LANES, -1))


@both
def test_the_ramp_is_that_of_the_steps_taken(loops, engine):
    """Starts before a call's last iteration have the first share of the tasks, from it on the last share."""
    loops[engine].run(loops[engine].begin(), 2 * CALL)
    critic_obs = loops[engine].rows().critic_obs
    task = critic_obs[..., SLICES["task_one_hot"]].argmax(-1)
    started = action_counts(critic_obs) == 0  # in row i: in iteration i, counted from 1
    assert started[CALL - 1].any() and started[CALL].any()
    assert set(task[:CALL][started[:CALL]]) == {c.GOALIE, c.OBSTACLE}
    assert set(task[CALL:][started[CALL:]]) == {c.TARGET}


@both
def test_with_a_new_buffer_the_ramp_and_the_draws_go_on(loops, engine):
    """Once the ramp began again, and the first draws too; and only what is in the buffer is learned from."""
    loop, state = loops[engine].loop, loops[engine].begin()
    state, _ = loops[engine].run(state, 2 * CALL)
    loop.begin(state, 2 * CALL)
    assert loop.replay.added == 0 and set(np.asarray(loop.lanes.task_state.task)) == {c.TARGET}
    seen = np.array(loop.lanes.critic_obs)
    if engine == "mjx":
        buffer = jax.tree.map(lambda rows: rows * np.nan, loop.carry.buffer)
        loop.carry = loop.carry._replace(buffer=buffer._replace(truncated=loop.carry.buffer.truncated))
    else:
        for rows in loop.replay.arrays.values():
            rows[:] = np.nan
    state, _ = loops[engine].run(state, CALL, learn=True)
    rows = loops[engine].rows()
    assert rows.reward.shape == (CALL, LANES) and loop.replay.added == CALL * LANES
    np.testing.assert_array_equal(rows.critic_obs[0], seen)
    assert all(np.isfinite(values).all() for values in jax.tree.leaves(state.critic))
    loop.begin(state, 2 * CALL + 1)
    assert not np.isclose(loop.lanes.critic_obs, seen).all(axis=-1).any()  # other draws


@both
def test_an_episodes_first_observation_is_noisy_as_the_others(loops, engine):
    loops[engine].run(loops[engine].begin(), CALL)
    critic_obs = loops[engine].rows().critic_obs
    one_hot = critic_obs[..., SLICES["task_one_hot"]]
    noise = np.abs(one_hot - np.rint(one_hot)).max(-1)
    assert noise.min() > 1e-4 and noise.max() < 5 * NOISE_STD
    first = critic_obs[action_counts(critic_obs) == 0]
    assert len(first) > 2 * LANES and not first[:, -c.NUM_JOINTS :].any()  # what only critics see is not


@both
def test_what_is_stored_is_what_came_next(loops, engine):
    """Also over the ring's end: within an episode, a row's next observation is the following row's."""
    loops[engine].run(loops[engine].begin(), 3 * CALL)
    rows = loops[engine].rows()
    assert len(rows.reward) == COLLECT.buffer_size // LANES < 3 * CALL
    goes_on = action_counts(rows.critic_obs)[1:] > 0
    np.testing.assert_array_equal(rows.next_critic_obs[:-1][goes_on], rows.critic_obs[1:][goes_on])
    np.testing.assert_array_equal(rows.next_critic_obs[..., -c.NUM_JOINTS :], rows.action)
    assert np.isfinite(rows.next_critic_obs).all() and len(np.unique(rows.reward)) > rows.reward.size // 2


@both
def test_it_learns_when_told_to_and_only_then(loops, engine):
    state, _ = loops[engine].run(loops[engine].begin(), CALL)
    learner = state._replace(key=jax.random.key_data(state.key))
    fresh = sac.restore(Sac(LEARNER).init(jax.random.key(1)), loops[engine].learner)
    fresh = fresh._replace(key=jax.random.key_data(fresh.key))
    for name in set(SacState._fields) - {"normalizer"}:
        jax.tree.map(np.testing.assert_array_equal, getattr(learner, name), getattr(fresh, name))
    assert float(state.normalizer.count) == pytest.approx(CALL * LANES + 0.01)

    batch = jax.tree.map(lambda x: jnp.asarray(x).reshape(CALL * LANES, *x.shape[2:]), loops[engine].rows())
    normalizer = jax.tree.map(jnp.copy, state.normalizer)  # the loop may take the state's memory
    target = sac.critic_target(state, batch, normalizer.critic(batch.next_critic_obs), 0.99, jax.random.key(0))

    def loss(state: SacState) -> float:
        return float(sac.critic_loss(state.critic, normalizer.critic(batch.critic_obs), batch.action, target)[0])

    before, actor = loss(state), np.array(state.actor["output"]["kernel"])
    state, _ = loops[engine].run(state, 2 * CALL, learn=True)
    assert loss(state) < 0.3 * before
    assert np.abs(np.asarray(state.actor["output"]["kernel"]) - actor).max() > 1e-3
    programs = [loops[engine].loop._run] if engine == "mjx" else [loops[engine].loop._update, loops[engine].loop._after]
    assert [program._cache_size() for program in programs] == [1] * len(programs)  # compiled once


def test_overlapping_updates_draw_from_the_rows_before_this_action_and_repeat(loops, monkeypatch):
    """One action's lag, whatever the device is busy with: the same bits twice; the first action has nothing to draw."""
    loop, ends, drawn = loops["native"].loop, [], []
    monkeypatch.setattr(loop, "overlaps", True)
    sample = loop._sample

    def counted() -> Batch:
        drawn.append(loop.replay.added)
        return sample()

    monkeypatch.setattr(loop, "_sample", counted)
    for _ in range(2):
        state, _ = loops["native"].run(loops["native"].begin(), CALL, learn=True)
        ends.append((sac.state_arrays(state), loop.arrays(), loops["native"].rows()._asdict()))
    assert drawn[:CALL] == [LANES] + [n * LANES for n in range(1, CALL)] and drawn[CALL:] == drawn[:CALL]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    monkeypatch.setattr(loop, "overlaps", False)
    drawn.clear()
    state, _ = loops["native"].run(loops["native"].begin(), CALL, learn=True)
    assert drawn == [n * LANES for n in range(1, CALL + 1)]
    assert np.any(sac.state_arrays(state)["leaf_001"] != ends[0][0]["leaf_001"])


@both
def test_a_broken_lane_costs_a_fall_and_starts_anew(loops, engine):
    """The fall's penalty is that of the ramp: a tenth in the first call, all of it in the second."""
    state = loops[engine].begin()
    for share in COLLECT.fall_share:
        loop = loops[engine].loop
        if engine == "native":
            loop.engine.state[1, 12] = np.nan
        else:
            physics = loop.carry.physics
            loop.carry = loop.carry._replace(physics=physics._replace(qvel=physics.qvel.at[1, 3].set(jnp.nan)))
        state, happened = loops[engine].run(state, CALL)
        assert happened["diverged"] == 1
        rows = loops[engine].rows()
        assert all(np.isfinite(values).all() for values in rows)
        assert rows.reward[-CALL, 1] == pytest.approx(share * COLLECT.weights.fallen)
        assert rows.terminated[-CALL:].sum() == rows.terminated[-CALL, 1] == 1.0
        assert action_counts(rows.critic_obs)[1 - CALL, 1] == 0


# --- ready for a GPU, as far as a machine without one can tell ------------------------------------------------


def test_the_whole_training_loop_lowers_for_cuda(loops):
    """Plain operations only: no call of a library or of Python; state, lanes and buffer stay where they are."""
    state, loop = loops["mjx"].begin(), loops["mjx"].loop
    kept = jax.tree.leaves((state, loop.carry))
    exported = jax.export.export(loop._run, platforms=["cuda"])(state, loop.carry, jnp.array(True))
    program = exported.mlir_module()
    assert "custom_call" not in program
    assert program.count("tf.aliasing_output") == len(kept)  # donated
    assert [a.shape for a in exported.in_avals[len(kept) :]] == [()]  # whether to learn
    numbers = exported.out_avals[len(kept) :]  # for the log
    assert 30 < len(numbers) < 80 and all(a.shape == () for a in numbers)


def test_calls_after_the_first_compile_nothing_and_bring_nothing_across(loops, caplog):
    state, loop = loops["mjx"].begin(), loops["mjx"].loop
    statistics = Statistics()
    for _ in range(2):  # the second adds its numbers to the first one's
        state, _ = loop.iterate(state, False, statistics)
    with jax.log_compiles(), jax.transfer_guard("disallow"):
        for learn in (False, True, True):
            state, _ = loop.iterate(state, learn, statistics)
    assert [record.message for record in caplog.records if "ompiling" in record.message] == []
