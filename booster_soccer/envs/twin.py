"""The twin of the official environments: the same numbers, step by step, at the speed of the physics.

    env = TwinEnv("goalie", num_lanes=64, num_threads=2)
    obs, info = env.reset(seeds=range(64))
    step = env.step_action(action)        # 50 Hz: ten physics steps, the platform's PD torque at each
    step = env.step_torque(torque_nm)     # 500 Hz: exactly one `env.step` of the platform

Nine tenths of an official step are Python around the physics. Here the official compiled model (taken from
the installed package at run time, nothing of it is copied) is stepped by MuJoCo itself, and
everything around them is computed for all lanes at once. The arithmetic follows the official code operation
by operation, so the numbers are equal to the bit, not merely close: a robot in contact doubles an error of
1e-16 often enough in 5,000 steps to change a score (`tests/test_twin.py`, `benchmarks/twin_equality.py`).

How it is done:

* A lane is a row of `_State`. Each thread owns one model and one `MjData` through which all its lanes pass; so
  the working set stays in the cache (measured: 25,000 physics steps/s on one core, against 17,000 with one
  `MjData` per lane), and memory does not grow with the lanes. Nothing is lost, because the solver's warm
  start is part of the row.
* A row goes in and comes out as one copy of a stretch of `MjData`'s memory: little Python per step, and the
  interpreter lock changes hands once a step (`mj_setState` and `mj_getState` would let it go as well).
* Threads share the physics only, and each takes the next lane when it is done: two cores of one machine are
  rarely equally fast. Rules and observation follow for all lanes at once. Shards that overlap one's
  rules with another's physics, and worker processes over shared memory, were tried (docs/twin.md).
* What the official code reads from `MjData` is written into `sensordata` by sensors added to the model.
  Sensors have no part in the dynamics.
* Positions, sensors and contacts are those of the state before the last integration, velocities those after
  it, as in the official environments (one physics step of lag).
* The PD torque is computed from the float32 joint state of the official observation, because that is what the
  submitted module sees.
"""

import concurrent.futures
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import NamedTuple

import mujoco
import numpy as np
from sai_mujoco.utils.v0.rotations import euler2quat

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, scene
from booster_soccer.errors import UserError

_SEED_LIMIT = 2**64  # the platform's match seeds are 64-bit

_ROBOT, _BALL = "robot_0:Trunk", "soccer_ball"  # official body names
_DEFENDERS = tuple(f"defender_geom{i}" for i in range(c.NUM_DEFENDERS))
_KEEPERS = tuple(f"goalkeeper_team_{team}" for team in (0, 1))
_TARGET_SITE = {"obstacle": "goalarea_site", "target": "target0"}
_BLOCKERS = {"goalie": ("goalkeeper_team_0_geom",), "obstacle": _DEFENDERS, "target": ()}


class Step(NamedTuple):
    """What one call brought, for B lanes. A lane that has ended repeats its last step, with reward 0."""

    obs: np.ndarray  # (B, 45 | 54 | 39) float32, the official observation
    info: dict[str, np.ndarray]  # every official key, each with a leading axis B, and `task_index` (B, 3)
    reward_terms: dict[str, np.ndarray]  # each (B,), the official raw terms of the last physics step
    reward: np.ndarray  # (B,) float64, official step rewards summed over the physics steps of this call
    terminated: np.ndarray  # (B,) bool
    truncated: np.ndarray  # (B,) bool


class _Source(NamedTuple):
    """What is taken from one official environment, once per task and process."""

    env: official.TaskIndex  # draws the starts, through its own sampling methods
    model: mujoco.MjModel  # the official compiled model with our sensors
    start_qpos: np.ndarray  # (nq,) after an official reset
    goal_pos_w: tuple[np.ndarray, np.ndarray]  # south (team 0) and north (team 1) goal sites


