"""Our view of the physics against the official environments: `info` key by key, the lag, rules and starts."""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs import scene
from booster_soccer.envs.pd import torque_nm
from booster_soccer.envs.situation import Memory
from booster_soccer.envs.tasks import StartMix, Tasks, TaskState, View

POSITIONS = [f"goal_team_{t}_rel_{x}" for t in (0, 1) for x in ("robot", "ball")] + [
    "ball_xpos_rel_robot",
    "target_xpos_rel_robot",
    "defender_xpos",
]
VELOCITIES = ["ball_velp_rel_robot", "ball_velr_rel_robot", "target_velp_rel_robot", "robot_gyro", "robot_velocimeter"]
KEEPER = [f"goalkeeper_team_{t}_{x}_rel_robot" for t in (0, 1) for x in ("xpos", "velp")]
# Beyond this the official keeper's hull pushes against the goal post: its position is overwritten before
# every step, but the velocity that `info` shows is the one the contact left. We do not model that.
KEEPER_MEETS_POST_Y_M = 0.83
FIELD = ["length", "width", "goal_width", "goal_height", "goal_depth", "player_team", "success"]


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    """float64 throughout: differences below are the model's, not rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def tasks(double_precision):
    return Tasks()


class OfficialSide:
    """An official environment and our scene beside it, with the state copied over."""

    def __init__(self, env, task: str, seed: int):
        self.env, self.task = env, task
        self.obs, self.info = env.reset(seed=seed)
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.address = scene.official_addresses(self.model)
        self.our_model = scene.load_native_motor_model()
        self.our_data = mujoco.MjData(self.our_model)
        self.our_address = scene.addresses(self.our_model)
        self.rng = np.random.default_rng(seed)

    def copy_state(self) -> None:
        """Official qpos, qvel and warm start into our scene."""
        ours, a, b = self.our_data, self.our_address, self.address
        for name in ("ball", "root", "joint"):
            ours.qpos[getattr(a, f"{name}_q")] = self.data.qpos[getattr(b, f"{name}_q")]
            ours.qvel[getattr(a, f"{name}_v")] = self.data.qvel[getattr(b, f"{name}_v")]

    def act(self, target: np.ndarray, both: bool = False) -> bool:
        """One action of ten physics steps in the official environment (and in ours); False when it ended."""
        for _ in range(c.PHYSICS_STEPS_PER_ACTION):
            torque = torque_nm(target, self.obs[:12], self.obs[12:24], np).astype(np.float32)
            self.obs, _, terminated, _, self.info = self.env.step(torque)
            if both:
                self.our_data.ctrl[:] = torque
                mujoco.mj_step(self.our_model, self.our_data)
            if terminated:
                return False
        return True

    def random_target(self) -> np.ndarray:
        return c.DEFAULT_POSE_RAD + self.rng.normal(0, 0.08, c.NUM_JOINTS)

    def view(self) -> View:
        d = self.our_data
        return View(jnp.asarray(d.qpos), jnp.asarray(d.qvel), jnp.asarray(d.sensordata), jnp.array(False))

    def task_state(self, action_count: int) -> TaskState:
        """The task's state as the official environment drew it."""
        target, defenders = np.zeros(3), np.zeros((3, 3))
        if self.task == "obstacle":
            goal_x = -c.FIELD_HALF_LENGTH_M
            target = np.array([goal_x, self.env.goal_pos[3], c.WINDOW_BODY_Z_M + self.env.goal_pos[4]])
            z = c.DEFENDER_BODY_Z_M + c.DEFENDER_GEOM_Z_M
            defenders = np.array([[goal_x, self.env.goal_pos[i], z] for i in range(3)])
        elif self.task == "target":
            target = self.env.goal_pos
        return TaskState(
            task=jnp.int32(c.TASKS.index(self.task)),
            target_pos_w=jnp.asarray(target),
            defender_pos_w=jnp.asarray(defenders),
            action_count=jnp.int32(action_count),
            hits=jnp.int32(0),
            in_contact=jnp.array(False),
            **Memory.start((), jnp)._asdict(),
        )


def push_ball(side: OfficialSide) -> None:
    """Make the ball roll in a random direction, as a kick leaves it, so that its site turns."""
    q, v = side.address.ball_q, side.address.ball_v
    velocity = np.append(side.rng.normal(0, 1.0, 2), 0.0)
    spin_w = np.array([-velocity[1], velocity[0], 0.0]) / c.BALL_RADIUS_M
    side.data.qpos[q][3:] = [1, 0, 0, 0]  # site straight below the centre: at rest while the ball rolls
    side.data.qvel[v] = np.concatenate([np.zeros(3), spin_w])


