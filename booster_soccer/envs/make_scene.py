"""Write `mjx_scene.xml` beside this file: robot, ball, ground and goal with the official model's physical numbers.

    python -m booster_soccer.envs.make_scene

Input: the installed `sai-mujoco` (its compiled KickToTarget model). Output: an MJCF without meshes, which
MuJoCo and MJX load anywhere. Every mass, inertia, joint, limit, motor and site is read from the compiled
model; what is ours is only which colliders are kept, and how the ground is written:

* Robot and ball rest on two coincident collidable planes at z = 0.010 (the official logos), and on the
  convex hull of the pitch mesh, whose top is at the same height. A running foot sinks in further, to the
  planes at z = 0.007 (grass) and z = 0 (floor). The planes are kept as they are.
* The hull becomes a disc of the same top and thickness: one more contact per foot, and one that pushes a
  foot down if it has sunk in by more than half its own height. `envs/mjx_engine.py` gives MJX the disc-box
  pair that it lacks. What the disc is to the ball, always above it, is a plane in MJX.
* Thigh and shank cylinders become capsules of the same radius whose end spheres reach the same ends,
  because MJX has no box-cylinder pair. They meet the ball and the other leg.
* Only these collide: the logos with feet, shanks and ball; what is below them with feet and ball; ball with
  every robot collider and the attacked goal's front posts; feet and shanks among themselves; thighs with
  thighs and shanks. `envs/scene.py` adds the rest for the native engine.
* Keeper, defenders and window are functions of time and geometry (`envs/tasks.py`), not bodies.
"""

import xml.etree.ElementTree as ET
from pathlib import Path

import mujoco
import numpy as np

from booster_soccer.envs import constants as c

SCENE_PATH = Path(__file__).parent / "mjx_scene.xml"
ROBOT_PREFIX = "robot_0:"
FEET = ("left_foot_link", "right_foot_link")
SHANKS = ("Shank_Left", "Shank_Right")
THIGHS = ("Hip_Yaw_Left", "Hip_Yaw_Right")
ROBOT_COLLIDERS = (*FEET, *SHANKS, *THIGHS, "Trunk")
POSTS = ("left_post_south", "right_post_south", "crossbar_south")
GROUND_PLANES = ("sai_logo1", "sai_logo2")
LOWER_PLANES = ("field_base", "floor")
PITCH_RADIUS_M = 15.0  # wider than the field
# Who collides with whom (MuJoCo: contype of one meets conaffinity of the other). Not by explicit pairs:
# MJX 3.3.7 cannot read those under current JAX.
GROUND, BALL, LEG, FOOT, THIGH = 1, 2, 4, 8, 16
COLLISION_BITS = {  # geom: (contype, conaffinity)
    **dict.fromkeys(GROUND_PLANES, (GROUND, 0)),
    **dict.fromkeys(LOWER_PLANES, (0, FOOT | BALL)),
    "pitch": (0, FOOT),
    "pitch_for_ball": (0, BALL),
    **dict.fromkeys(FEET, (LEG | FOOT, GROUND | BALL | LEG)),
    **dict.fromkeys(SHANKS, (LEG, GROUND | BALL | LEG | THIGH)),
    **dict.fromkeys(THIGHS, (THIGH, BALL | THIGH)),
    **dict.fromkeys(("Trunk", *POSTS), (0, BALL)),
    "ball": (BALL, GROUND),
}


def official_model() -> mujoco.MjModel:
    """The compiled official KickToTarget model, from the installed package."""
    import gymnasium as gym
    import sai_mujoco  # noqa: F401  (registers the environments)

    env = gym.make(c.GYM_ID["target"])
    model = env.unwrapped.sim.model._model
    env.close()
    return model


def _add(parent: ET.Element, tag: str, **attributes) -> ET.Element:
    """Append an element; numbers are written with twelve digits."""

    def text(value) -> str:
        return value if isinstance(value, str) else " ".join(f"{float(v):.12g}" for v in np.atleast_1d(value))

    return ET.SubElement(parent, tag, {name: text(value) for name, value in attributes.items()})


def _collider(model: mujoco.MjModel, body: str) -> int:
    """Id of the one collidable geom of a robot body."""
    body_id = model.body(ROBOT_PREFIX + body).id
    ids = [g for g in range(model.ngeom) if model.geom_bodyid[g] == body_id and model.geom_contype[g]]
    if len(ids) != 1:
        raise ValueError(f"expected one collider on {body}, found {len(ids)}: has sai-mujoco changed?")
    return ids[0]