def _add_sensors(spec: mujoco.MjSpec, task: str) -> None:
    """Sensors for what the official code reads elsewhere in `MjData`; all names begin with `twin:`."""
    sensor, obj = mujoco.mjtSensor, mujoco.mjtObj

    def add(name: str, kind: mujoco.mjtSensor, objtype: mujoco.mjtObj, objname: str) -> mujoco.MjsSensor:
        return spec.add_sensor(name=f"twin:{name}", type=kind, objtype=objtype, objname=objname)

    def add_contact(name: str, objtype: mujoco.mjtObj, objname: str) -> None:
        touching = add(name, sensor.mjSENS_CONTACT, objtype, objname)
        touching.reftype, touching.refname = obj.mjOBJ_GEOM, "ball"
        # what to report (found: the number of contacts), how to reduce them (not), how many to report
        touching.intprm[:3] = (1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND), 0, 1)

    add("imu_pos", sensor.mjSENS_FRAMEPOS, obj.mjOBJ_SITE, "robot_0:imu")
    add("ball_pos", sensor.mjSENS_FRAMEPOS, obj.mjOBJ_SITE, "ball")
    add("ball_centre", sensor.mjSENS_FRAMEPOS, obj.mjOBJ_GEOM, "ball")
    add("ball_com", sensor.mjSENS_SUBTREECOM, obj.mjOBJ_BODY, _BALL)
    for body in (_ROBOT, _BALL):
        for axis in "XYZ":
            kind = getattr(sensor, f"mjSENS_FRAME{axis}AXIS")
            add(f"{body}_{axis}", kind, obj.mjOBJ_XBODY, body)
    add_contact("touch", obj.mjOBJ_XBODY, _ROBOT)  # XBODY means the whole subtree
    for geom in _BLOCKERS[task]:
        add_contact(f"blocked_{geom}", obj.mjOBJ_GEOM, geom)
    if task == "goalie":
        for keeper in _KEEPERS:
            add(f"{keeper}_pos", sensor.mjSENS_FRAMEPOS, obj.mjOBJ_SITE, f"{keeper}_site")


@functools.cache
def _source(task: str) -> _Source:
    """Load the official environment of a task and compile its model with our sensors (about a second)."""
    env = official.make(task)
    env.reset(seed=0)
    base, spec = env.unwrapped, env.unwrapped.mjcf_model
    data = base.sim.data._data
    _add_sensors(spec, task)
    model = spec.compile()
    # The official reset writes these into its compiled model (team, friction, defenders, target).
    for field in ("geom_pos", "geom_friction", "site_pos"):
        getattr(model, field)[:] = getattr(base.sim.model._model, field)
    goals = tuple(data.site(f"goal_post_{side}").xpos.copy() for side in ("south", "north"))
    return _Source(env, model, data.qpos.copy(), goals)


class _Layout(NamedTuple):
    """Where in the memory of an `MjData`, counted in numbers from its qpos, the state lies."""

    qpos: slice
    qvel: slice
    ctrl: slice
    size: int  # up to ctrl's end; the solver's warm start and a little padding lie in between


def _layout(data: mujoco.MjData) -> _Layout:
    """MuJoCo allocates an `MjData` in one piece, in a fixed order; where, its arrays' addresses tell."""

    def where(values: np.ndarray) -> slice:
        start = (values.ctypes.data - data.qpos.ctypes.data) // values.itemsize
        return slice(start, start + values.size)

    qpos, qvel, warmstart, ctrl = map(where, (data.qpos, data.qvel, data.qacc_warmstart, data.ctrl))
    gaps = qvel.start - qpos.stop, warmstart.start - qvel.stop, ctrl.start - warmstart.stop
    more_state = data.act, data.mocap_pos, data.plugin_state, data.userdata, data.eq_active
    # Arrays begin at multiples of 64 bytes.
    if not all(0 <= gap < 8 for gap in gaps) or any(values.size for values in more_state):
        raise UserError(
            f"mujoco {mujoco.__version__} orders an MjData in another way, or the official model has more state: "
            "install the pinned versions (constraints.txt), or adapt envs/twin.py"
        )
    return _Layout(qpos, qvel, ctrl, ctrl.stop)


def _memory(data: mujoco.MjData) -> np.ndarray:
    """The memory of an `MjData` (n,) that the next physics step depends on, but for the time."""
    return np.lib.stride_tricks.as_strided(data.qpos, (_layout(data).size,))