@pytest.mark.parametrize("task", c.TASKS)
def test_info_equals_the_official_after_forward(official_envs, tasks, task):
    """At least 100 states per task: positions within 1e-6, gyro and velocimeter within 1e-4."""
    states, accelerometer_error = 0, 0.0
    info_of = jax.jit(tasks.info)
    for seed in range(6):
        side = OfficialSide(official_envs[task], task, seed)
        for action in range(40):
            if not side.act(side.random_target()):
                break
            if action == 5:
                push_ball(side)
            stepped = side.info
            side.copy_state()
            side.our_data.ctrl[:] = side.data.ctrl[-c.NUM_JOINTS :]
            # The keeper's own place is compared before forward: it is written at the start of each step.
            mujoco.mj_forward(side.model, side.data)
            mujoco.mj_forward(side.our_model, side.our_data)
            official = side.env._get_info()
            state = side.task_state(action + 1)
            ours = {k: np.asarray(v) for k, v in info_of(side.view(), state).items()}
            assert set(ours) == set(official) | {"task_index"}
            for key in POSITIONS:
                np.testing.assert_allclose(ours[key], official[key], atol=1e-6, err_msg=key)
                assert ours[key].shape == np.shape(official[key])
            for key in VELOCITIES:
                np.testing.assert_allclose(ours[key], official[key], atol=1e-4, err_msg=key)
            for key in FIELD:
                np.testing.assert_array_equal(ours[key], official[key], err_msg=key)
            np.testing.assert_allclose(ours["robot_quat"], official["robot_quat"], atol=1e-6)
            keeper_at_post = abs(float(tasks.keeper(state)[0])) > KEEPER_MEETS_POST_Y_M
            for key in KEEPER:
                if "velp" in key and keeper_at_post:
                    continue
                # Official: before forward, relative to the robot before the last step.
                goal_key = f"goal_team_{key.split('_')[2]}_rel_robot"
                ours_abs = ours[key] - (ours[goal_key] if "xpos" in key and task == "goalie" else 0)
                theirs = stepped[key] - (stepped[goal_key] if "xpos" in key and task == "goalie" else 0)
                np.testing.assert_allclose(ours_abs, theirs, atol=1e-6, err_msg=key)
            accelerometer_error = max(
                accelerometer_error, np.abs(ours["robot_accelerometer"] - official["robot_accelerometer"]).max()
            )
            states += 1
    print(f"\n{task}: {states} states, accelerometer error up to {accelerometer_error:.2g} m/s^2")
    assert states >= 100


@pytest.mark.parametrize("task", c.TASKS)
def test_stepping_reproduces_the_official_lag(official_envs, tasks, task):
    """Ten steps of both from one state: our lagging sensors equal the official lagging info."""
    info_of = jax.jit(tasks.info)
    side = OfficialSide(official_envs[task], task, seed=3)
    velocity_errors = []
    for action in range(30):
        if action == 3:
            push_ball(side)
        side.copy_state()
        assert side.act(side.random_target(), both=True)
        state = side.task_state(action + 1)
        ours = {k: np.asarray(v) for k, v in info_of(side.view(), state).items()}
        keeper_at_post = abs(float(tasks.keeper(state)[0])) > KEEPER_MEETS_POST_Y_M
        for key in POSITIONS + KEEPER:
            if not ("velp" in key and keeper_at_post):
                np.testing.assert_allclose(ours[key], side.info[key], atol=1e-4, err_msg=key)
        velocity_errors.append([np.abs(ours[key] - side.info[key]).max() for key in VELOCITIES])
    # A foot's touch-down may fall one step earlier or later; everything else agrees closely.
    assert np.median(velocity_errors, axis=0).max() < 1e-3
    assert np.max(velocity_errors) < 0.1
    # The lag is real: fresh sensors are measurably elsewhere than the official info.
    mujoco.mj_forward(side.our_model, side.our_data)
    fresh = np.asarray(info_of(side.view(), state)["ball_xpos_rel_robot"])
    assert np.abs(fresh - side.info["ball_xpos_rel_robot"]).max() > 5e-4


@pytest.mark.parametrize("task", c.TASKS)
def test_official_starts(official_envs, tasks, task):
    """Our official starts lie where the official environment's do, over many draws."""
    env = official_envs[task]
    official = []
    for seed in range(150):
        env.reset(seed=seed)
        address = scene.official_addresses(env.sim.model._model)
        official.append(
            np.concatenate([env.sim.data._data.qpos[address.root_q], env.sim.data._data.qpos[address.ball_q]])
        )
    share = np.eye(c.NUM_TASKS)[c.TASKS.index(task)]
    mix = StartMix(task_share=tuple(share), official_pose=1.0, official_place=1.0, joint_noise_rad=0.0)
    qpos, qvel, state = jax.vmap(lambda k: tasks.reset(k, mix))(jax.random.split(jax.random.key(0), 400))
    ours = np.concatenate([qpos[:, tasks.address.root_q], qpos[:, tasks.address.ball_q]], axis=1)
    official = np.array(official)
    assert not np.asarray(qvel).any() and (np.asarray(state.task) == c.TASKS.index(task)).all()
    np.testing.assert_allclose(ours[:, 2], official[0, 2])
    ahead = lambda q: np.linalg.norm(q[:, 7:9] - q[:, 0:2], axis=1)  # noqa: E731
    if task != "target":
        np.testing.assert_allclose(ours[0], official[0], atol=1e-6)
        assert np.ptp(ours, axis=0).max() < 1e-6
    else:
        assert ahead(ours).min() >= 0.5 - 1e-5 and ahead(ours).max() <= 2.0 + 1e-5
        assert abs(ahead(ours).mean() - ahead(official).mean()) < 0.2
        target_y = np.asarray(state.target_pos_w)[:, 1] - ours[:, 1]
        assert (np.abs(target_y) >= 2.0 - 1e-4).all() and (np.abs(target_y) <= 3.5 + 1e-4).all()
        assert np.abs(np.asarray(state.target_pos_w)[:, 1]).max() <= c.FIELD_HALF_WIDTH_M - 0.5 + 1e-4