def pitch_heights_m(model: mujoco.MjModel) -> tuple[float, float]:
    """Bottom and top of the collidable pitch mesh, from its vertices, which are float32."""
    on_field = model.geom_bodyid == model.body("football_field").id
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    (hull,) = np.flatnonzero(on_field & is_mesh & (model.geom_contype > 0))
    mesh = model.geom_dataid[hull]
    first = model.mesh_vertadr[mesh]
    vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    z_m = vertices @ data.geom_xmat[hull].reshape(3, 3)[2] + data.geom_xpos[hull][2]
    return round(float(z_m.min()), 6), round(float(z_m.max()), 6)


def _add_pitch_and_below(world: ET.Element, model: mujoco.MjModel) -> None:
    """The disc, the lower planes with their own softness, and the disc's top as the ball's plane.

    Their official friction (0.1, and drawn below 1 at every start) never acts: a contact takes the larger one.
    """
    bottom_m, top_m = pitch_heights_m(model)
    half_m = (top_m - bottom_m) / 2
    plane = {"type": "plane", "size": [PITCH_RADIUS_M, PITCH_RADIUS_M, 1.0], "rgba": "0 0 0 0"}
    _add(world, "geom", name="pitch", type="cylinder", pos=[0.0, 0.0, bottom_m + half_m],
         size=[PITCH_RADIUS_M, half_m], rgba="0 0 0 0")  # fmt: skip
    for name in LOWER_PLANES:
        geom = model.geom(name)
        _add(world, "geom", name=name, pos=[0.0, 0.0, geom.pos[2]], solimp=geom.solimp, **plane)
    _add(world, "geom", name="pitch_for_ball", pos=[0.0, 0.0, top_m], **plane)


def _add_collider(parent: ET.Element, model: mujoco.MjModel, name: str) -> None:
    geom_id = _collider(model, name)
    size, shape = model.geom_size[geom_id], {"type": "box", "size": model.geom_size[geom_id]}
    if (
        model.geom_type[geom_id] != mujoco.mjtGeom.mjGEOM_BOX
    ):  # a cylinder: same radius, end spheres reach the same ends
        shape = {"type": "capsule", "size": [size[0], size[1] - size[0]]}
    place = {"pos": model.geom_pos[geom_id], "quat": model.geom_quat[geom_id]}
    _add(parent, "geom", name=name, **place, mass="0", **shape)


def _add_body(parent: ET.Element, model: mujoco.MjModel, body_id: int) -> None:
    """Append robot body `body_id` and its children, with inertia, joint, sites and collider."""
    name = model.body(body_id).name.removeprefix(ROBOT_PREFIX)
    is_root = name == "Trunk"
    pos = [0.0, 0.0, c.IMU_START_HEIGHT_M] if is_root else model.body_pos[body_id]
    quat = [1.0, 0.0, 0.0, 0.0] if is_root else model.body_quat[body_id]
    body = _add(parent, "body", name=name, pos=pos, quat=quat)
    _add(body, "inertial", pos=model.body_ipos[body_id], quat=model.body_iquat[body_id],
         mass=model.body_mass[body_id], diaginertia=model.body_inertia[body_id])  # fmt: skip
    for joint_id in np.flatnonzero(model.jnt_bodyid == body_id):
        joint_name = model.joint(joint_id).name.removeprefix(ROBOT_PREFIX)
        if model.jnt_type[joint_id] == mujoco.mjtJoint.mjJNT_FREE:
            _add(body, "freejoint", name=joint_name)
            continue
        of_dof = {name: getattr(model, f"dof_{name}")[model.jnt_dofadr[joint_id]]
                  for name in ("armature", "damping", "frictionloss")}  # fmt: skip
        _add(body, "joint", name=joint_name, axis=model.jnt_axis[joint_id], range=model.jnt_range[joint_id], **of_dof)
    for site_id in np.flatnonzero(model.site_bodyid == body_id):
        site_name = model.site(site_id).name.removeprefix(ROBOT_PREFIX)
        _add(body, "site", name=site_name, pos=model.site_pos[site_id])
    if name in ROBOT_COLLIDERS:
        _add_collider(body, model, name)
    for child in np.flatnonzero(model.body_parentid == body_id):
        _add_body(body, model, int(child))