class _State:
    """What the next physics step depends on, and the sensors of the last one; leading axes alike.

    qpos (..., nq), qvel (..., nv) and ctrl (..., nu) are views into `memory`.
    """

    def __init__(self, layout: _Layout, time: np.ndarray, memory: np.ndarray, sensors: np.ndarray):
        self.layout = layout
        self.time = time  # (..., 1) s
        self.memory = memory  # (..., n) as `_memory` gives it
        self.sensors = sensors  # (..., nsensordata)
        self.qpos, self.qvel, self.ctrl = (memory[..., part] for part in layout[:3])

    @classmethod
    def zeros(cls, data: mujoco.MjData, *shape: int) -> "_State":
        """For states like that of `data`."""
        layout = _layout(data)
        sizes = (1,), (layout.size,), data.sensordata.shape
        return cls(layout, *(np.zeros((*shape, *size)) for size in sizes))

    def at(self, index) -> "_State":
        """The part at an index of the leading axes."""
        return _State(self.layout, self.time[index], self.memory[index], self.sensors[index])

    def write(self, index, new: "_State") -> None:
        """Overwrite the part at an index of the leading axes."""
        self.time[index], self.memory[index], self.sensors[index] = new.time, new.memory, new.sensors


class _Worker:
    """One thread's model and data; its lanes pass through them one after another."""

    def __init__(self, model: mujoco.MjModel, task: str):
        self.model = model
        self.data = mujoco.MjData(model)
        self._views = _lane_views(model, task)
        self._memory, self._sensors = _memory(self.data).data, self.data.sensordata.data

    def advance(self, rows: Iterator[tuple]) -> None:
        """One physics step of each lane in `rows`: its values, the time and the memory before, and the time, the
        memory and the sensors to write after it. Several workers may take their rows from one iterator.

        The official `step` is `mj_step1`, ctrl, `mj_step2`: the same arithmetic as ctrl, `mj_step`, but for a state
        that MuJoCo does not accept (`TwinEnv._commanded`).
        """
        model, data, views, memory, sensors = self.model, self.data, self._views, self._memory, self._sensors
        step = mujoco.mj_step
        for values, time_before, memory_before, time_after, memory_after, sensors_after in rows:
            for view, value in zip(views, values, strict=True):
                view[:] = value
            data.time = time_before
            memory[:] = memory_before
            step(model, data)
            time_after[:] = data.time
            memory_after[:] = memory
            sensors_after[:] = sensors

    def forward(self, lane_values: list[memoryview], qpos: np.ndarray, after: _State) -> None:
        """One lane at rest at time 0, as after an official reset; writes into `after` (no leading axis)."""
        mujoco.mj_resetData(self.model, self.data)
        for view, value in zip(self._views, lane_values, strict=True):
            view[:] = value
        self.data.qpos[:] = qpos
        after.time[:] = 0.0
        after.memory[:] = self._memory  # now: without a warm start
        mujoco.mj_forward(self.model, self.data)
        after.sensors[:] = self.data.sensordata


def _lane_views(model: mujoco.MjModel, task: str) -> list[memoryview]:
    """The parts of the model that the official reset draws anew, as views into it.

    Memory views, assigned in half the time of arrays: these few numbers are at every step of every lane.
    """
    views = [model.geom("field_base").friction]
    if task == "obstacle":
        views += [model.geom(name).pos for name in _DEFENDERS]
    if task in _TARGET_SITE:
        views.append(model.site(_TARGET_SITE[task]).pos)
    return [view.data for view in views]


