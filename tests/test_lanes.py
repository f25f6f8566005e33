"""Lanes of official environments: the control loop, episode ends, and playing an episode again."""

import numpy as np
import pytest

from envs import constants as c
from envs import official, pd
from envs.lanes import Lane, OfficialLanes, check_num_lanes, episode_seed
from errors import UserError
from preprocess.observation import OBS_SIZE, observe

NOISE_RAD = 0.02
NO_ACTIONS = np.zeros((0, c.NUM_JOINTS), np.float32)


@pytest.fixture(scope="module")
def lane() -> Lane:
    return Lane("obstacle", (7,), NOISE_RAD)


def test_an_action_is_ten_physics_steps_of_the_official_control(lane):
    """Against the loop written out on an environment of its own."""
    obs_lane, _ = lane.start(3, NO_ACTIONS)
    env = official.make("obstacle")
    obs, info = official.reset(env, episode_seed(7, 3), NOISE_RAD)
    np.testing.assert_array_equal(obs_lane, observe(obs[:12], obs[12:24], info, np).astype(np.float32))
    action = np.linspace(-0.5, 0.5, c.NUM_JOINTS).astype(np.float32)
    for round_ in range(3):
        step = lane.step(action)
        for _ in range(10):
            torque_nm = pd.torque_nm(pd.joint_target_rad(action), obs[:12], obs[12:24], np)
            obs, _, _, _, info = env.step(torque_nm)
        np.testing.assert_array_equal(step.obs, observe(obs[:12], obs[12:24], info, np).astype(np.float32))
        assert (step.physics_steps, step.terminated, step.truncated, step.score) == (10 * (round_ + 1), False, False, 0)
    data = env.unwrapped.sim.data._data
    np.testing.assert_allclose(step.reading.robot_pos_w, data.site("robot_0:imu").xpos, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(step.reading.ball_centre_pos_w, data.geom("ball").xpos)
    np.testing.assert_allclose(step.reading.aim_pos_w, data.site("goalarea_site").xpos, rtol=0, atol=1e-9)


def test_the_end_pays_the_score_and_keeps_the_final_observation(lane):
    lane.start(0, NO_ACTIONS)
    step = lane.step(np.ones(c.NUM_JOINTS, np.float32))
    while not step.terminated:
        assert step.score == 0.0
        np.testing.assert_array_equal(step.obs, step.next_obs)
        step = lane.step(np.ones(c.NUM_JOINTS, np.float32))
    assert step.fell and not step.truncated and not step.success
    # Fallen, no touch: -1.5 - 1.0, and 0.25 (1 - tanh d) of about two metres of distance.
    assert step.score == pytest.approx(-2.5 + 0.01, abs=0.01)
    fresh, reading = lane.start(1, NO_ACTIONS)
    np.testing.assert_array_equal(step.next_obs, fresh)
    np.testing.assert_array_equal(step.next_reading, reading)
    assert not np.array_equal(step.obs, fresh)


def test_an_episode_is_its_seed_and_its_actions(lane):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.3, 0.3, (20, c.NUM_JOINTS)).astype(np.float32)
    lane.start(5, NO_ACTIONS)
    steps = [lane.step(action) for action in actions]
    lane.start(9, actions)  # something else in between
    obs, reading = lane.start(5, actions[:15])
    np.testing.assert_array_equal(obs, steps[14].obs)
    np.testing.assert_array_equal(reading, steps[14].reading)
    np.testing.assert_array_equal(lane.step(actions[15]).obs, steps[15].obs)


def test_a_diverged_simulation_ends_its_episode_with_the_last_good_numbers(lane):
    """MuJoCo starts again by itself, which looks like an ordinary step from outside."""
    zeros = np.zeros(c.NUM_JOINTS, np.float32)
    lane.start(0, NO_ACTIONS)
    good = lane.step(zeros)
    lane._env.unwrapped.sim.data._data.qvel[:] = np.nan
    step = lane.step(zeros)
    assert step.terminated and not step.truncated and step.score == 0.0
    np.testing.assert_array_equal(step.reading.robot_pos_w, good.reading.robot_pos_w)
    for value in (step.obs, step.next_obs, *step.reading, *step.next_reading):
        assert np.isfinite(value).all()
    assert not lane.step(zeros).terminated
    np.testing.assert_array_equal(step.next_obs, lane.start(1, NO_ACTIONS)[0])


def test_lanes_run_side_by_side_and_come_back():
    rng = np.random.default_rng(1)
    actions = rng.uniform(-0.3, 0.3, (12, 3, c.NUM_JOINTS)).astype(np.float32)
    with OfficialLanes(3, 4, NOISE_RAD) as lanes:
        assert lanes.task == list(c.TASKS)
        obs, reading = lanes.start()
        assert obs.shape == (3, OBS_SIZE) and reading.aim_pos_w.shape == (3, 3)
        for now in actions[:6]:
            lanes.send(now)
            lanes.receive()
        state = lanes.state()
        went_on = []
        for now in actions[6:]:
            lanes.send(now)
            went_on.append(lanes.receive())
        lanes.restore(state)
        results = lanes.validate(official.hold_default_pose, [11, 12], NOISE_RAD)  # leaves no trace
        for now, then in zip(actions[6:], went_on):
            lanes.send(now)
            again = lanes.receive()
            np.testing.assert_array_equal(again.obs, then.obs)
            np.testing.assert_array_equal(again.physics_steps, then.physics_steps)
    assert [(r.task, r.seed) for r in results] == [(task, seed) for task in c.TASKS for seed in (11, 12)]
    expected = official.run_episode(official.make("target"), "target", official.hold_default_pose, 12, NOISE_RAD)
    assert results[-1] == expected


def test_every_task_needs_as_many_lanes():
    for number in (0, 1, 4):
        with pytest.raises(UserError, match="multiple of 3"):
            check_num_lanes(number)
    check_num_lanes(6)
