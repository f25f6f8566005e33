"""What the twin takes from an official environment: its compiled model with our sensors, its numbers, its starts."""

import functools
from typing import NamedTuple

import mujoco
import numpy as np
from sai_mujoco.utils.v0.rotations import euler2quat

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, scene, twin_physics
from booster_soccer.envs.situation import keeper_motion
from booster_soccer.envs.twin_physics import DrivenJoints, Field, Physics, Sensor

ROBOT, BALL = "robot_0:Trunk", "soccer_ball"  # official body names
DEFENDERS = tuple(f"defender_geom{i}" for i in range(c.NUM_DEFENDERS))
KEEPERS = tuple(f"goalkeeper_team_{team}" for team in (0, 1))
BLOCKERS = {"goalie": ("goalkeeper_team_0_geom",), "obstacle": DEFENDERS, "target": ()}


class Source(NamedTuple):
    """What is taken from one official environment, once per task and process."""

    task: str
    env: official.TaskIndex  # draws the starts, through its own sampling methods
    model: mujoco.MjModel  # the official compiled model with our sensors
    address: scene.Addresses
    start_qpos: np.ndarray  # (nq,) after an official reset
    goal_pos_w: tuple[np.ndarray, np.ndarray]  # south (team 0) and north (team 1) goal sites
    info: dict[str, float | np.ndarray]  # the part of the official `info` that never changes; sizes in m
    reward_weights: dict[str, float]  # of the official step reward, not of the score

    def physics(self, num_lanes: int, num_threads: int) -> Physics:
        """Lanes of the model."""
        driven = None
        if self.task == "goalie":
            joints = tuple(f"{keeper}_joint" for keeper in KEEPERS)
            driven = DrivenJoints(joints, functools.partial(keeper_motion, xp=np))
        actuators = [f"robot_0:{name}" for name in c.JOINT_NAMES]
        return Physics(self.model, num_lanes, num_threads, _drawn_fields(self.task), actuators, driven)

    def draw_start(self, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Start qpos (nq,) and the values of `_drawn_fields`, drawn by the official methods in their order."""
        base = self.env.unwrapped
        base.np_random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        friction, _ = base.get_friction_rgba(base.textures)
        qpos, values = self.start_qpos.copy(), [np.array(friction)]
        if self.task == "obstacle":
            *slots_y, window_z = base._sample_target()
            *defenders_y, window_y = slots_y
            values += [np.array([0.0, y, c.DEFENDER_GEOM_Z_M]) for y in defenders_y]
            values.append(np.array([0.0, window_y, window_z]))
        if self.task == "target":
            robot_xy, yaw = base.sample_robot_pose()
            ball_q, root_q = qpos[self.address.ball_q], qpos[self.address.root_q]
            ball_q[:2] = base.sample_ball_position(robot_xy, yaw)
            root_q[:2], root_q[3:] = robot_xy, euler2quat([0.0, 0.0, yaw])
            base.sim.data.set_joint_qpos("robot_0:root", root_q)  # where `_sample_target` looks for the robot
            values.append(base._sample_target())
        return qpos, values


@functools.cache
def load(task: str) -> Source:
    """Load the official environment of a task and compile its model with our sensors (about a second)."""
    env = official.make(task)
    env.reset(seed=0)
    base, spec = env.unwrapped, env.unwrapped.mjcf_model
    data, parameters = base.sim.data._data, base.parameters_dict["env_parameters"]
    twin_physics.add_sensors(spec, _sensors(task))
    model = spec.compile()
    # The official reset writes these into its compiled model (team, friction, defenders, target).
    for name in ("geom_pos", "geom_friction", "site_pos"):
        getattr(model, name)[:] = getattr(base.sim.model._model, name)
    return Source(
        task=task,
        env=env,
        model=model,
        address=scene.official_addresses(model),
        start_qpos=data.qpos.copy(),
        goal_pos_w=tuple(data.site(f"goal_post_{side}").xpos.copy() for side in ("south", "north")),
        info={
            "length": parameters["field"]["length"],
            "width": parameters["field"]["width"],
            **{f"goal_{size}": parameters["goal"][size] for size in ("width", "height", "depth")},
            "player_team": np.array([1, 0]),  # team 0
            "task_index": env.task_index,
        },
        reward_weights=base.reward_config,
    )


def _sensors(task: str) -> list[Sensor]:
    """Sensors for what the official code reads elsewhere in `MjData`; all names begin with `twin:`."""
    kind, obj = mujoco.mjtSensor, mujoco.mjtObj
    sensors = [
        Sensor("twin:imu_pos", kind.mjSENS_FRAMEPOS, obj.mjOBJ_SITE, "robot_0:imu"),
        Sensor("twin:ball_pos", kind.mjSENS_FRAMEPOS, obj.mjOBJ_SITE, "ball"),
        Sensor("twin:ball_centre", kind.mjSENS_FRAMEPOS, obj.mjOBJ_GEOM, "ball"),
        Sensor("twin:ball_com", kind.mjSENS_SUBTREECOM, obj.mjOBJ_BODY, BALL),
    ]
    for body in (ROBOT, BALL):
        for axis in "XYZ":
            along = getattr(kind, f"mjSENS_FRAME{axis}AXIS")
            sensors.append(Sensor(f"twin:{body}_{axis}", along, obj.mjOBJ_XBODY, body))
    # XBODY means the whole subtree
    sensors.append(Sensor("twin:touch", kind.mjSENS_CONTACT, obj.mjOBJ_XBODY, ROBOT, touching_geom="ball"))
    for geom in BLOCKERS[task]:
        name = f"twin:blocked_{geom}"
        sensors.append(Sensor(name, kind.mjSENS_CONTACT, obj.mjOBJ_GEOM, geom, touching_geom="ball"))
    if task == "goalie":
        for keeper in KEEPERS:
            sensors.append(Sensor(f"twin:{keeper}_pos", kind.mjSENS_FRAMEPOS, obj.mjOBJ_SITE, f"{keeper}_site"))
    return sensors


def _drawn_fields(task: str) -> list[Field]:
    """The parts of the model that the official reset draws anew, in the order of `Source.draw_start`."""
    fields = [Field("geom", "field_base", "friction")]
    if task == "obstacle":
        fields += [Field("geom", name, "pos") for name in DEFENDERS]
    if task in c.TARGET_SITE:
        fields.append(Field("site", c.TARGET_SITE[task], "pos"))
    return fields