class TwinEnv:
    """B lanes of one official task. All methods raise `UserError` for bad input, naming the lane."""

    def __init__(self, task: str, num_lanes: int, num_threads: int = 1):
        if task not in c.TASKS:
            raise UserError(f"unknown task '{task}': choose one of {', '.join(c.TASKS)}")
        if num_lanes < 1 or num_threads < 1:
            raise UserError(f"lanes ({num_lanes}) and threads ({num_threads}) must be at least 1")
        scene.check_mujoco_version()
        self.task, self.num_lanes = task, num_lanes
        self._source = _source(task)
        model = self._source.model
        self._workers = [_Worker(copy(model), task) for _ in range(num_threads)]
        self._pool = ThreadPoolExecutor(num_threads)  # starts its threads only when they are needed
        self._address_model(model)
        self._constants()

        self._state = _State.zeros(self._workers[0].data, num_lanes)
        self._zero_pose = _memory(self._workers[0].data).copy()
        self._rng: list[np.random.Generator | None] = [None] * num_lanes
        self._lane_values: list[list[memoryview]] = [[]] * num_lanes  # drawn by each lane's reset, for `_lane_views`
        self._target_pos_w = np.zeros((num_lanes, 3))  # window centre or target
        self._defender_pos_w = np.zeros((num_lanes, 3 * c.NUM_DEFENDERS))
        self.steps = np.zeros(num_lanes, dtype=np.int64)  # physics steps played
        self.touches = np.zeros(num_lanes, dtype=np.int64)  # robot-ball contacts, first touch to release
        self._touching = np.zeros(num_lanes, dtype=bool)
        self.ball_height_max_m = np.zeros(num_lanes)  # of the centre
        self.shot = official.Ball(*np.zeros((4, num_lanes, 3)))  # the last one; means nothing before a touch
        self._terminated = np.ones(num_lanes, dtype=bool)  # until the first reset
        self._truncated = np.zeros(num_lanes, dtype=bool)
        self._reward_terms: dict[str, np.ndarray] = {}
        self._was_reset = False

    # --- set-up -------------------------------------------------------------------------------------

    def _address_model(self, model: mujoco.MjModel) -> None:
        where = scene.official_addresses(model)
        self._joint_q, self._joint_v = where.joint_q, where.joint_v
        self._ball_q, self._ball_v = where.ball_q, where.ball_v
        self._root_q, self._root_v = where.root_q, where.root_v
        keepers = [model.joint(f"{keeper}_joint") for keeper in _KEEPERS] if self.task == "goalie" else []
        self._keeper_q = np.array([int(joint.qposadr[0]) for joint in keepers], dtype=int)
        self._keeper_v = np.array([int(joint.dofadr[0]) for joint in keepers], dtype=int)
        self._actuators = np.array([model.actuator(f"robot_0:{name}").id for name in c.JOINT_NAMES])
        self._sensor = scene.sensor_slices(model)

    def _constants(self) -> None:
        base = self._source.env.unwrapped
        parameters = base.parameters_dict["env_parameters"]
        self._field, self._goal = parameters["field"], parameters["goal"]
        self._reward_weights = base.reward_config
        same = {
            "length": self._field["length"],
            "width": self._field["width"],
            "goal_width": self._goal["width"],
            "goal_height": self._goal["height"],
            "goal_depth": self._goal["depth"],
            "player_team": np.array([1, 0]),  # team 0
            "task_index": self._source.env.task_index,
        }
        self._constant_info = {
            key: np.broadcast_to(np.asarray(value), (self.num_lanes, *np.shape(value))) for key, value in same.items()
        }  # read-only views
        self.observation_space = base.observation_space  # of one lane
        self.action_space = base.action_space  # torque in N m, of one lane
        self._torque_low, self._torque_high = (
            self._source.model.actuator_ctrlrange[self._actuators, side] for side in (0, 1)
        )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    # --- reset --------------------------------------------------------------------------------------

    def reset(
        self,
        seeds: Sequence[int | None],
        start_noise_rad: float = 0.0,
        lanes: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Start new episodes in `lanes` (indices or mask; default all), one seed for each of them.

        A seed gives the very start of the official environment; None continues the lane's random stream, as
        an official `reset()` without a seed does. `start_noise_rad` is the standard deviation of the noise
        on each joint, the same noise as in `envs/official.py`. Returns obs and info of all lanes.
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
        seeds = [_checked_seed(seed, lane) for seed, lane in zip(seeds, chosen, strict=True)]
        if start_noise_rad > 0.0 and None in seeds:
            raise UserError("start noise is a function of the seed: give every lane to reset a seed")
        for lane, seed in zip(chosen, seeds, strict=True):
            self._reset_lane(lane, seed, start_noise_rad)
        self.steps[chosen] = self.touches[chosen] = 0
        self._touching[chosen] = self._terminated[chosen] = self._truncated[chosen] = False
        self.ball_height_max_m[chosen] = 0.0
        self._was_reset = True
        info = self._info()
        return self._obs(info), info

    def _reset_lane(self, lane: int, seed: int | None, start_noise_rad: float) -> None:
        if seed is not None or self._rng[lane] is None:
            self._rng[lane] = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        qpos, drawn = self._draw_start(self._rng[lane])
        self._lane_values[lane] = [np.ascontiguousarray(values, dtype=np.float64).data for values in drawn]
        if start_noise_rad > 0.0:
            qpos[self._joint_q] += official.start_noise_rad(seed, start_noise_rad)
        worker = self._workers[0]
        worker.forward(self._lane_values[lane], qpos, self._state.at(lane))
        if self.task in _TARGET_SITE:
            self._target_pos_w[lane] = worker.data.site(_TARGET_SITE[self.task]).xpos
        if self.task == "obstacle":
            self._defender_pos_w[lane] = np.concatenate([worker.data.geom(name).xpos for name in _DEFENDERS])

    def _draw_start(self, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        """Start qpos (nq,) and the values for `_lane_views`, drawn by the official methods in their order."""
        base = self._source.env.unwrapped
        base.np_random = rng
        friction, _ = base.get_friction_rgba(base.textures)
        qpos, values = self._source.start_qpos.copy(), [np.array(friction)]
        if self.task == "obstacle":
            *slots_y, window_z = base._sample_target()
            *defenders_y, window_y = slots_y
            values += [np.array([0.0, y, c.DEFENDER_GEOM_Z_M]) for y in defenders_y]
            values.append(np.array([0.0, window_y, window_z]))
        if self.task == "target":
            robot_xy, yaw = base.sample_robot_pose()
            ball_q, root_q = qpos[self._ball_q], qpos[self._root_q]
            ball_q[:2] = base.sample_ball_position(robot_xy, yaw)
            root_q[:2], root_q[3:] = robot_xy, euler2quat([0.0, 0.0, yaw])
            base.sim.data.set_joint_qpos("robot_0:root", root_q)  # where `_sample_target` looks for the robot
            values.append(base._sample_target())
        return qpos, values

    # --- step ---------------------------------------------------------------------------------------

    @property
    def alive(self) -> np.ndarray:
        """(B,) bool: lanes whose episode goes on."""
        return ~(self._terminated | self._truncated)

    def step_torque(self, torque_nm: np.ndarray, num_steps: int = 1) -> Step:
        """One physics step (500 Hz) with joint torques (B, 12) in N m: one `env.step` of the platform."""
        return self._hold(torque_nm, "torque", lambda torque, *_: torque, num_steps)

    def step_action(self, action: np.ndarray, num_steps: int = c.PHYSICS_STEPS_PER_ACTION) -> Step:
        """Hold a policy's actions (B, 12) in [-1, 1] for `num_steps` physics steps (50 Hz).

        The torque at each is what the submitted module and the SDK compute. A lane stops at the physics step
        at which its episode ends.
        """
        return self._hold(action, "action", pd.platform_torque_nm, num_steps)

    def step_target(self, joint_target_rad: np.ndarray, num_steps: int = c.PHYSICS_STEPS_PER_ACTION) -> Step:
        """Like `step_action`, for joint targets (B, 12) in rad and the PD law in float64."""
        law = functools.partial(pd.torque_nm, xp=np)
        return self._hold(joint_target_rad, "joint target", law, num_steps)

    def _hold(self, held: np.ndarray, what: str, law: Callable, num_steps: int) -> Step:
        if num_steps < 1:
            raise UserError(f"nothing can be held for {num_steps} physics steps: give 1 or more")
        lanes, held = self._checked_action(held, what)

        def torque_nm(state: _State) -> np.ndarray:
            joints = state.qpos[:, self._joint_q], state.qvel[:, self._joint_v]
            torque = law(held, *(values.astype(np.float32) for values in joints))
            return np.clip(torque, self._torque_low, self._torque_high)

        return self._step(lanes, torque_nm, num_steps)

    def _checked_action(self, action: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The lanes that go on and their actions (L, 12), in the type given; an ended lane's is ignored."""
        if not self._was_reset:
            raise UserError("the twin was not reset: call reset(seeds) before the first step")
        try:
            action = np.asarray(action)
        except ValueError as error:
            raise UserError(
                f"{what} has rows of different lengths: give {c.NUM_JOINTS} numbers for each lane"
            ) from error
        if action.dtype.kind not in "fiu":
            raise UserError(f"{what} holds {action.dtype}, not numbers: check the policy")
        if action.shape != (self.num_lanes, c.NUM_JOINTS):
            raise UserError(
                f"{what} has shape {action.shape}, expected ({self.num_lanes}, {c.NUM_JOINTS}): one row for each lane"
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
            states = self._simulate(lanes, torque_of, num_steps)
            lane = np.arange(len(lanes))
            nth = np.arange(num_steps)[:, None]
            touching = self._read("twin:touch", states)[..., 0] > 0.0
            was_touching = np.concatenate([self._touching[lanes][None], touching[:-1]])
            touches = self.touches[lanes] + np.cumsum(touching & ~was_touching, axis=0)
            terms, terminated = self._rules(states, touches, self._target_pos_w[lanes])
            truncated = self.steps[lanes] + nth + 1 >= c.EPISODE_PHYSICS_STEPS
            ended = terminated | truncated
            last = np.where(ended.any(axis=0), ended.argmax(axis=0), num_steps - 1)
            reward[lanes] = np.sum(self._total_reward(terms), axis=0, dtype=np.float64, where=nth <= last)
            is_shot = np.where(touching, nth == last, was_touching & (nth <= last))
            self._note_ball(lanes, states, is_shot, nth <= last)

            self._state.write(lanes, states.at((last, lane)))
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

    def _note_ball(self, lanes: np.ndarray, states: _State, is_shot: np.ndarray, played: np.ndarray) -> None:
        """Keep the ball's height and its last shot of states (S, L), masks (S, L)."""
        heights = self._read("twin:ball_centre", states)[..., 2]
        highest = np.fmax.reduce(heights, axis=0, where=played, initial=0.0)
        self.ball_height_max_m[lanes] = np.fmax(self.ball_height_max_m[lanes], highest)
        shooting = np.flatnonzero(is_shot.any(axis=0))
        if len(shooting):
            last = len(is_shot) - 1 - is_shot[::-1, shooting].argmax(axis=0)
            for values, new in zip(self.shot, self._ball(states.at((last, shooting))), strict=True):
                values[lanes[shooting]] = new

    def _simulate(self, lanes: np.ndarray, torque_of: Callable, num_steps: int) -> _State:
        """States (num_steps, L) after each physics step."""
        states = _State.zeros(self._workers[0].data, num_steps, len(lanes))
        lane_values = [self._lane_values[lane] for lane in lanes.tolist()]
        state = self._state.at(lanes)
        for s in range(num_steps):
            before, after = self._commanded(state, torque_of(state)), states.at(s)
            times = before.time[:, 0].tolist()
            # Each row is taken by one worker.
            rows = zip(lane_values, times, before.memory, after.time, after.memory, after.sensors, strict=True)
            jobs = [self._pool.submit(worker.advance, rows) for worker in self._workers[1:]]
            try:
                self._workers[0].advance(rows)
            finally:
                concurrent.futures.wait(jobs)  # a worker's data must be idle before the next call
            for job in jobs:
                job.result()
            state = after
        return states

    def _commanded(self, state: _State, torque_nm: np.ndarray) -> _State:
        """The states with joint torques, and with their keepers where the official code writes them every step.

        A state with NaN or huge numbers MuJoCo replaces by the model's zero pose in `mj_step1`, before the official
        code writes the torque. `mj_step` would do it after, and lose the torque: so it is done here.
        """
        commanded = _State(state.layout, state.time.copy(), state.memory.copy(), state.sensors)
        if len(self._keeper_q):
            angle = 2 * np.pi * c.KEEPER_FREQUENCY_HZ * state.time
            commanded.qpos[:, self._keeper_q] = c.KEEPER_AMPLITUDE_M * np.sin(angle)
            speed = 2 * np.pi * c.KEEPER_FREQUENCY_HZ * c.KEEPER_AMPLITUDE_M * np.cos(angle)
            commanded.qvel[:, self._keeper_v] = speed
        accepted = [(np.abs(values) <= mujoco.mjMAXVAL).all(axis=-1) for values in (commanded.qpos, commanded.qvel)]
        restarted = ~np.logical_and(*accepted)
        commanded.memory[restarted], commanded.time[restarted] = self._zero_pose, 0.0
        commanded.ctrl[:, self._actuators] = torque_nm
        return commanded

    # --- rules --------------------------------------------------------------------------------------

    def _read(self, name: str, state: _State | None = None) -> np.ndarray:
        """A sensor of all lanes (B, width), or of some other state (..., width)."""
        return (state or self._state).sensors[..., self._sensor[name]]

    def _rules(
        self, states: _State, touches: np.ndarray, target_pos_w: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Raw reward terms and termination (..., L) of states (..., L), in the official key order."""
        ball, imu = self._read("twin:ball_pos", states), self._read("twin:imu_pos", states)
        distance = _norm(imu - ball)
        out = (np.abs(ball[..., 0]) > self._field["length"]) | (np.abs(ball[..., 1]) > self._field["width"])
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
            [self._read(f"twin:blocked_{geom}", states)[..., 0] > 0.0 for geom in _BLOCKERS[self.task]],
            axis=0,
        )
        # float32 in the official code, until the first touch
        nearness = np.where(touches > 0, np.float32(1.5), 1 - np.tanh(distance, dtype=np.float32))
        terms = {
            "robot_distance_ball": nearness,
            "ball_vel_twd_goal": -states.qvel[..., self._ball_v.start],
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
        x, y, z = self._source.goal_pos_w[0]
        return (
            (x - self._goal["depth"] <= ball[..., 0])
            & (ball[..., 0] <= x)
            & (y - self._goal["width"] <= ball[..., 1])
            & (ball[..., 1] < y + self._goal["width"])
            & (ball[..., 2] < z + self._goal["height"])
        )

    def _total_reward(self, terms: dict[str, np.ndarray]) -> np.ndarray:
        """The official step reward: weighted terms summed in float32; a term may have no weight."""
        weighted = [
            (self._reward_weights[name] * values).astype(np.float64)
            for name, values in terms.items()
            if name in self._reward_weights
        ]
        return np.sum(np.stack(weighted, axis=-1), axis=-1, dtype=np.float32)

    # --- observation --------------------------------------------------------------------------------

    def _angular_velocity_w(self, body: str, dofs: slice) -> np.ndarray:
        """World angular velocity (B, 3) of a free body: the official rotation Jacobian times qvel.

        Written as that full product, because BLAS adds in an order of its own.
        """
        jacobian = np.zeros((self.num_lanes, 3, self.qvel.shape[1]))
        for i, axis in enumerate("XYZ"):
            jacobian[:, :, dofs.start + 3 + i] = self._read(f"twin:{body}_{axis}")
        return _times_qvel(jacobian, self.qvel)

    def _info(self) -> dict[str, np.ndarray]:
        """The official `info` of all lanes, with the official one-step lag, and `task_index`.

        The linear velocity of the ball's and the imu's site is that of its free joint: the sites lie in
        the bodies' origins, so the official Jacobian's lever arm is zero, exactly.
        """
        read = self._read
        robot, ball = read("twin:imu_pos"), read("twin:ball_pos")
        robot_vel = self.qvel[:, self._root_v][:, :3]
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
            "ball_velr_rel_robot": self._angular_velocity_w(_BALL, self._ball_v)
            - self._angular_velocity_w(_ROBOT, self._root_v),
            "robot_accelerometer": read("robot_0:accelerometer").astype(np.float32),
            "robot_gyro": read("robot_0:torso_gyro").astype(np.float32),
            "robot_velocimeter": read("robot_0:torso_vel").astype(np.float32),
            "robot_quat": read("robot_0:torso_quat")[:, [1, 2, 3, 0]].astype(np.float32),  # to x, y, z, w
        }
        for team, keeper in enumerate(_KEEPERS):
            pos_rel, vel_rel = np.zeros_like(robot), np.zeros_like(robot)  # there is no keeper: zeros
            if self.task == "goalie":
                pos_rel = read(f"twin:{keeper}_pos") - robot
                vel_rel = -robot_vel
                vel_rel[:, 1] += self.qvel[:, self._keeper_v[team]]  # the keeper slides along y
            info[f"goalkeeper_team_{team}_xpos_rel_robot"] = pos_rel
            info[f"goalkeeper_team_{team}_velp_rel_robot"] = vel_rel
        has_target = self.task in _TARGET_SITE
        info["target_xpos_rel_robot"] = self._target_pos_w - robot if has_target else np.zeros_like(robot)
        info["target_velp_rel_robot"] = -robot_vel if has_target else np.zeros_like(robot)
        has_defenders = self.task == "obstacle"
        info["defender_xpos"] = self._defender_pos_w.copy() if has_defenders else np.hstack([robot] * c.NUM_DEFENDERS)
        info["success"] = self._success(ball, self._target_pos_w)
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
        joints = [self.qpos[:, self._joint_q], self.qvel[:, self._joint_v]]
        return np.concatenate(joints + ball + parts, axis=1, dtype=np.float32)

    # --- what is measured ---------------------------------------------------------------------------

    @property
    def qpos(self) -> np.ndarray:
        """(B, nq) view of the state in the official order; what is written takes effect at the next step."""
        return self._state.qpos

    @property
    def qvel(self) -> np.ndarray:
        """(B, nv) view, like `qpos`."""
        return self._state.qvel

    @property
    def imu_pos_w(self) -> np.ndarray:
        """(B, 3) m, with the official lag."""
        return self._read("twin:imu_pos")

    @property
    def ball(self) -> official.Ball:
        """The ball of all lanes now, each (B, 3)."""
        return self._ball(self._state)

    @property
    def ball_centre_w(self) -> np.ndarray:
        """(B, 3) m, with the official lag."""
        return self._read("twin:ball_centre")

    @property
    def ball_site_velocity_w(self) -> np.ndarray:
        """(B, 3) m/s: what the official score sees; the site turns with the ball."""
        return self.qvel[:, self._ball_v][:, :3]

    @property
    def ball_centre_velocity_w(self) -> np.ndarray:
        """(B, 3) m/s: what the ball really does."""
        return self.ball.centre_vel_w

    def _ball(self, state: _State) -> official.Ball:
        """The ball in states (L,); its centre's velocity is the official Jacobian of its geom times qvel."""
        site, com, centre = (self._read(f"twin:ball_{name}", state) for name in ("pos", "com", "centre"))
        jacobian = np.zeros((len(state.qvel), 3, state.qvel.shape[1]))
        for i, axis in enumerate("XYZ"):
            dof, turn = self._ball_v.start + i, self._read(f"twin:{_BALL}_{axis}", state)
            jacobian[:, i, dof] = 1.0
            jacobian[:, :, dof + 3] = np.cross(turn, com - site) + np.cross(turn, centre - com)
        site_vel = state.qvel[:, self._ball_v][:, :3]
        return official.Ball(centre, _times_qvel(jacobian, state.qvel), site, site_vel)


def _checked_seed(seed: int | None, lane: int) -> int | None:
    if seed is None:
        return None
    try:
        seed = operator.index(seed)
    except TypeError:
        raise UserError(f"the seed of lane {lane} is {seed!r}: give an integer") from None
    if not 0 <= seed < _SEED_LIMIT:
        raise UserError(f"the seed of lane {lane} is {seed}: it must lie in [0, 2^64)")
    return seed


def _norm(vector: np.ndarray) -> np.ndarray:
    """Length (...) of vectors (..., 3), by the dot product that `np.linalg.norm` uses for one vector."""
    return np.sqrt(np.vecdot(vector, vector))


def _times_qvel(jacobian: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """(B, 3) from (B, 3, nv) and (B, nv), by the BLAS call that `np.dot` uses for one lane."""
    return (jacobian @ qvel[..., None])[..., 0]
