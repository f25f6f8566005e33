"""The three football tasks as pure JAX functions over a small view of the physics.

Each function works on ONE lane; the training script maps them over lanes with `jax.vmap`. Engines
(`envs/native_engine.py`, `envs/mjx_engine.py`) only produce `View`s, so both play the very same tasks.

The official one-step lag is kept: `sensordata` was computed before the last physics step (positions,
orientation, inertial sensors, feet), while `qpos` and `qvel` are current (joint states, `velp`, `velr`).
Keeper, defenders, window and target are geometry and time, not bodies. We play team 0, as the
competition does: it attacks the goal at x = -10.97.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from booster_soccer.envs import constants as c
from booster_soccer.envs.scene import Addresses, addresses, load_mjx_model, sensor_slices
from booster_soccer.envs.situation import Events, Memory, Situation, keeper_motion


class View(NamedTuple):
    """What an engine tells about one lane after an action (or a reset)."""

    qpos: jax.Array  # (nq,) current
    qvel: jax.Array  # (nv,) current
    sensordata: jax.Array  # (ns,) one physics step old, except right after a reset
    ball_touched: jax.Array  # () bool: robot and ball in contact during any physics step of the action


class TaskState(NamedTuple):
    """What a lane carries besides its physics."""

    task: jax.Array  # () int32, index into constants.TASKS
    target_pos_w: jax.Array  # (3,) window centre (obstacle) or target (target); zeros in the goalie task
    defender_pos_w: jax.Array  # (3, 3) used in the obstacle task only
    action_count: jax.Array  # () int32 actions since the reset
    prev_action: jax.Array  # (12,) this and the three last: see `Memory`
    hits: jax.Array  # () int32 separate contacts with the ball
    in_contact: jax.Array  # () bool
    shot_value: jax.Array  # ()
    nearest_approach_m: jax.Array  # ()
    nearest_aim_m: jax.Array  # ()

    @property
    def memory(self) -> Memory:
        """What the lane remembers for the dense reward."""
        return Memory(*(getattr(self, name) for name in Memory._fields))


class Readings(NamedTuple):
    """A `View` by name. Frames: _w world, _b body (trunk); lagging ones are marked."""

    joint_pos_rad: jax.Array  # (12,)
    joint_vel_rad_s: jax.Array  # (12,)
    imu_pos_w: jax.Array  # (3,) m, lagging
    imu_quat_wxyz: jax.Array  # (4,) lagging
    gyro_b: jax.Array  # (3,) rad/s, lagging
    velocimeter_b: jax.Array  # (3,) m/s, lagging
    accelerometer_b: jax.Array  # (3,) m/s^2, lagging
    robot_vel_w: jax.Array  # (3,) m/s of the imu site
    robot_angvel_w: jax.Array  # (3,) rad/s, lagging orientation
    ball_site_pos_w: jax.Array  # (3,) m, lagging
    ball_site_vel_w: jax.Array  # (3,) m/s
    ball_angvel_w: jax.Array  # (3,) rad/s, lagging orientation
    ball_center_pos_w: jax.Array  # (3,) m, lagging
    ball_center_vel_w: jax.Array  # (3,) m/s


@dataclass(frozen=True)
class StartMix:
    """How training episodes start. All shares are probabilities.

    Official starts are what is scored, the others what is learned from first: near the ball, on ready legs. Only
    official ones for a last while were worse (docs/experiments.md, t9), farther balls no better (g6).
    """

    task_share: tuple[float, float, float] = (0.2, 0.2, 0.6)  # goalie, obstacle, target (the hardest)
    official_pose: float = 0.5  # official drop with straight legs; else standing in the default pose
    official_place: float = 0.4  # official places of robot and ball; else the easier, wider ones below
    joint_noise_rad: float = 0.05  # uniform, on every joint
    yaw_noise_rad: float = 0.4  # uniform, where the place is not official
    ball_distance_m: tuple[float, float] = (0.3, 2.0)  # ahead of the robot
    ball_lateral_m: float = 0.3  # uniform, to either side
    target_distance_m: tuple[float, float] = (1.5, 6.0)  # from the ball
    target_angle_rad: float = 3.1  # largest, off the robot's heading; a product of two uniforms: half below 0.19 of it


# Standing height of the imu in the default pose, feet on the ground (measured on the scene).
_DEFAULT_POSE_IMU_HEIGHT_M = 0.681


def _rotate(quat_wxyz: jax.Array, vector: jax.Array) -> jax.Array:
    """Rotate `vector` (3,) by `quat_wxyz` (4,)."""
    w, xyz = quat_wxyz[0], quat_wxyz[1:]
    return vector + 2.0 * jnp.cross(xyz, jnp.cross(xyz, vector) + w * vector)


def _draw_places(uniform: Callable, mix: StartMix, is_target: jax.Array, official: jax.Array) -> tuple[jax.Array, ...]:
    """Robot (2,), ball (2,), the robot's yaw () and the target (2,), drawn with `uniform(low, high, shape)`."""
    # Robot: at the penalty spot, or anywhere facing the field's centre.
    half_x, half_y = c.FIELD_HALF_LENGTH_M - c.FIELD_BORDER_M, c.FIELD_HALF_WIDTH_M - c.FIELD_BORDER_M
    spot = jnp.array([c.PENALTY_ROBOT_X_M, 0.0])
    anywhere = jnp.stack([uniform(-half_x, half_x), uniform(-half_y, half_y)])
    robot_xy = jnp.where(is_target, anywhere, spot)
    official_yaw = jnp.where(is_target, jnp.arctan2(-robot_xy[1], -robot_xy[0]), c.PENALTY_YAW_RAD)
    yaw = official_yaw + jnp.where(official, 0.0, uniform(-mix.yaw_noise_rad, mix.yaw_noise_rad))

    # Ball: straight ahead at the official distance, or nearer and to the side. In penalty kicks the
    # ball keeps its spot and the robot moves.
    ahead = jnp.stack([jnp.cos(official_yaw), jnp.sin(official_yaw)])
    aside = jnp.stack([-ahead[1], ahead[0]])
    official_distance = jnp.where(is_target, uniform(*c.TARGET_BALL_DISTANCE_M), 2.0)
    distance = jnp.where(official, official_distance, uniform(*mix.ball_distance_m))
    lateral = jnp.where(official, 0.0, uniform(-mix.ball_lateral_m, mix.ball_lateral_m))
    ball_from_robot = distance * ahead + lateral * aside
    ball_spot = jnp.array([c.PENALTY_BALL_X_M, 0.0])
    ball_xy = jnp.where(is_target, robot_xy + ball_from_robot, ball_spot)
    at_spot = official & ~is_target  # exact: the official heading is 3.14, not pi
    robot_xy = jnp.where(at_spot, spot, ball_xy - ball_from_robot)

    # Target: official draws until inside the field (first valid of 8), or nearer and more in front.
    side = jnp.where(uniform(0.0, 1.0, (8,)) > 0.5, 1.0, -1.0)
    official_y = robot_xy[1] + side * uniform(*c.TARGET_OFFSET_Y_M, (8,))
    official_y = official_y[jnp.argmax(jnp.abs(official_y) <= half_y)]
    official_y = jnp.clip(official_y, -half_y, half_y)  # 0.4 % of the robots beside a side line drew 8 misses
    official_target = jnp.stack([uniform(-half_x, half_x), official_y])
    angle = official_yaw + uniform(-mix.target_angle_rad, mix.target_angle_rad) * uniform(0.0, 1.0)
    near = ball_xy + uniform(*mix.target_distance_m) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    near = jnp.clip(near, jnp.array([-half_x, -half_y]), jnp.array([half_x, half_y]))
    return robot_xy, ball_xy, yaw, jnp.where(official, official_target, near)


