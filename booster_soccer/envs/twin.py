"""The twin of the official environments: the same numbers, step by step, at the speed of the physics.

    env = TwinEnv("goalie", num_lanes=64, num_threads=2)
    obs, info = env.reset(seeds=range(64))
    step = env.step_action(action)        # 50 Hz: ten physics steps, the platform's PD torque at each
    step = env.step_torque(torque_nm)     # 500 Hz: exactly one `env.step` of the platform

Nine tenths of an official step are Python around the physics. Here the official compiled model (`twin_source.py`) is
stepped by MuJoCo itself (`twin_physics.py`), and everything around it is computed for all lanes at once, following the
official code operation by operation. So the numbers are equal to the bit, not merely close: a robot in contact doubles
an error of 1e-16 often enough in 5,000 steps to change a score.

* What the official code reads from `MjData` is written into `sensordata` by sensors added to the model.
* Positions, sensors and contacts are those of the state before the last integration, velocities those after
  it, as in the official environments (one physics step of lag).
* The PD torque is computed from the float32 joint state of the official observation, because that is what the
  submitted module sees.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, scene
from booster_soccer.envs import twin_source as source
from booster_soccer.envs.twin_physics import State, angular_velocity_w, point_velocity_w
from booster_soccer.errors import UserError

_SEED_LIMIT = 2**64  # the platform's match seeds are 64-bit


class Step(NamedTuple):
    """What one call brought, for B lanes. A lane that has ended repeats its last step, with reward 0."""

    obs: np.ndarray  # (B, 45 | 54 | 39) float32, the official observation
    info: dict[str, np.ndarray]  # every official key, each with a leading axis B, and `task_index` (B, 3)
    reward_terms: dict[str, np.ndarray]  # each (B,), the official raw terms of the last physics step
    reward: np.ndarray  # (B,) float64, official step rewards summed over the physics steps of this call
    terminated: np.ndarray  # (B,) bool
    truncated: np.ndarray  # (B,) bool


class TwinEnv:
    """B lanes of one official task. All methods raise `UserError` for bad input, naming the lane."""

    def __init__(self, task: str, num_lanes: int, num_threads: int = 1):
        if task not in c.TASKS:
            raise UserError(f"unknown task '{task}': choose one of {', '.join(c.TASKS)}")
        if num_lanes < 1 or num_threads < 1:
            raise UserError(f"lanes ({num_lanes}) and threads ({num_threads}) must be at least 1")
        scene.check_mujoco_version()
        self.task, self.num_lanes = task, num_lanes
        self._source = source.load(task)
        self._address = self._source.address
        self.physics = self._source.physics(num_lanes, num_threads)
        self._constant_info = {
            key: np.broadcast_to(value, (num_lanes, *np.shape(value))) for key, value in self._source.info.items()
        }  # read-only views

        self.target_pos_w = np.zeros((num_lanes, 3))  # m: window centre or target; zeros in the goalie task
        self.defender_pos_w = np.zeros((num_lanes, c.NUM_DEFENDERS, 3))  # m; zeros but in the obstacle task
        self.steps = np.zeros(num_lanes, dtype=np.int64)  # physics steps played
        self.touches = np.zeros(num_lanes, dtype=np.int64)  # robot-ball contacts, first touch to release
        self._touching = np.zeros(num_lanes, dtype=bool)
        self.ball_height_max_m = np.zeros(num_lanes)  # of the centre
        self.shot = official.Ball(*np.zeros((4, num_lanes, 3)))  # the last one; means nothing before a touch
        self._terminated = np.ones(num_lanes, dtype=bool)  # until the first reset
        self._truncated = np.zeros(num_lanes, dtype=bool)
        self._reward_terms: dict[str, np.ndarray] = {}
        self._was_reset = False

    def close(self) -> None:
        """End the threads."""
        self.physics.close()

    # --- what a reward may look at, beside `info`: target_pos_w, defender_pos_w, steps, and these -----

    @property
    def alive(self) -> np.ndarray:
        """(B,) bool: lanes whose episode goes on."""
        return ~(self._terminated | self._truncated)

    @property
    def qpos(self) -> np.ndarray:
        """(B, nq) view of the state in the official order; what is written takes effect at the next step."""
        return self.physics.state.qpos

    @property
    def qvel(self) -> np.ndarray:
        """(B, nv) view, like `qpos`."""
        return self.physics.state.qvel

    @property
    def imu_pos_w(self) -> np.ndarray:
        """(B, 3) m, with the official lag."""
        return self.physics.state.read("twin:imu_pos")

    @property
    def forward_w(self) -> np.ndarray:
        """(B, 2) where the trunk's x axis points, seen from above, of length 1."""
        ahead = self.physics.state.read(f"twin:{source.ROBOT}_X")[:, :2]
        return ahead / np.linalg.norm(ahead, axis=1, keepdims=True)

    @property
    def root_velocity_w(self) -> np.ndarray:
        """(B, 3) m/s view of the trunk's velocity; what is written takes effect at the next step."""
        return self.qvel[:, self._address.root_v][:, :3]

    @property
    def ball(self) -> official.Ball:
        """The ball of all lanes now, each (B, 3)."""
        return self._ball(self.physics.state)

    @property
    def ball_site_velocity_w(self) -> np.ndarray:
        """(B, 3) m/s: what the official score sees; the site turns with the ball."""
        return self.qvel[:, self._address.ball_v][:, :3]

    def _ball(self, state: State) -> official.Ball:
        """The ball in states (L,); its centre's velocity is the official Jacobian of its geom times qvel."""
        site, com, centre = (state.read(f"twin:ball_{name}") for name in ("pos", "com", "centre"))
        dofs = self._address.ball_v
        centre_vel = point_velocity_w(_axes_w(state, source.BALL), site, com, centre, dofs, state.qvel)
        return official.Ball(centre, centre_vel, site, state.qvel[:, dofs][:, :3])

    # --- reset --------------------------------------------------------------------------------------

    def reset(
        self, seeds: Sequence[int], start_noise_rad: float = 0.0, lanes: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Start new episodes in `lanes` (indices or mask; default all), one seed for each of them.

        A seed gives the very start of the official environment. `start_noise_rad` is the standard deviation of
        the noise on each joint, the same noise as in `envs/official.py`. Returns obs and info of all lanes.
        """
        try:
            chosen = np.arange(self.num_lanes)[slice(None) if lanes is None else lanes]
            seeds = list(seeds)
        except (IndexError, TypeError) as error:
            raise UserError(f"cannot reset: {error}; give a list of seeds, and lanes below {self.num_lanes}") from error
        if len(seeds) != len(chosen):
            raise UserError(f"{len(seeds)} seeds for {len(chosen)} lanes: give one seed for each lane to reset")
        if not (np.isfinite(start_noise_rad) and start_noise_rad >= 0.0):
            raise UserError(f"start noise is {start_noise_rad}: give a standard deviation in rad, 0 or more")
        for lane, seed in zip(chosen, seeds, strict=True):
            if not (isinstance(seed, (int, np.integer)) and 0 <= seed < _SEED_LIMIT):
                raise UserError(f"the seed of lane {lane} is {seed!r}: give an integer in [0, 2^64)")
        for lane, seed in zip(chosen, seeds, strict=True):
            self._reset_lane(lane, int(seed), start_noise_rad)
        self.steps[chosen] = self.touches[chosen] = 0
        self._touching[chosen] = self._terminated[chosen] = self._truncated[chosen] = False
        self.ball_height_max_m[chosen] = 0.0
        self._was_reset = True
        info = self._info()
        return self._obs(info), info

    def _reset_lane(self, lane: int, seed: int, start_noise_rad: float) -> None:
        qpos, drawn = self._source.draw_start(seed)
        if start_noise_rad > 0.0:
            qpos[self._address.joint_q] += official.start_noise_rad(seed, start_noise_rad)
        data = self.physics.reset(lane, qpos, drawn)
        if self.task in c.TARGET_SITE:
            self.target_pos_w[lane] = data.site(c.TARGET_SITE[self.task]).xpos
        if self.task == "obstacle":
            self.defender_pos_w[lane] = [data.geom(name).xpos for name in source.DEFENDERS]

    # --- step ---------------------------------------------------------------------------------------

    def step_torque(self, torque_nm: np.ndarray, num_steps: int = 1) -> Step:
        """Physics steps (500 Hz) with joint torques (B, 12) in N m; one of them is one `env.step` of the platform."""
        if num_steps < 1:
            raise UserError(f"nothing can be held for {num_steps} physics steps: give 1 or more")
        lanes, torque_nm = self._checked_action(torque_nm, "torque")
        return self._step(lanes, lambda state: torque_nm, num_steps)

    def step_action(self, action: np.ndarray) -> Step:
        """Hold a policy's actions (B, 12) in [-1, 1] for ten physics steps (50 Hz).

        The torque at each is what the submitted module and the SDK compute. A lane stops at the physics step
        at which its episode ends.
        """
        lanes, action = self._checked_action(action, "action")

        def torque_nm(state: State) -> np.ndarray:
            joints = state.qpos[:, self._address.joint_q], state.qvel[:, self._address.joint_v]
            return pd.platform_torque_nm(action, *(values.astype(np.float32) for values in joints))

        return self._step(lanes, torque_nm, c.PHYSICS_STEPS_PER_ACTION)

    def _checked_action(self, action: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The lanes that go on and their actions (L, 12), in the type given; an ended lane's is ignored."""
        if not self._was_reset:
            raise UserError("the twin was not reset: call reset(seeds) before the first step")
        try:
            action = np.asarray(action)
        except ValueError:  # rows of different lengths
            action = np.empty(0, object)
        if action.dtype.kind not in "fiu" or action.shape != (self.num_lanes, c.NUM_JOINTS):
            raise UserError(
                f"{what} holds {action.dtype} of shape {action.shape}, expected numbers of shape "
                f"({self.num_lanes}, {c.NUM_JOINTS}): one row for each lane"
            )
        lanes = np.flatnonzero(self.alive)
        action = action[lanes]
        finite = np.isfinite(action).all(axis=1)
        if not finite.all():
            raise UserError(f"{what} of lane {lanes[~finite][0]} holds NaN or infinity: check the policy")
        return lanes, action

    def _step(self, lanes: np.ndarray, torque_of: Callable, num_steps: int) -> Step:
        """Play `num_steps` physics steps in `lanes`; then find where each episode ended and take that step.

        Lanes are stepped beyond their end and taken back: a few wasted steps an episode, and no
        rule to check between two physics steps.
        """
        reward = np.zeros(self.num_lanes)
        if len(lanes):
            states = self.physics.simulate(lanes, torque_of, num_steps)
            lane = np.arange(len(lanes))
            nth = np.arange(num_steps)[:, None]
            touching = states.read("twin:touch")[..., 0] > 0.0
            was_touching = np.concatenate([self._touching[lanes][None], touching[:-1]])
            touches = self.touches[lanes] + np.cumsum(touching & ~was_touching, axis=0)
            terms, terminated = self._rules(states, touches, self.target_pos_w[lanes])
            truncated = self.steps[lanes] + nth + 1 >= c.EPISODE_PHYSICS_STEPS
            ended = terminated | truncated
            last = np.where(ended.any(axis=0), ended.argmax(axis=0), num_steps - 1)
            reward[lanes] = np.sum(self._total_reward(terms), axis=0, dtype=np.float64, where=nth <= last)
            is_shot = np.where(touching, nth == last, was_touching & (nth <= last))
            self._note_ball(lanes, states, is_shot, nth <= last)

            self.physics.state.write(lanes, states.at((last, lane)))
            self.steps[lanes] += last + 1
            self.touches[lanes], self._touching[lanes] = touches[last, lane], touching[last, lane]
            self._terminated[lanes], self._truncated[lanes] = terminated[last, lane], truncated[last, lane]
            for name, values in terms.items():
                kept = self._reward_terms.setdefault(name, np.zeros(self.num_lanes, dtype=values.dtype))
                kept[lanes] = values[last, lane]
        info = self._info()
        return Step(
            obs=self._obs(info),
            info=info,
            reward_terms={name: values.copy() for name, values in self._reward_terms.items()},
            reward=reward,
            terminated=self._terminated.copy(),
            truncated=self._truncated.copy(),
        )

    def _note_ball(self, lanes: np.ndarray, states: State, is_shot: np.ndarray, played: np.ndarray) -> None:
        """Keep the ball's height and its last shot of states (S, L), masks (S, L)."""
        heights = states.read("twin:ball_centre")[..., 2]
        highest = np.fmax.reduce(heights, axis=0, where=played, initial=0.0)
        self.ball_height_max_m[lanes] = np.fmax(self.ball_height_max_m[lanes], highest)
        shooting = np.flatnonzero(is_shot.any(axis=0))
        if len(shooting):
            last = len(is_shot) - 1 - is_shot[::-1, shooting].argmax(axis=0)
            for values, new in zip(self.shot, self._ball(states.at((last, shooting))), strict=True):
                values[lanes[shooting]] = new

    # --- rules --------------------------------------------------------------------------------------

    def _rules(
        self, states: State, touches: np.ndarray, target_pos_w: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Raw reward terms and termination (..., L) of states (..., L), in the official key order."""
        ball, imu, sizes = states.read("twin:ball_pos"), states.read("twin:imu_pos"), self._source.info
        distance = _norm(imu - ball)
        out = (np.abs(ball[..., 0]) > sizes["length"]) | (np.abs(ball[..., 1]) > sizes["width"])
        fallen = ~(imu[..., 2] > c.FALL_HEIGHT_M)
        not_a_number = np.isnan(states.qpos).any(axis=-1) | np.isnan(states.qvel).any(axis=-1)
        success = self._success(ball, target_pos_w)
        if self.task == "target":
            terms = {
                "offside": out,
                "success": success,
                "distance": np.exp(-np.linalg.norm(ball - target_pos_w, axis=-1)),
                "robot_distance_ball": 1 - np.tanh(distance),
            }
            return terms, not_a_number | out | success | fallen
        blocked = np.any(
            [states.read(f"twin:blocked_{geom}")[..., 0] > 0.0 for geom in source.BLOCKERS[self.task]],
            axis=0,
        )
        # float32 in the official code, until the first touch
        nearness = np.where(touches > 0, np.float32(1.5), 1 - np.tanh(distance, dtype=np.float32))
        terms = {
            "robot_distance_ball": nearness,
            "ball_vel_twd_goal": -states.qvel[..., self._address.ball_v.start],
            "offside": out & ~success,
            "ball_hits": np.log1p(np.maximum(0, touches - 1)),
            "robot_fallen": fallen,
            "goal_scored": success,
            "ball_blocked": blocked,
        }
        if self.task == "obstacle":
            terms["ball_distance_target"] = 1 - np.tanh(_norm(target_pos_w - ball))
        return terms, not_a_number | (out & ~success) | success | blocked | fallen

    def _success(self, ball: np.ndarray, target_pos_w: np.ndarray) -> np.ndarray:
        """Goal, or ball at the target, for ball site positions (..., L, 3)."""
        if self.task == "target":
            return np.linalg.norm(ball - target_pos_w, axis=-1) < c.TARGET_RADIUS_M
        if self.task == "obstacle":
            return _norm(target_pos_w - ball) < c.WINDOW_RADIUS_M
        (x, y, z), sizes = self._source.goal_pos_w[0], self._source.info
        return (
            (x - sizes["goal_depth"] <= ball[..., 0])
            & (ball[..., 0] <= x)
            & (y - sizes["goal_width"] <= ball[..., 1])
            & (ball[..., 1] < y + sizes["goal_width"])
            & (ball[..., 2] < z + sizes["goal_height"])
        )

    def _total_reward(self, terms: dict[str, np.ndarray]) -> np.ndarray:
        """The official step reward: weighted terms summed in float32; a term may have no weight."""
        weighted = [
            (self._source.reward_weights[name] * values).astype(np.float64)
            for name, values in terms.items()
            if name in self._source.reward_weights
        ]
        return np.asarray(np.sum(np.stack(weighted, axis=-1), axis=-1, dtype=np.float32))

    # --- observation --------------------------------------------------------------------------------

    def _info(self) -> dict[str, np.ndarray]:
        """The official `info` of all lanes, with the official one-step lag, and `task_index`.

        The linear velocity of the ball's and the imu's site is that of its free joint: the sites lie in
        the bodies' origins, so the official Jacobian's lever arm is zero, exactly.
        """
        state, read = self.physics.state, self.physics.state.read
        robot, ball = read("twin:imu_pos"), read("twin:ball_pos")
        robot_vel = self.qvel[:, self._address.root_v][:, :3]
        ball_vel = self.ball_site_velocity_w
        south, north = self._source.goal_pos_w
        info = dict(self._constant_info)
        info |= {
            "goal_team_0_rel_robot": south - robot,
            "goal_team_1_rel_robot": north - robot,
            "goal_team_0_rel_ball": south - ball,
            "goal_team_1_rel_ball": north - ball,
            "ball_xpos_rel_robot": ball - robot,
            "ball_velp_rel_robot": ball_vel - robot_vel,
            "ball_velr_rel_robot": angular_velocity_w(_axes_w(state, source.BALL), self._address.ball_v, state.qvel)
            - angular_velocity_w(_axes_w(state, source.ROBOT), self._address.root_v, state.qvel),
            "robot_accelerometer": read("robot_0:accelerometer").astype(np.float32),
            "robot_gyro": read("robot_0:torso_gyro").astype(np.float32),
            "robot_velocimeter": read("robot_0:torso_vel").astype(np.float32),
            "robot_quat": read("robot_0:torso_quat")[:, [1, 2, 3, 0]].astype(np.float32),  # to x, y, z, w
        }
        for team, keeper in enumerate(source.KEEPERS):
            pos_rel, vel_rel = np.zeros_like(robot), np.zeros_like(robot)  # there is no keeper: zeros
            if self.task == "goalie":
                pos_rel = read(f"twin:{keeper}_pos") - robot
                vel_rel = -robot_vel
                vel_rel[:, 1] += self.qvel[:, self.physics.driven_v[team]]  # the keeper slides along y
            info[f"goalkeeper_team_{team}_xpos_rel_robot"] = pos_rel
            info[f"goalkeeper_team_{team}_velp_rel_robot"] = vel_rel
        has_target = self.task in c.TARGET_SITE
        info["target_xpos_rel_robot"] = self.target_pos_w - robot if has_target else np.zeros_like(robot)
        info["target_velp_rel_robot"] = -robot_vel if has_target else np.zeros_like(robot)
        has_defenders = self.task == "obstacle"
        info["defender_xpos"] = (
            self.defender_pos_w.reshape(self.num_lanes, -1).copy()
            if has_defenders
            else np.hstack([robot] * c.NUM_DEFENDERS)
        )
        info["success"] = self._success(ball, self.target_pos_w)
        return info

    def _obs(self, info: dict[str, np.ndarray]) -> np.ndarray:
        """The official observation of all lanes: joint positions, joint velocities, and parts of `info`."""
        target = [info["target_xpos_rel_robot"], info["target_velp_rel_robot"]]
        goal = [info["goal_team_0_rel_robot"], info["goal_team_0_rel_ball"]]
        keeper = [info["goalkeeper_team_0_xpos_rel_robot"], info["goalkeeper_team_0_velp_rel_robot"]]
        parts = {
            "goalie": goal + keeper,
            "obstacle": goal + target + [info["defender_xpos"]],
            "target": target,
        }[self.task]
        ball = [info[f"ball_{what}_rel_robot"] for what in ("xpos", "velp", "velr")]
        joints = [self.qpos[:, self._address.joint_q], self.qvel[:, self._address.joint_v]]
        return np.concatenate(joints + ball + parts, axis=1, dtype=np.float32)


def _axes_w(state: State, body: str) -> list[np.ndarray]:
    """X, Y and Z axis of a body, each (..., 3)."""
    return [state.read(f"twin:{body}_{axis}") for axis in "XYZ"]


def _norm(vector: np.ndarray) -> np.ndarray:
    """Length (...) of vectors (..., 3), by the dot product that `np.linalg.norm` uses for one vector."""
    return np.sqrt(np.vecdot(vector, vector))