def test_keeper_by_hand(tasks):
    state = OfficialSideState(tasks, "goalie", action_count=50)
    y, velocity = tasks.keeper(state)
    t = 499 * 0.002  # the start of physics step 500
    assert float(y) == pytest.approx(np.sin(2 * np.pi * 0.3 * t), abs=1e-5)
    assert float(velocity) == pytest.approx(2 * np.pi * 0.3 * np.cos(2 * np.pi * 0.3 * t), abs=1e-5)
    y, velocity = tasks.keeper(state._replace(action_count=jnp.int32(0)))
    assert float(y) == 0 and float(velocity) == 0


def OfficialSideState(tasks: Tasks, task: str, action_count: int = 1) -> TaskState:
    """A task state without an environment."""
    mix = StartMix(task_share=tuple(np.eye(c.NUM_TASKS)[c.TASKS.index(task)]), official_place=1.0)
    return tasks.reset(jax.random.key(0), mix)[2]._replace(action_count=jnp.int32(action_count))


def _events(tasks, task, ball_center, imu_z=0.65, state=None):
    """Events with the ball's centre at `ball_center`, site straight below it."""
    state = state or OfficialSideState(tasks, task)
    sensordata = np.zeros(max(s.stop for s in tasks.sensor.values()))
    sensordata[tasks.sensor["imu_quat_wxyz"]] = [1, 0, 0, 0]
    sensordata[tasks.sensor["ball_quat_wxyz"]] = [1, 0, 0, 0]
    sensordata[tasks.sensor["imu_pos_w"]] = [-6, 0, imu_z]
    sensordata[tasks.sensor["ball_site_pos_w"]] = np.asarray(ball_center) - [0, 0, c.BALL_RADIUS_M]
    view = View(jnp.zeros(tasks.nq), jnp.zeros(tasks.nv), jnp.asarray(sensordata), jnp.array(False))
    return {k: bool(v) for k, v in tasks.events(view, state)._asdict().items()}


def test_rules_by_hand(tasks):
    r = c.BALL_RADIUS_M
    nothing = {"fallen": False, "success": False, "out_of_field": False, "blocked": False, "diverged": False}
    assert _events(tasks, "goalie", [-8.77, 0, r]) == nothing
    assert _events(tasks, "goalie", [-8.77, 0, r], imu_z=0.40) == nothing | {"fallen": True}
    assert _events(tasks, "goalie", [-11.2, 1.3, r]) == nothing | {"success": True}
    assert _events(tasks, "goalie", [-11.2, 1.7, r]) == nothing | {"out_of_field": True}
    assert _events(tasks, "goalie", [-10.9, 0.0, r]) == nothing | {"blocked": True}  # keeper at y = 0
    assert _events(tasks, "goalie", [-11.0, 0.0, r]) == nothing | {"blocked": True}  # over the line and on the keeper
    assert _events(tasks, "goalie", [-10.9, 0.7, r]) == nothing
    assert _events(tasks, "target", [0, -6.9, r]) == nothing | {"out_of_field": True}
    obstacle = OfficialSideState(tasks, "obstacle")
    window, defender = np.asarray(obstacle.target_pos_w), np.asarray(obstacle.defender_pos_w)[0]
    assert _events(tasks, "obstacle", window + [0.2, 0, r], state=obstacle) == nothing | {"success": True}
    assert _events(tasks, "obstacle", [-10.88, defender[1], r], state=obstacle) == nothing | {"blocked": True}
    assert _events(tasks, "obstacle", [-11.0, defender[1], r], state=obstacle) == nothing | {"blocked": True}
    assert _events(tasks, "obstacle", [-11.2, window[1], r], state=obstacle) == nothing | {"out_of_field": True}
    target = OfficialSideState(tasks, "target")
    there = np.asarray(target.target_pos_w)
    assert _events(tasks, "target", there + [0.35, 0, r], state=target) == nothing | {"success": True}
    assert _events(tasks, "target", there + [0.45, 0, r], state=target) == nothing
    broken = _events(tasks, "target", [np.nan, 0, r], state=target)
    assert broken["diverged"]