class Tasks:
    """The tasks over one scene: names are looked up once, everything else is pure functions."""

    def __init__(self):
        model = load_mjx_model()
        self.address: Addresses = addresses(model)
        self.sensor: dict[str, slice] = sensor_slices(model)
        self.nq, self.nv = model.nq, model.nv

    # --- reading the physics ------------------------------------------------------------------------
    def read(self, view: View) -> Readings:
        """Name what is in a view."""
        a = self.address

        def sensor(name: str) -> jax.Array:
            return view.sensordata[self.sensor[name]]

        robot_v, ball_v = view.qvel[a.root_v], view.qvel[a.ball_v]
        ball_quat = sensor("ball_quat_wxyz")
        ball_angvel_w = _rotate(ball_quat, ball_v[3:])
        # The site lies one radius below the centre and turns with the ball.
        site_to_center_w = _rotate(ball_quat, jnp.array([0.0, 0.0, c.BALL_RADIUS_M]))
        return Readings(
            joint_pos_rad=view.qpos[a.joint_q],
            joint_vel_rad_s=view.qvel[a.joint_v],
            imu_pos_w=sensor("imu_pos_w"),
            imu_quat_wxyz=sensor("imu_quat_wxyz"),
            gyro_b=sensor("gyro_b"),
            velocimeter_b=sensor("velocimeter_b"),
            accelerometer_b=sensor("accelerometer_b"),
            robot_vel_w=robot_v[:3],
            robot_angvel_w=_rotate(sensor("imu_quat_wxyz"), robot_v[3:]),
            ball_site_pos_w=sensor("ball_site_pos_w"),
            ball_site_vel_w=ball_v[:3],
            ball_angvel_w=ball_angvel_w,
            ball_center_pos_w=sensor("ball_site_pos_w") + site_to_center_w,
            ball_center_vel_w=ball_v[:3] + jnp.cross(ball_angvel_w, site_to_center_w),
        )

    def situation(self, view: View, state: TaskState) -> Situation:
        """What rewards and critics look at."""
        known = self.read(view)._asdict() | state._asdict()
        return Situation(**{name: known[name] for name in Situation._fields})

    # --- reset --------------------------------------------------------------------------------------
    def reset(self, key: jax.Array, mix: StartMix) -> tuple[jax.Array, jax.Array, TaskState]:
        """Draw a start: qpos (nq,), qvel (nv,) and the task's state."""
        keys = iter(jax.random.split(key, 20))

        def uniform(low, high, shape=()):
            return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

        task = jax.random.choice(next(keys), c.NUM_TASKS, p=jnp.array(mix.task_share)).astype(jnp.int32)
        official = uniform(0.0, 1.0) < mix.official_place
        robot_xy, ball_xy, yaw, target_xy = _draw_places(uniform, mix, task == c.TARGET, official)

        # Obstacle: three defenders and the window share four slots of the goal line, in random order.
        slots = jax.random.permutation(next(keys), jnp.asarray(c.DEFENDER_SLOTS_Y_M))
        window_z = c.WINDOW_BODY_Z_M + uniform(*c.WINDOW_Z_RANGE_M)
        window = jnp.stack([jnp.array(-c.FIELD_HALF_LENGTH_M), slots[3], window_z])
        goal_x, defender_z = jnp.full(3, -c.FIELD_HALF_LENGTH_M), c.DEFENDER_BODY_Z_M + c.DEFENDER_GEOM_Z_M
        defenders = jnp.stack([goal_x, slots[:3], jnp.full(3, defender_z)], axis=1)
        target = jnp.append(target_xy, 0.0)
        target = jnp.select([task == c.OBSTACLE, task == c.TARGET], [window, target], jnp.zeros(3))

        # Pose.
        drop = uniform(0.0, 1.0) < mix.official_pose
        joints = jnp.where(drop, 0.0, jnp.asarray(c.DEFAULT_POSE_RAD))
        joints = joints + uniform(-mix.joint_noise_rad, mix.joint_noise_rad, (c.NUM_JOINTS,))
        height = jnp.where(drop, c.IMU_START_HEIGHT_M, _DEFAULT_POSE_IMU_HEIGHT_M)
        a = self.address
        qpos = jnp.zeros(self.nq)
        qpos = qpos.at[a.ball_q].set(jnp.concatenate([ball_xy, jnp.array([0.0, 1.0, 0.0, 0.0, 0.0])]))
        quat = jnp.stack([jnp.cos(yaw / 2), 0.0 * yaw, 0.0 * yaw, jnp.sin(yaw / 2)])
        qpos = qpos.at[a.root_q].set(jnp.concatenate([robot_xy, height[None], quat]))
        qpos = qpos.at[a.joint_q].set(joints)
        state = TaskState(
            task=task,
            target_pos_w=target,
            defender_pos_w=defenders,
            action_count=jnp.int32(0),
            hits=jnp.int32(0),
            in_contact=jnp.array(False),
            **Memory.start((), jnp)._asdict(),
        )
        return qpos, jnp.zeros(self.nv), state

    # --- what the official `info` says -----------------------------------------------------------------------
    def keeper(self, state: TaskState) -> tuple[jax.Array, jax.Array]:
        """Keeper position y (m) and velocity (m/s) as `info` shows them: at the last step's start."""
        steps = jnp.maximum(state.action_count * c.PHYSICS_STEPS_PER_ACTION - 1, 0)
        y, speed = keeper_motion(steps * c.PHYSICS_DT_S, jnp)
        return y, jnp.where(state.action_count > 0, speed, 0.0)  # at reset the keeper stands at the centre, at rest

    def info(self, view: View, state: TaskState) -> dict[str, jax.Array]:
        """Every key of the official `info` that describes the physics, same shapes, units and frames."""
        r = self.read(view)
        robot, robot_vel = r.imu_pos_w, r.robot_vel_w
        goals = [jnp.asarray(c.GOAL_POS_W[team]) for team in (0, 1)]
        keeper_y, keeper_vel_y = self.keeper(state)
        is_goalie, is_obstacle = state.task == c.GOALIE, state.task == c.OBSTACLE
        zero = jnp.zeros(3)

        def keeper_pos(goal):
            position = goal + jnp.stack([0.0 * keeper_y, keeper_y, 0.0 * keeper_y + c.KEEPER_SITE_Z_M])
            return jnp.where(is_goalie, position - robot, zero)

        keeper_vel = jnp.stack([0.0 * keeper_vel_y, keeper_vel_y, 0.0 * keeper_vel_y])
        keeper_vel = jnp.where(is_goalie, keeper_vel - robot_vel, zero)
        has_target = ~is_goalie
        return {
            "length": jnp.array(c.FIELD_HALF_LENGTH_M),
            "width": jnp.array(c.FIELD_HALF_WIDTH_M),
            "goal_width": jnp.array(c.GOAL_HALF_WIDTH_M),
            "goal_height": jnp.array(c.GOAL_HEIGHT_M),
            "goal_depth": jnp.array(c.GOAL_DEPTH_M),
            "goal_team_0_rel_robot": goals[0] - robot,
            "goal_team_1_rel_robot": goals[1] - robot,
            "goal_team_0_rel_ball": goals[0] - r.ball_site_pos_w,
            "goal_team_1_rel_ball": goals[1] - r.ball_site_pos_w,
            "ball_xpos_rel_robot": r.ball_site_pos_w - robot,
            "ball_velp_rel_robot": r.ball_site_vel_w - robot_vel,
            "ball_velr_rel_robot": r.ball_angvel_w - r.robot_angvel_w,
            "player_team": jnp.array([1, 0]),
            "robot_accelerometer": r.accelerometer_b,
            "robot_gyro": r.gyro_b,
            "robot_velocimeter": r.velocimeter_b,
            "robot_quat": r.imu_quat_wxyz[jnp.array([1, 2, 3, 0])],  # x, y, z, w
            "goalkeeper_team_0_xpos_rel_robot": keeper_pos(goals[0]),
            "goalkeeper_team_0_velp_rel_robot": keeper_vel,
            "goalkeeper_team_1_xpos_rel_robot": keeper_pos(goals[1]),
            "goalkeeper_team_1_velp_rel_robot": keeper_vel,
            "target_xpos_rel_robot": jnp.where(has_target, state.target_pos_w - robot, zero),
            "target_velp_rel_robot": jnp.where(has_target, -robot_vel, zero),
            "defender_xpos": jnp.where(is_obstacle, state.defender_pos_w.reshape(-1), jnp.tile(robot, 3)),
            "success": self.success(r, state),
            "task_index": jax.nn.one_hot(state.task, c.NUM_TASKS),
        }

    # --- the rules ----------------------------------------------------------------------------------
    def success(self, r: Readings, state: TaskState) -> jax.Array:
        """Goal, ball in the window, or ball on the target, by task."""
        x, y, z = r.ball_site_pos_w
        goal_x = -c.FIELD_HALF_LENGTH_M
        goal = (x <= goal_x) & (x >= goal_x - c.GOAL_DEPTH_M)
        goal &= (y >= -c.GOAL_HALF_WIDTH_M) & (y < c.GOAL_HALF_WIDTH_M) & (z < c.GOAL_HEIGHT_M)
        distance = jnp.linalg.norm(r.ball_site_pos_w - state.target_pos_w)
        return jnp.select(
            [state.task == c.GOALIE, state.task == c.OBSTACLE],
            [goal, distance < c.WINDOW_RADIUS_M],
            distance < c.TARGET_RADIUS_M,
        )

    def out_of_field(self, r: Readings, state: TaskState, success: jax.Array) -> jax.Array:
        """Ball site beyond a line; a goal or the window does not count as out, a target does not excuse it."""
        x, y, _ = r.ball_site_pos_w
        outside = (jnp.abs(x) > c.FIELD_HALF_LENGTH_M) | (jnp.abs(y) > c.FIELD_HALF_WIDTH_M)
        return outside & ((state.task == c.TARGET) | ~success)

    def blocked(self, r: Readings, state: TaskState) -> jax.Array:
        """Ball against the keeper or a defender, by geometry (their hulls as boxes; the keeper's widens)."""
        x, y, z = r.ball_center_pos_w
        keeper_y, _ = self.keeper(state)
        low_z, high_z = c.KEEPER_WIDTH_Z_M
        share = jnp.clip((z - low_z) / (high_z - low_z), 0.0, 1.0)
        keeper_half = c.KEEPER_HALF_WIDTH_LOW_M + share * (c.KEEPER_HALF_WIDTH_HIGH_M - c.KEEPER_HALF_WIDTH_LOW_M)
        goal_x = -c.FIELD_HALF_LENGTH_M

        def touches(y_center, half_width, half_thickness, top_z):
            gap = jnp.stack(
                [
                    jnp.maximum(jnp.abs(x - goal_x) - half_thickness, 0.0),
                    jnp.maximum(jnp.abs(y - y_center) - half_width, 0.0),
                    jnp.maximum(z - top_z, 0.0),
                ]
            )
            return jnp.sum(gap**2) < c.BALL_RADIUS_M**2

        by_keeper = touches(keeper_y, keeper_half, c.KEEPER_HALF_THICKNESS_M, c.KEEPER_TOP_Z_M)
        defender = c.DEFENDER_HALF_WIDTH_M, c.DEFENDER_HALF_THICKNESS_M, c.DEFENDER_TOP_Z_M
        by_defender = jnp.any(jax.vmap(lambda y_center: touches(y_center, *defender))(state.defender_pos_w[:, 1]))
        return jnp.select([state.task == c.GOALIE, state.task == c.OBSTACLE], [by_keeper, by_defender], False)

    def official_terms(self, r: Readings, state: TaskState, events: Events) -> dict[str, jax.Array]:
        """The raw terms of the official reward; those of the other tasks are zero."""
        distance = jnp.linalg.norm(r.ball_site_pos_w - r.imu_pos_w)
        is_target = state.task == c.TARGET
        target_distance = jnp.linalg.norm(r.ball_site_pos_w - state.target_pos_w)
        one = jnp.array(1.0)
        speed_left = jnp.where(events.blocked, c.BLOCKED_SPEED_SHARE, 1.0)
        return {
            "goal_scored": jnp.where(is_target, 0.0, events.success),
            "ball_vel_twd_goal": jnp.where(is_target, 0.0, -r.ball_site_vel_w[0] * speed_left),
            "robot_distance_ball": jnp.where(is_target, 0.0, jnp.where(state.hits > 0, 1.5, 1 - jnp.tanh(distance))),
            "offside": events.out_of_field * one,
            "robot_fallen": jnp.where(is_target, 0.0, events.fallen),
            "ball_blocked": events.blocked * one,
            "ball_hits": jnp.where(is_target, 0.0, jnp.log1p(jnp.maximum(state.hits - 1.0, 0.0))),
            "success": jnp.where(is_target, events.success, 0.0),
            "distance": jnp.where(is_target, jnp.exp(-target_distance), 0.0),
            "steps": one,
        }

    def events(self, view: View, state: TaskState) -> Events:
        """What ends the episode at this view."""
        r = self.read(view)
        finite = (
            jnp.all(jnp.isfinite(view.qpos)) & jnp.all(jnp.isfinite(view.qvel)) & jnp.all(jnp.isfinite(view.sensordata))
        )
        # Seen once an action, a fast ball may be over the line and on a keeper or defender at once; at 500 Hz
        # they, who stand on the line, stop it before: neither goal nor out.
        blocked = self.blocked(r, state)
        success = self.success(r, state) & ~blocked
        return Events(
            fallen=r.imu_pos_w[2] <= c.FALL_HEIGHT_M,
            success=success,
            out_of_field=self.out_of_field(r, state, success) & ~blocked,
            blocked=blocked,
            diverged=~finite,
        )

    def count_touch(self, view: View, state: TaskState, action: jax.Array) -> TaskState:
        """The state after an action: time, previous action, and separate contacts with the ball."""
        return state._replace(
            action_count=state.action_count + 1,
            prev_action=action,
            hits=state.hits + (view.ball_touched & ~state.in_contact),
            in_contact=view.ball_touched,
        )