def _add_sensors(root: ET.Element) -> None:
    sensor = _add(root, "sensor")
    for tag, name in (("gyro", "gyro_b"), ("velocimeter", "velocimeter_b"), ("accelerometer", "accelerometer_b")):
        _add(sensor, tag, name=name, site="imu")

    def site(tag: str, name: str, site_name: str) -> None:
        _add(sensor, tag, name=name, objtype="site", objname=site_name)

    def contacts(name: str, geom1: str, geom2: str) -> None:
        """Number of contacts; geom against geom, because MJX matches no bodies or subtrees."""
        _add(sensor, "contact", name=name, geom1=geom1, geom2=geom2, data="found")

    for prefix, site_name in (("imu", "imu"), ("ball_site", "ball")):
        site("framepos", f"{prefix}_pos_w", site_name)
        site("framequat", f"{site_name}_quat_wxyz", site_name)
    for side in ("left", "right"):
        site("framepos", f"{side}_foot_pos_w", f"{side}_foot")
        site("framelinvel", f"{side}_foot_vel_w", f"{side}_foot")
        contacts(f"{side}_foot_ground_contacts", f"{side}_foot_link", GROUND_PLANES[0])
    for geom in ROBOT_COLLIDERS:
        contacts(f"ball_{geom}_contacts", "ball", geom)


def _add_goal_and_grass(world: ET.Element, model: mujoco.MjModel) -> None:
    ground = _add(world, "body", name="ground")
    for plane, colour in zip(GROUND_PLANES, ("0.13 0.54 0.13 1", "0 0 0 0")):
        pos = [0.0, 0.0, model.geom(plane).pos[2]]
        _add(ground, "geom", name=plane, type="plane", pos=pos, size="14 10 1", rgba=colour)
    for name in ("goal_post_south", "goal_post_north"):
        _add(world, "site", name=name, pos=model.body(name).pos)
    # World frame: the goal body is turned about z by pi, the posts' own frames are symmetric under it.
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    for post in POSTS:
        geom_id, quat = model.geom(post).id, np.zeros(4)
        mujoco.mju_mat2Quat(quat, data.geom_xmat[geom_id])
        place = {"pos": data.geom_xpos[geom_id], "quat": quat}
        _add(world, "geom", name=post, type="cylinder", size=model.geom_size[geom_id][:2], **place)


def _add_ball(world: ET.Element, model: mujoco.MjModel) -> None:
    ball_id, geom = model.body("soccer_ball").id, model.geom("ball")
    ball = _add(world, "body", name="soccer_ball")
    _add(ball, "freejoint", name="ball")
    inertia = {"mass": model.body_mass[ball_id], "diaginertia": model.body_inertia[ball_id]}
    _add(ball, "inertial", pos=model.body_ipos[ball_id], **inertia)
    _add(ball, "geom", name="ball", type="sphere", size=geom.size[0], pos=geom.pos, mass="0")
    _add(ball, "site", name="ball", pos=model.site("ball").pos)


def scene_xml(model: mujoco.MjModel) -> str:
    """The MJCF text of our scene, from the official compiled `model`."""
    root = ET.Element("mujoco", {"model": "booster_t1_football"})
    root.append(ET.Comment(" Written by make_scene.py from sai-mujoco 0.1.30; do not edit by hand. "))
    _add(root, "compiler", angle="radian", autolimits="true")
    _add(root, "option", timestep=model.opt.timestep, integrator="implicitfast", cone="pyramidal")
    world = _add(root, "worldbody")
    _add(world, "light", pos="0 0 6", dir="0 0 -1", directional="true")
    _add_goal_and_grass(world, model)
    _add_pitch_and_below(world, model)
    _add_ball(world, model)
    _add_body(world, model, model.body(ROBOT_PREFIX + "Trunk").id)
    actuator = _add(root, "actuator")
    for joint in c.JOINT_NAMES:
        _add(actuator, "motor", name=joint, joint=joint, ctrlrange=model.actuator(ROBOT_PREFIX + joint).ctrlrange)
    _add_sensors(root)
    for element in root.iter("geom"):
        contype, conaffinity = COLLISION_BITS[element.attrib["name"]]
        element.set("contype", str(contype))
        element.set("conaffinity", str(conaffinity))
    ET.indent(root, space="  ")
    return ET.tostring(root, encoding="unicode") + "\n"


def main() -> Path:
    """Write the scene."""
    SCENE_PATH.write_text(scene_xml(official_model()))
    print(f"wrote {SCENE_PATH}")
    return SCENE_PATH


if __name__ == "__main__":
    main()
