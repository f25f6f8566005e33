"""The mirror is exact: mirrored physics gives mirrored observations and torques."""

import jax.numpy as jnp
import mujoco
import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.envs import scene
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES, observe
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, TABLE, mirror_critic_observation
from booster_soccer.preprocess.symmetry import JOINT_PERMUTATION, JOINT_SIGN, mirror_action


def mirror_observation(obs):
    """Of observations (..., 87), which are the first of what critics see."""
    rest = np.zeros((*obs.shape[:-1], CRITIC_OBS_SIZE - OBS_SIZE))
    return mirror_critic_observation(np.concatenate([obs, rest], axis=-1))[..., :OBS_SIZE]


def test_mirror_twice_is_identity():
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(5, OBS_SIZE)), rng.normal(size=(5, c.NUM_JOINTS))
    np.testing.assert_array_equal(mirror_observation(mirror_observation(obs)), obs)
    np.testing.assert_array_equal(mirror_action(mirror_action(jnp.asarray(action))), jnp.asarray(action))


def test_joints_by_name():
    """Left and right swap; pitch keeps its sign, roll and yaw change it."""
    for i, name in enumerate(c.JOINT_NAMES):
        twin = name.replace("Left", "R").replace("Right", "Left").replace("R_", "Right_")
        assert c.JOINT_NAMES[JOINT_PERMUTATION[i]] == twin
        assert JOINT_SIGN[i] == (1 if "Pitch" in name else -1)


def test_default_pose_and_scale_are_symmetric():
    np.testing.assert_array_equal(mirror_action(c.DEFAULT_POSE_RAD), c.DEFAULT_POSE_RAD)
    np.testing.assert_array_equal(c.ACTION_SCALE_RAD[JOINT_PERMUTATION], c.ACTION_SCALE_RAD)


def test_turned_vectors():
    """A ball to the left mirrors to the right; a left turn mirrors to a right turn."""
    obs = np.zeros(OBS_SIZE)
    obs[SLICES["ball_pos_rel_robot_h"]] = [2.0, 0.5, 0.1]
    obs[SLICES["gyro_b"]] = [0.1, 0.2, 0.3]
    mirrored = mirror_observation(obs)
    np.testing.assert_allclose(mirrored[SLICES["ball_pos_rel_robot_h"]], [2.0, -0.5, 0.1])
    np.testing.assert_allclose(mirrored[SLICES["gyro_b"]], [-0.1, 0.2, -0.3])


def test_what_only_the_critics_see_is_mirrored_too():
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(5, CRITIC_OBS_SIZE))
    mirrored = mirror_critic_observation(seen)
    start = OBS_SIZE
    for row in TABLE:
        before, after = (array[:, start : start + row.width] for array in (seen, mirrored))
        if row.frame == "heading":
            np.testing.assert_array_equal(after, before * [1, -1, 1], err_msg=row.name)
        else:
            expected = mirror_action(before) if row.name == "prev_action" else before
            np.testing.assert_array_equal(after, expected, err_msg=row.name)
        start += row.width
    assert start == CRITIC_OBS_SIZE


def _observation(model, data, ball_y):
    """The observation of a robot state with static surroundings, heading along world x."""
    s, a = scene.sensor_slices(model), scene.addresses(model)
    sensor = {name: data.sensordata[part] for name, part in s.items()}
    robot, vel = sensor["imu_pos_w"], data.qvel[a.root_v][:3]
    zeros = np.zeros(3)
    info = {
        "robot_quat": sensor["imu_quat_wxyz"][[1, 2, 3, 0]],
        "robot_gyro": sensor["gyro_b"],
        "robot_accelerometer": sensor["accelerometer_b"],
        "robot_velocimeter": sensor["velocimeter_b"],
        "player_team": np.array([1.0, 0.0]),
        "ball_xpos_rel_robot": np.array([1.0, ball_y, 0.0]) - robot,
        "ball_velp_rel_robot": -vel,
        "ball_velr_rel_robot": zeros,
        "target_xpos_rel_robot": zeros,
        "target_velp_rel_robot": zeros,
        "defender_xpos": np.tile(robot, 3),
        "task_index": np.eye(c.NUM_TASKS)[0],
    }
    for team in (0, 1):
        goal = c.GOAL_POS_W[team]
        info[f"goal_team_{team}_rel_robot"] = goal - robot
        info[f"goal_team_{team}_rel_ball"] = goal - [1.0, ball_y, 0.0]
        info[f"goalkeeper_team_{team}_xpos_rel_robot"] = zeros
        info[f"goalkeeper_team_{team}_velp_rel_robot"] = zeros
    return observe(data.qpos[a.joint_q], data.qvel[a.joint_v], info, np)


def test_mirrored_physics_gives_mirrored_observations():
    """Half a second under an action and under its mirror: the legs differ by under half a percent in mass."""
    model = scene.load_native_model()
    a = scene.addresses(model)
    action = np.random.default_rng(1).uniform(-0.2, 0.2, c.NUM_JOINTS)
    observations = []
    for act, ball_y in ((action, 0.3), (mirror_action(action), -0.3)):
        data = mujoco.MjData(model)
        data.qpos[a.ball_q] = [5, 0, 0, 1, 0, 0, 0]
        data.qpos[a.root_q] = [0, 0, 0.69, 1, 0, 0, 0]
        data.qpos[a.joint_q] = c.DEFAULT_POSE_RAD
        data.ctrl[:] = joint_target_rad(act)
        for _ in range(100):
            mujoco.mj_step(model, data)
        observations.append(_observation(model, data, ball_y))
    assert np.abs(observations[0] - observations[1])[SLICES["joint_pos"]].max() > 0.05  # not trivially equal
    for name in ("joint_pos", "projected_gravity_b", "ball_pos_rel_robot_h", "goal_attacked_rel_robot_h"):
        np.testing.assert_allclose(
            mirror_observation(observations[1])[SLICES[name]], observations[0][SLICES[name]], atol=0.01, err_msg=name
        )
