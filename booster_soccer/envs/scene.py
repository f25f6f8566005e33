"""Our scene: loading it for either engine, name look-ups, and the PD layer written into its actuators.

Input: `mjx_scene.xml` beside this file. Every id and address is looked up by name with `mj_name2id` (through
MuJoCo's named accessors); no index is written down anywhere.
"""

from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError

MUJOCO_VERSION = "3.3.7"
SCENE_PATH = Path(__file__).parent / "mjx_scene.xml"

# Official leg colliders; MJX has no cylinder-box pair, so the scene on disk has capsules of the same length.
_LEG_CYLINDERS = {
    "Hip_Yaw_Left": (0.05, 0.08),  # radius, half length in m
    "Hip_Yaw_Right": (0.05, 0.08),
    "Shank_Left": (0.05, 0.075),
    "Shank_Right": (0.05, 0.075),
}
_MJX_CONTACTS = 40
# What lies below the logos; a running step sinks in by up to 35 mm, through all of it.
_BELOW_LOGOS = ("pitch", "field_base", "floor")


class Addresses(NamedTuple):
    """Where things lie in `qpos` (q) and `qvel` (v): start indices of the free joints, slices of the legs."""

    ball_q: slice  # 7: site position, quaternion wxyz
    ball_v: slice  # 6: linear velocity of the site (world), angular velocity (ball frame)
    root_q: slice  # 7: imu position, quaternion wxyz
    root_v: slice  # 6: linear velocity (world), angular velocity (body frame)
    joint_q: np.ndarray  # (12,) in the order of JOINT_NAMES
    joint_v: np.ndarray  # (12,)


def keep_mujoco_quiet() -> None:
    """MuJoCo's own way to warn is to append to a file in the working directory; broken lanes are reported by us."""
    mujoco.set_mju_user_warning(lambda _: None)


def check_mujoco_version(version: str = mujoco.__version__) -> None:
    """Raise unless mujoco is the version that everything here was measured with.

    The official environments load with 3.3.0 and 3.3.7, not with 3.2.6 nor from 3.4.0 on (measured); the twin's
    sensors and MJX's collision functions are written for 3.3.7.
    """
    if version != MUJOCO_VERSION:
        raise UserError(
            f"mujoco {version} cannot load the official environments and their twin as tested: "
            f"pip install mujoco=={MUJOCO_VERSION} mujoco-mjx=={MUJOCO_VERSION}; {More.VERSIONS}"
        )


def addresses(model: mujoco.MjModel, prefix: str = "", ball_joint: str = "ball") -> Addresses:
    """Look up the addresses by joint name; `prefix` and `ball_joint` serve the official model."""

    def free(name: str) -> tuple[slice, slice]:
        joint = model.joint(name)
        q, v = int(joint.qposadr[0]), int(joint.dofadr[0])
        return slice(q, q + 7), slice(v, v + 6)

    ball_q, ball_v = free(ball_joint)
    root_q, root_v = free(f"{prefix}root")
    joints = [model.joint(prefix + name) for name in c.JOINT_NAMES]
    return Addresses(
        ball_q,
        ball_v,
        root_q,
        root_v,
        np.array([int(j.qposadr[0]) for j in joints]),
        np.array([int(j.dofadr[0]) for j in joints]),
    )


def official_addresses(model: mujoco.MjModel) -> Addresses:
    """Addresses in an official compiled model."""
    return addresses(model, prefix="robot_0:", ball_joint="env:ball")


def sensor_slices(model: mujoco.MjModel) -> dict[str, slice]:
    """Slice of `sensordata` for every sensor name."""
    sensors = [model.sensor(i) for i in range(model.nsensor)]
    return {s.name: slice(int(s.adr[0]), int(s.adr[0] + s.dim[0])) for s in sensors}


def ball_contact_sensors(model: mujoco.MjModel) -> np.ndarray:
    """Places (n,) in `sensordata` that are not zero while the robot touches the ball."""
    found = [s for name, s in sensor_slices(model).items() if name.startswith("ball_") and name.endswith("_contacts")]
    return np.concatenate([np.arange(s.start, s.stop) for s in found])


