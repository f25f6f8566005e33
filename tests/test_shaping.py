"""Reward and critics' observation of official lanes: those of our scene, step by step, with the lanes' own memory."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs.situation import Events, Memory, Situation, from_official, official_events
from booster_soccer.envs.tasks import Tasks
from booster_soccer.envs.twin import TwinEnv
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, TABLE
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards import dense
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout import shaping
from booster_soccer.rollout.shaping import DenseLanes
from tests.test_tasks import OfficialSide, push_ball

WEIGHTS = DenseWeights(idle=-0.05)


def official_situation(side: OfficialSide, action_count: int) -> Situation:
    data = side.env.sim.data
    info = side.env._get_info() | {"task_index": np.eye(c.NUM_TASKS, dtype=np.float32)[c.TASKS.index(side.task)]}
    ball = data.get_geom_xpos("ball").copy(), data.get_geom_xvelp("ball")
    steps = np.array(action_count * c.PHYSICS_STEPS_PER_ACTION)
    return from_official(side.env._get_obs(), info, *ball, steps)


@pytest.mark.parametrize("task", c.TASKS)
def test_both_sides_give_one_dense_reward_and_the_same_critics_inputs(official_envs, task):
    """Three episodes with a rolling ball: our scene in JAX's float32, the official side in NumPy's float64."""
    tasks = Tasks()

    @jax.jit
    def ours(view, state, before, action):
        s, events = tasks.situation(view, state), tasks.events(view, state)
        after, shaped = shaping.shape(jnp.zeros(0), s, before, events, action, WEIGHTS, jnp)
        return s, after, shaped

    steps, apart = 0, {}

    def compare(name, our_values, their_values):
        our_values, their_values = np.asarray(our_values), np.asarray(their_values)
        assert our_values.shape == their_values.shape
        error = np.abs(our_values - their_values) / np.maximum(1.0, np.abs(their_values))
        apart[name] = max(apart.get(name, 0.0), error.max())

    for seed in range(3):
        side = OfficialSide(official_envs[task], task, seed)
        our_memory = their_memory = Memory.start((), np)
        for action_count in range(1, 40):
            target = side.random_target()
            action = (target - c.DEFAULT_POSE_RAD) / c.ACTION_SCALE_RAD
            going_on = side.act(target)
            if action_count == 5:
                push_ball(side)
            side.copy_state()
            mujoco.mj_forward(side.model, side.data)
            mujoco.mj_forward(side.our_model, side.our_data)
            view, state = side.view(), side.task_state(action_count)
            s, our_memory, found = ours(view, state, our_memory, jnp.asarray(action))
            theirs = official_situation(side, action_count)
            events = official_events(theirs, side.env._get_info(), {"offside": False}, np.array(False))
            their_memory, expected = shaping.shape(np.zeros(0), theirs, their_memory, events, action, WEIGHTS, np)
            for name, value in s._asdict().items():
                if name != "defender_pos_w" or task == "obstacle":
                    compare(name, value, getattr(theirs, name))
            compare("critic_obs", found.critic_obs, expected.critic_obs)
            assert found.dense_terms.keys() == expected.dense_terms.keys()
            for name, value in found.dense_terms.items():
                compare(name, value, expected.dense_terms[name])
            steps += 1
            if not going_on:
                break
    print(f"\n{task}: {steps} actions,", {name: float(f"{error:.1g}") for name, error in apart.items()})
    assert steps > 60
    for name, error in apart.items():
        # New ground is a difference of metres over 20 ms.
        assert error < (2e-4 if name in ("approach", "dribble") else 1e-5), name


class TwinLanes:
    """A few lanes of the twin, as a player of fine-tuning sees them."""

    def __init__(self, task: str, num_lanes: int):
        self.env = TwinEnv(task, num_lanes)
        self.obs, self.info = self.env.reset(range(num_lanes))

    def now(self) -> tuple[np.ndarray, Situation]:
        ball = self.env.ball
        situation = from_official(self.obs, self.info, ball.centre_pos_w, ball.centre_vel_w, self.env.steps)
        return Preprocessor().modify_state(self.obs, self.info), situation

    def step(self, action: np.ndarray) -> Events:
        step = self.env.step_action(action)
        self.obs, self.info = step.obs, step.info
        diverged = np.zeros(self.env.num_lanes, bool)
        return official_events(self.now()[1], step.info, step.reward_terms, diverged)


def test_a_lane_forgets_its_episode_when_it_starts_anew_and_the_others_do_not():
    twin, rng = TwinLanes("target", 3), np.random.default_rng(0)
    lanes = DenseLanes(3, WEIGHTS)
    obs, situation = twin.now()
    critic_obs = lanes.start(obs, situation, np.ones(3, bool))
    assert critic_obs.shape == (3, CRITIC_OBS_SIZE) and critic_obs.dtype == np.float32
    np.testing.assert_array_equal(critic_obs[:, :OBS_SIZE], obs)
    assert not critic_obs[:, -c.NUM_JOINTS :].any() and (critic_obs[:, -c.NUM_JOINTS - 1] == 1.0).all()
    for i in range(4):
        action = rng.uniform(-0.3, 0.3, (3, c.NUM_JOINTS)).astype(np.float32)
        before, events = lanes.memory, twin.step(action)
        shaped = lanes.step(*twin.now(), events, action)
        np.testing.assert_array_equal(shaped.critic_obs[:, -c.NUM_JOINTS :], action)
        np.testing.assert_allclose(shaped.critic_obs[:, -c.NUM_JOINTS - 1], 1 - (i + 1) / c.EPISODE_ACTIONS)
        np.testing.assert_allclose(
            shaped.dense_terms["action_rate"], np.sum((action - before.prev_action) ** 2, axis=1), rtol=1e-6
        )
        np.testing.assert_allclose(shaped.reward, dense.dense_reward(shaped.dense_terms, WEIGHTS))
    assert not events.terminated.any() and (lanes.memory.nearest_aim_m > 0.0).all()
    twin.obs, twin.info = twin.env.reset([7], lanes=[1])
    kept, action_before = lanes.memory, action.copy()
    critic_obs = lanes.start(*twin.now(), np.array([False, True, False]))
    np.testing.assert_array_equal(critic_obs[[0, 2]], shaped.critic_obs[[0, 2]])
    assert not critic_obs[1, -c.NUM_JOINTS :].any() and critic_obs[1, -c.NUM_JOINTS - 1] == 1.0
    assert lanes.memory.nearest_aim_m[1] == -1.0 and lanes.memory.nearest_aim_m[0] == kept.nearest_aim_m[0]
    np.testing.assert_array_equal(action, action_before)  # the caller's own


def test_the_ends_of_twin_episodes_are_seen():
    """A robot that lets itself fall, and a ball put beyond the line."""
    twin = TwinLanes("target", 2)
    address = twin.env._address.ball_q
    twin.env.qpos[1, address.start + 1] = c.FIELD_HALF_WIDTH_M + 0.5
    lanes, ended = DenseLanes(2, WEIGHTS), np.zeros(2, bool)
    lanes.start(*twin.now(), np.ones(2, bool))
    seen = {}
    for _ in range(60):
        events = twin.step(np.ones((2, c.NUM_JOINTS), np.float32))
        shaped = lanes.step(*twin.now(), events, np.ones((2, c.NUM_JOINTS), np.float32))
        for lane in np.flatnonzero(events.terminated & ~ended):
            seen[lane] = {name: value[lane] for name, value in shaped.dense_terms.items()}, events
            begun = np.ceil(twin.env.steps[lane] / c.PHYSICS_STEPS_PER_ACTION)  # the last action is cut short
            assert shaped.critic_obs[lane, -c.NUM_JOINTS - 1] == pytest.approx(1 - begun / c.EPISODE_ACTIONS)
        ended |= events.terminated
        np.testing.assert_array_equal(ended, ~twin.env.alive)
    assert (twin.env.steps % c.PHYSICS_STEPS_PER_ACTION != 0).any()
    fell, out = seen[0], seen[1]
    assert fell[1].fallen[0] and fell[0]["fallen"] == 1.0
    assert out[1].out_of_field[1] and out[0]["fallen"] == out[0]["ball_done"] == 0.0  # a lost ball is not done


def test_nothing_of_a_diverged_lane_reaches_the_learner():
    twin = TwinLanes("goalie", 2)
    obs, s = twin.now()
    lanes = DenseLanes(2, WEIGHTS)
    lanes.start(obs, s, np.ones(2, bool))
    s = s._replace(ball_center_pos_w=np.where([[True], [False]], np.nan, s.ball_center_pos_w))
    nothing = np.zeros(2, bool)
    events = Events(nothing, nothing, nothing, nothing, np.array([True, False]))
    shaped = lanes.step(obs, s, events, np.zeros((2, c.NUM_JOINTS)))
    assert shaped.reward[0] == WEIGHTS.fallen and np.isfinite(shaped.reward[1])
    assert not shaped.critic_obs[0].any() and shaped.critic_obs[1].any()
    assert all(value[0] == 0.0 for value in shaped.dense_terms.values())


def test_the_lanes_memory_is_all_that_goes_on():
    """Saved and assigned, it gives the same rewards."""
    twin, rng = TwinLanes("obstacle", 2), np.random.default_rng(1)
    one, other = DenseLanes(2, WEIGHTS), DenseLanes(2, WEIGHTS)
    one.start(*twin.now(), np.ones(2, bool))
    for i in range(3):
        action = rng.uniform(-0.3, 0.3, (2, c.NUM_JOINTS)).astype(np.float32)
        events = twin.step(action)
        if i == 2:
            other.memory = Memory(**{name: value.copy() for name, value in one.memory._asdict().items()})
            again = other.step(*twin.now(), events, action)
        shaped = one.step(*twin.now(), events, action)
    np.testing.assert_array_equal(again.reward, shaped.reward)
    np.testing.assert_array_equal(again.critic_obs, shaped.critic_obs)
    assert len(again.critic_obs[0]) - OBS_SIZE == sum(row.width for row in TABLE)


def test_the_module_for_official_lanes_does_not_import_jax():
    code = "import sys; from booster_soccer.rollout import shaping; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
