"""Gate 1: the observation is the same in JAX, in NumPy and in the class that is submitted; and it is right.

The states are official ones: random joint targets around the default pose, from noisy starts, a third of
them turned to a random heading and tilted. The comparisons themselves are those of `gates.py`.
"""

import copy

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from sai_rl.model import ModelManager

from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.envs.turned import turn
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES, TABLE, observe, projected_gravity, yaw_rad
from booster_soccer.preprocess.submission import Preprocessor
from gates import difference, in_jax, observed, record, submitted_preprocessor

STATES = 150  # per task; the gate asks for at least 100
SQRT_HALF = np.sqrt(0.5)


def recorded(task: str) -> tuple[np.ndarray, dict]:
    """Official observations (STATES, raw) and info (STATES, ...) of a task, a third of them of turned robots."""
    rng = np.random.default_rng(0)

    def random_action(_):
        return rng.uniform(-0.5, 0.5, c.NUM_JOINTS)

    plain = record(task, random_action, STATES - STATES // 3, seed=0, start_noise_rad=0.05)
    turned = record(task, random_action, STATES // 3, seed=1, start_noise_rad=0.05, turned=True)
    return np.concatenate([plain[0], turned[0]]), {
        key: np.concatenate([values, turned[1][key]]) for key, values in plain[1].items()
    }


@pytest.fixture(scope="module")
def states():
    return {task: recorded(task) for task in c.TASKS}


@pytest.fixture(scope="module")
def submitted():
    return submitted_preprocessor()


def assert_within(actual, expected, tolerance):
    """Every number within tolerance x max(1, |a|)."""
    assert actual.shape == expected.shape
    apart, feature = difference(actual, expected)
    assert apart <= tolerance, f"{feature}: {apart}"


# --- gate 1: three implementations ------------------------------------------------------------------


@pytest.mark.parametrize("task", c.TASKS)
def test_recorded_states_are_varied(states, task):
    obs, info = states[task]
    assert len(obs) >= 100
    yaw = yaw_rad(info["robot_quat"][:, [3, 0, 1, 2]], np)
    assert np.ptp(yaw) > 1.5
    assert np.ptp(projected_gravity(info["robot_quat"][:, [3, 0, 1, 2]], np)[:, 0]) > 0.3
    assert obs[:, :12].std(axis=0).min() > 0.02


@pytest.mark.parametrize("task", c.TASKS)
def test_jax_float32_agrees_with_numpy(states, task):
    """In float32 the goals' 20 m leave little room: over 6,000 such states the worst was 0.99 times this."""
    obs, info = states[task]
    in_float32 = in_jax(obs, info)
    assert in_float32.dtype == np.float32
    assert_within(in_float32, observed(obs, info), 1e-6)


@pytest.mark.parametrize("task", c.TASKS)
def test_jax_x64_agrees_with_numpy(states, task):
    obs, info = states[task]
    in_float64 = in_jax(obs, info, x64=True)
    assert in_float64.dtype == np.float64
    assert_within(in_float64, observed(obs, info), 1e-12)


@pytest.mark.parametrize("task", c.TASKS)
def test_submitted_class_agrees_with_numpy(states, submitted, task):
    obs, info = states[task]
    from_class = submitted.modify_state(obs, info)
    assert from_class.dtype == np.float32 and from_class.shape == (STATES, OBS_SIZE)
    assert_within(from_class, observed(obs, info), 1e-6)
    # Both compute in float64, so that the rounded numbers are the very same.
    np.testing.assert_array_equal(from_class, observed(obs, info).astype(np.float32))


@pytest.mark.parametrize("task", c.TASKS)
def test_one_state_or_a_batch_give_the_same(states, submitted, task):
    obs, info = states[task]
    batch = observed(obs, info)
    for i in range(0, STATES, 25):
        one = {key: value[i] for key, value in info.items()}
        np.testing.assert_array_equal(observed(obs[i], one), batch[i])
        from_class = submitted.modify_state(obs[i], one)
        assert from_class.shape == (1, OBS_SIZE)
        np.testing.assert_array_equal(from_class[0], batch[i].astype(np.float32))


def test_submitted_class_takes_unbatched_info_beside_a_batch_of_one(states, submitted):
    """At submission the platform traces the model on zeros of shape (1, raw) and one reset's plain info."""
    obs, info = states["target"]
    one = {key: value[0] for key, value in info.items()}
    from_class = submitted.modify_state(np.zeros_like(obs[:1]), one)
    assert from_class.shape == (1, OBS_SIZE)
    np.testing.assert_array_equal(from_class[0, 24:], observed(obs[0], one).astype(np.float32)[24:])
    assert not from_class[0, :24].any()


def test_nothing_is_written_into_obs_or_info(states, submitted):
    obs, info = (copy.deepcopy(part) for part in states["obstacle"])
    for array in (obs, *info.values()):
        array.flags.writeable = False  # a write raises
    observed(obs, info)
    submitted.modify_state(obs, info)
    submitted.modify_state(obs[0], {key: value[0] for key, value in info.items()})
    keys = set(info)
    in_jax(obs, info)
    assert set(info) == keys
    for key, value in states["obstacle"][1].items():
        np.testing.assert_array_equal(info[key], value)


def test_the_platforms_vector_environment_and_model_manager(submitted):
    """Batched info as gymnasium makes it, through the SDK's own preprocess and action path."""

    class FirstJoints(torch.nn.Module):
        def forward(self, obs):
            self.seen = obs.numpy()
            return obs[:, :12]

    vector_env = gym.vector.SyncVectorEnv([lambda: official.make("obstacle") for _ in range(3)])
    obs, info = vector_env.reset(seed=[1, 2, 3])
    for _ in range(5):
        obs, _, _, _, info = vector_env.step(np.full((3, 12), 2.0, dtype=np.float32))
    model = FirstJoints()
    manager = ModelManager(official.make("obstacle"), model, preprocessor_class=Preprocessor)
    action = manager.get_action(obs, info)
    np.testing.assert_array_equal(model.seen, observed(obs, info).astype(np.float32))
    np.testing.assert_allclose(action, obs[:, :12] * c.TORQUE_LIMIT_NM, rtol=1e-4, atol=1e-4)


# --- what the numbers mean, by hand -----------------------------------------------------------------


def plain_info(quat_wxyz=(1.0, 0.0, 0.0, 0.0), **vectors_w) -> dict:
    """An official-style info of a robot at the origin: zeros but for what is given."""
    w, x, y, z = quat_wxyz
    info = {"robot_quat": np.array([x, y, z, w], dtype=np.float32), "player_team": np.array([1, 0])}
    zeros = ("robot_gyro", "robot_accelerometer", "robot_velocimeter")
    zeros += ("ball_xpos_rel_robot", "ball_velp_rel_robot", "ball_velr_rel_robot")
    zeros += ("target_xpos_rel_robot", "target_velp_rel_robot")
    for team in (0, 1):
        zeros += (f"goalkeeper_team_{team}_xpos_rel_robot", f"goalkeeper_team_{team}_velp_rel_robot")
        info[f"goal_team_{team}_rel_robot"] = c.GOAL_POS_W[team]
        info[f"goal_team_{team}_rel_ball"] = c.GOAL_POS_W[team]
    info |= {key: np.zeros(3) for key in zeros}
    info |= {"defender_xpos": np.zeros(9), "task_index": np.array([1, 0, 0], dtype=np.float32)}
    return info | {key: np.array(value, dtype=np.float64) for key, value in vectors_w.items()}


def feature(info: dict, name: str) -> np.ndarray:
    return observe(np.zeros(12), np.zeros(12), info, np)[SLICES[name]]


def test_turned_left_a_ball_to_the_worlds_left_is_ahead():
    left_90 = (SQRT_HALF, 0.0, 0.0, SQRT_HALF)
    info = plain_info(left_90, ball_xpos_rel_robot=(0.0, 2.0, -0.5), ball_velp_rel_robot=(1.0, 0.0, 0.0))
    np.testing.assert_allclose(feature(info, "ball_pos_rel_robot_h"), [2.0, 0.0, -0.5], atol=1e-6)
    np.testing.assert_allclose(feature(info, "ball_vel_rel_robot_h"), [0.0, -1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(feature(info, "goal_attacked_rel_robot_h"), [0.0, 10.97, 0.0], atol=1e-5)
    np.testing.assert_allclose(feature(info, "projected_gravity_b"), [0.0, 0.0, -1.0], atol=1e-6)


def test_pitched_forward_gravity_points_ahead_and_the_ball_stays():
    nose_down_30 = (np.cos(np.pi / 12), 0.0, np.sin(np.pi / 12), 0.0)
    info = plain_info(nose_down_30, ball_xpos_rel_robot=(2.0, 0.0, -0.5))
    np.testing.assert_allclose(feature(info, "projected_gravity_b"), [0.5, 0.0, -np.sqrt(3) / 2], atol=1e-6)
    np.testing.assert_allclose(feature(info, "ball_pos_rel_robot_h"), [2.0, 0.0, -0.5], atol=1e-6)


def test_rolled_to_the_right_gravity_points_right():
    right_30 = (np.cos(np.pi / 12), np.sin(np.pi / 12), 0.0, 0.0)
    gravity_b = feature(plain_info(right_30), "projected_gravity_b")
    np.testing.assert_allclose(gravity_b, [0.0, -0.5, -np.sqrt(3) / 2], atol=1e-6)


def test_a_vertical_body_axis_gives_no_nan():
    nose_down_90 = (SQRT_HALF, 0.0, SQRT_HALF, 0.0)
    info = plain_info(ball_xpos_rel_robot=(2.0, 0.0, -0.5))
    info["robot_quat"] = np.array(nose_down_90)[[1, 2, 3, 0]]
    assert np.all(np.isfinite(observe(np.zeros(12), np.zeros(12), info, np)))


@pytest.mark.parametrize("task", c.TASKS)
def test_quaternion_order_proved_by_turning_the_official_robot(task):
    """At each reset the ball lies straight ahead; turned by 90 degrees about z it lies to the side."""
    env = official.make(task)
    obs, info = official.reset(env, seed=4)
    ahead_m = np.linalg.norm(info["ball_xpos_rel_robot"][:2])
    assert ahead_m > 0.4
    ball_h = observed(obs, info)[SLICES["ball_pos_rel_robot_h"]]
    np.testing.assert_allclose(ball_h[:2], [ahead_m, 0.0], atol=0.06)  # imu and ball are not on one line

    start_wxyz = info["robot_quat"][[3, 0, 1, 2]].astype(np.float64)
    upright_b, pitched_b = (0.0, 0.0, -1.0), (0.5, 0.0, -np.sqrt(3) / 2)
    for is_about_z, axis, angle_rad, gravity_b in (
        (True, (0.0, 0.0, 1.0), np.pi / 2, upright_b),
        (False, (0.0, 1.0, 0.0), np.pi / 6, pitched_b),
    ):
        turn_wxyz, quat_wxyz = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn_wxyz, np.array(axis), angle_rad)
        mujoco.mju_mulQuat(quat_wxyz, start_wxyz, turn_wxyz)  # about the robot's own axis
        obs, info = turn(env, quat_wxyz)
        np.testing.assert_allclose(info["robot_quat"], quat_wxyz[[1, 2, 3, 0]], atol=1e-6)
        turned = observed(obs, info)
        np.testing.assert_allclose(turned[SLICES["projected_gravity_b"]], gravity_b, atol=1e-5)
        distance_m = np.linalg.norm(info["ball_xpos_rel_robot"][:2])
        expected = [0.0, -distance_m] if is_about_z else [distance_m, 0.0]
        np.testing.assert_allclose(turned[SLICES["ball_pos_rel_robot_h"]][:2], expected, atol=0.06)


@pytest.mark.parametrize("task", c.TASKS)
def test_heading_frame_and_gravity_are_those_of_mujocos_rotation_matrix(task):
    env, rng = official.make(task), np.random.default_rng(1)
    official.reset(env, seed=4)
    for _ in range(10):
        quat_wxyz = rng.normal(size=4)
        obs, info = turn(env, quat_wxyz / np.linalg.norm(quat_wxyz))
        data = env.unwrapped.sim.data._data
        body_to_world = data.site(env.unwrapped._root_site).xmat.reshape(3, 3)
        forward_w = body_to_world[:2, 0] / np.linalg.norm(body_to_world[:2, 0])
        left_w = np.array([-forward_w[1], forward_w[0]])
        ball_w = (data.site("ball").xpos - data.site(env.unwrapped._root_site).xpos)[:2]
        numbers = observed(obs, info)
        expected_h = [forward_w @ ball_w, left_w @ ball_w]
        np.testing.assert_allclose(numbers[SLICES["ball_pos_rel_robot_h"]][:2], expected_h, atol=1e-5)
        expected_b = body_to_world.T @ [0.0, 0.0, -1.0]
        np.testing.assert_allclose(numbers[SLICES["projected_gravity_b"]], expected_b, atol=1e-6)


def test_the_other_team_attacks_the_other_goal():
    keepers = dict(goalkeeper_team_0_xpos_rel_robot=(1.0, 2.0, 3.0))
    keepers |= dict(goalkeeper_team_1_velp_rel_robot=(4.0, 5.0, 6.0))
    info = plain_info(**keepers)
    assert feature(info, "goal_attacked_rel_robot_h")[0] == -10.97
    assert feature(info, "goal_own_rel_ball_h")[0] == 10.97
    np.testing.assert_array_equal(feature(info, "keeper_attacked_pos_rel_robot_h"), [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(feature(info, "keeper_own_vel_rel_robot_h"), [4.0, 5.0, 6.0])
    info["player_team"] = np.array([0, 1])
    assert feature(info, "goal_attacked_rel_robot_h")[0] == 10.97
    assert feature(info, "goal_own_rel_ball_h")[0] == -10.97
    np.testing.assert_array_equal(feature(info, "keeper_own_pos_rel_robot_h"), [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(feature(info, "keeper_attacked_vel_rel_robot_h"), [4.0, 5.0, 6.0])


def test_absolute_defenders_become_relative_and_absent_ones_zero(states):
    # A robot at (-6, 1, 0.6), not turned: goals at -4.97 and 16.97 in x, -1 in y, -0.6 in z from it.
    robot_w = np.array([-6.0, 1.0, 0.6])
    info = plain_info(
        goal_team_0_rel_robot=c.GOAL_POS_W[0] - robot_w,
        goal_team_1_rel_robot=c.GOAL_POS_W[1] - robot_w,
        defender_xpos=(-10.97, 0.39, 0.6, -10.97, -1.17, 0.6, *robot_w),
    )
    np.testing.assert_allclose(
        feature(info, "defenders_pos_rel_robot_h"),
        [-4.97, -0.61, 0.0, -4.97, -2.17, 0.0, 0.0, 0.0, 0.0],
        atol=1e-12,
    )
    for task in ("goalie", "target"):
        assert np.abs(observed(*states[task])[:, SLICES["defenders_pos_rel_robot_h"]]).max() < 1e-12


def test_accelerometer_is_clipped_at_fifty():
    info = plain_info(robot_accelerometer=(-300.0, 9.81, 80.0))
    np.testing.assert_array_equal(feature(info, "accelerometer_b"), [-50.0, 9.81, 50.0])


def test_table_adds_up_to_87():
    assert OBS_SIZE == 87 == sum(row.width for row in TABLE)
    assert [row.name for row in TABLE][-1] == "task_one_hot"