def load_mjx_model() -> mujoco.MjModel:
    """The scene as written, for MJX: motors replaced by the PD layer, solver settings for float32.

    A running foot has up to 21 contacts. After one action joint velocities are 4.4 rad/s off native (90th
    percentile) with 4 iterations, 0.2 with 6, 0.008 with 8 and 0.005 with 10; 10 line-search steps for 6
    change nothing. MJX computes with every contact that may ever be, 73; the deepest 40 are all that touch: at most
    39 did in 36,000 physics steps of random landings, falls and kicks.
    """
    check_mujoco_version()
    spec = mujoco.MjSpec.from_file(str(SCENE_PATH))
    spec.add_numeric(name="max_contact_points", data=[_MJX_CONTACTS])
    model = spec.compile()
    model.opt.iterations, model.opt.ls_iterations = 8, 6
    # Without joint damping there is nothing to treat implicitly. Native MuJoCo sees that, MJX factorises again.
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
    return write_pd_layer(model)


def load_native_motor_model() -> mujoco.MjModel:
    """The scene for native MuJoCo: every official collider that matters, and its plain torque motors.

    On top of the scene that MJX can read: cylinders for capsules, all contacts between trunk, legs and feet, and
    the whole ground for shanks and ball. A policy that never met them fell three times as often in the
    official environment (docs/experiments.md, e9).
    """
    check_mujoco_version()
    spec = mujoco.MjSpec.from_file(str(SCENE_PATH))
    ground, foot = spec.geom("sai_logo1"), spec.geom("left_foot_link")
    spec.delete(spec.geom("pitch_for_ball"))
    for name in _BELOW_LOGOS:
        spec.geom(name).contype, spec.geom(name).conaffinity = ground.contype, ground.conaffinity
    for name in ("Trunk", *_LEG_CYLINDERS):
        spec.geom(name).contype, spec.geom(name).conaffinity = foot.contype, foot.conaffinity
    for name, (radius_m, half_length_m) in _LEG_CYLINDERS.items():
        spec.geom(name).type = mujoco.mjtGeom.mjGEOM_CYLINDER
        spec.geom(name).size = [radius_m, half_length_m, 0.0]
    return spec.compile()


def load_native_model() -> mujoco.MjModel:
    """The scene for the native engine: official colliders and solver settings, PD layer."""
    return write_pd_layer(load_native_motor_model())


def write_pd_layer(model: mujoco.MjModel) -> mujoco.MjModel:
    """Turn the torque motors into the PD layer, in place: `ctrl` becomes the joint target in radians.

    force = clip(kp (target - q) - kd qvel, +-limit), evaluated at the state before each physics step. That
    is the explicit torque of `envs/pd.py`: under the Euler integrator MuJoCo treats only joint damping
    implicitly, and here it is zero, so Euler equals the official implicitfast with motors, to the bit
    (`tests/test_physics.py`). Under implicitfast a position actuator would be damped implicitly: 4.4 mm apart
    after 1 s. Held targets then need one call for ten physics steps instead of ten calls.
    """
    if np.any(model.dof_damping):
        raise ValueError("joint damping must be zero: the Euler integrator would treat it implicitly")
    if [model.actuator(i).name for i in range(model.nu)] != list(c.JOINT_NAMES):
        raise ValueError("the scene's actuators must be in the order of JOINT_NAMES: `ctrl` is written as a whole")
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    for i, name in enumerate(c.JOINT_NAMES):
        actuator = model.actuator(name).id
        model.actuator_biastype[actuator] = mujoco.mjtBias.mjBIAS_AFFINE
        model.actuator_gainprm[actuator, 0] = c.KP_NM_PER_RAD[i]
        model.actuator_biasprm[actuator, 1:3] = (-c.KP_NM_PER_RAD[i], -c.KD_NMS_PER_RAD[i])
        model.actuator_forcelimited[actuator] = 1
        model.actuator_forcerange[actuator] = (-c.TORQUE_LIMIT_NM[i], c.TORQUE_LIMIT_NM[i])
        model.actuator_ctrllimited[actuator] = 0
    return model
