"""Write `booster_soccer/envs/mjx_scene.xml`: robot, ball, ground and goal with the official model's physical numbers.

    python -m assets.make_scene            # rewrites booster_soccer/envs/mjx_scene.xml

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


def _fmt(values) -> str:
    return " ".join(f"{float(v):.12g}" for v in np.atleast_1d(values))


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
    unseen = {"rgba": "0 0 0 0"}
    disc = {"name": "pitch", "type": "cylinder", "pos": _fmt([0.0, 0.0, bottom_m + half_m])}
    ET.SubElement(world, "geom", disc | {"size": _fmt([PITCH_RADIUS_M, half_m])} | unseen)
    plane = {"type": "plane", "size": _fmt([PITCH_RADIUS_M, PITCH_RADIUS_M, 1.0])}
    for name in LOWER_PLANES:
        geom = model.geom(name)
        place = {"name": name, "pos": _fmt([0.0, 0.0, geom.pos[2]]), "solimp": _fmt(geom.solimp)}
        ET.SubElement(world, "geom", place | plane | unseen)
    ET.SubElement(world, "geom", {"name": "pitch_for_ball", "pos": _fmt([0.0, 0.0, top_m])} | plane | unseen)


def _add_collider(parent: ET.Element, model: mujoco.MjModel, name: str) -> None:
    geom_id = _collider(model, name)
    kind = mujoco.mjtGeom(model.geom_type[geom_id])
    attributes = {
        "name": name,
        "pos": _fmt(model.geom_pos[geom_id]),
        "quat": _fmt(model.geom_quat[geom_id]),
        "mass": "0",
    }
    size = model.geom_size[geom_id]
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        attributes |= {"type": "box", "size": _fmt(size)}
    else:  # cylinder: same radius, end spheres reach the same ends
        radius, half_length = size[0], size[1]
        attributes |= {"type": "capsule", "size": _fmt([radius, half_length - radius])}
    ET.SubElement(parent, "geom", attributes)


def _add_body(parent: ET.Element, model: mujoco.MjModel, body_id: int) -> None:
    """Append robot body `body_id` and its children, with inertia, joint, sites and collider."""
    name = model.body(body_id).name.removeprefix(ROBOT_PREFIX)
    is_root = name == "Trunk"
    pos = [0.0, 0.0, c.IMU_START_HEIGHT_M] if is_root else model.body_pos[body_id]
    quat = [1.0, 0.0, 0.0, 0.0] if is_root else model.body_quat[body_id]
    body = ET.SubElement(parent, "body", {"name": name, "pos": _fmt(pos), "quat": _fmt(quat)})
    ET.SubElement(
        body,
        "inertial",
        {
            "pos": _fmt(model.body_ipos[body_id]),
            "quat": _fmt(model.body_iquat[body_id]),
            "mass": _fmt(model.body_mass[body_id]),
            "diaginertia": _fmt(model.body_inertia[body_id]),
        },
    )
    for joint_id in np.flatnonzero(model.jnt_bodyid == body_id):
        joint_name = model.joint(joint_id).name.removeprefix(ROBOT_PREFIX)
        if model.jnt_type[joint_id] == mujoco.mjtJoint.mjJNT_FREE:
            ET.SubElement(body, "freejoint", {"name": joint_name})
            continue
        dof = model.jnt_dofadr[joint_id]
        ET.SubElement(
            body,
            "joint",
            {
                "name": joint_name,
                "axis": _fmt(model.jnt_axis[joint_id]),
                "range": _fmt(model.jnt_range[joint_id]),
                "armature": _fmt(model.dof_armature[dof]),
                "damping": _fmt(model.dof_damping[dof]),
                "frictionloss": _fmt(model.dof_frictionloss[dof]),
            },
        )
    for site_id in np.flatnonzero(model.site_bodyid == body_id):
        site_name = model.site(site_id).name.removeprefix(ROBOT_PREFIX)
        ET.SubElement(body, "site", {"name": site_name, "pos": _fmt(model.site_pos[site_id])})
    if name in ROBOT_COLLIDERS:
        _add_collider(body, model, name)
    for child in np.flatnonzero(model.body_parentid == body_id):
        _add_body(body, model, child)


def _add_sensors(root: ET.Element) -> None:
    sensor = ET.SubElement(root, "sensor")

    def site(tag: str, name: str, site_name: str) -> None:
        if tag in ("gyro", "velocimeter", "accelerometer"):
            ET.SubElement(sensor, tag, {"name": name, "site": site_name})
        else:
            ET.SubElement(sensor, tag, {"name": name, "objtype": "site", "objname": site_name})

    site("gyro", "gyro_b", "imu")
    site("velocimeter", "velocimeter_b", "imu")
    site("accelerometer", "accelerometer_b", "imu")
    site("framepos", "imu_pos_w", "imu")
    site("framequat", "imu_quat_wxyz", "imu")
    site("framepos", "ball_site_pos_w", "ball")
    site("framequat", "ball_quat_wxyz", "ball")

    def contacts(name: str, geom1: str, geom2: str) -> None:
        """Number of contacts; geom against geom, because MJX matches no bodies or subtrees."""
        ET.SubElement(sensor, "contact", {"name": name, "geom1": geom1, "geom2": geom2, "data": "found"})

    for side in ("left", "right"):
        site("framepos", f"{side}_foot_pos_w", f"{side}_foot")
        site("framelinvel", f"{side}_foot_vel_w", f"{side}_foot")
        contacts(f"{side}_foot_ground_contacts", f"{side}_foot_link", GROUND_PLANES[0])
    for geom in ROBOT_COLLIDERS:
        contacts(f"ball_{geom}_contacts", "ball", geom)


def scene_xml(model: mujoco.MjModel) -> str:
    """The MJCF text of our scene, from the official compiled `model`."""
    root = ET.Element("mujoco", {"model": "booster_t1_football"})
    root.append(ET.Comment(" Written by make_scene.py from sai-mujoco 0.1.30; do not edit by hand. "))
    ET.SubElement(root, "compiler", {"angle": "radian", "autolimits": "true"})
    ET.SubElement(
        root, "option", {"timestep": _fmt(model.opt.timestep), "integrator": "implicitfast", "cone": "pyramidal"}
    )
    world = ET.SubElement(root, "worldbody")
    ET.SubElement(world, "light", {"pos": "0 0 6", "dir": "0 0 -1", "directional": "true"})

    ground = ET.SubElement(world, "body", {"name": "ground"})
    for index, plane in enumerate(GROUND_PLANES):
        ET.SubElement(
            ground,
            "geom",
            {
                "name": plane,
                "type": "plane",
                "pos": _fmt([0.0, 0.0, model.geom(plane).pos[2]]),
                "size": "14 10 1",
                "rgba": "0.13 0.54 0.13 1" if index == 0 else "0 0 0 0",
            },
        )
    for name in ("goal_post_south", "goal_post_north"):
        ET.SubElement(world, "site", {"name": name, "pos": _fmt(model.body(name).pos)})
    for post in POSTS:
        # World frame: the goal body is turned about z by pi, the post's own frame is symmetric under it.
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        geom_id = model.geom(post).id
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, data.geom_xmat[geom_id])
        ET.SubElement(
            world,
            "geom",
            {
                "name": post,
                "type": "cylinder",
                "size": _fmt(model.geom_size[geom_id][:2]),
                "pos": _fmt(data.geom_xpos[geom_id]),
                "quat": _fmt(quat),
            },
        )
    _add_pitch_and_below(world, model)

    ball_id = model.body("soccer_ball").id
    ball = ET.SubElement(world, "body", {"name": "soccer_ball"})
    ET.SubElement(ball, "freejoint", {"name": "ball"})
    ET.SubElement(
        ball,
        "inertial",
        {
            "pos": _fmt(model.body_ipos[ball_id]),
            "mass": _fmt(model.body_mass[ball_id]),
            "diaginertia": _fmt(model.body_inertia[ball_id]),
        },
    )
    geom = model.geom("ball")
    ET.SubElement(
        ball,
        "geom",
        {"name": "ball", "type": "sphere", "size": _fmt(geom.size[0]), "pos": _fmt(geom.pos), "mass": "0"},
    )
    ET.SubElement(ball, "site", {"name": "ball", "pos": _fmt(model.site("ball").pos)})

    _add_body(world, model, model.body(ROBOT_PREFIX + "Trunk").id)

    actuator = ET.SubElement(root, "actuator")
    for joint in c.JOINT_NAMES:
        ctrl_range = model.actuator(ROBOT_PREFIX + joint).ctrlrange
        ET.SubElement(actuator, "motor", {"name": joint, "joint": joint, "ctrlrange": _fmt(ctrl_range)})
    _add_sensors(root)
    for element in root.iter("geom"):
        contype, conaffinity = COLLISION_BITS[element.get("name")]
        element.set("contype", str(contype))
        element.set("conaffinity", str(conaffinity))
    ET.indent(root, space="  ")
    return ET.tostring(root, encoding="unicode") + "\n"


def main() -> Path:
    SCENE_PATH.write_text(scene_xml(official_model()))
    print(f"wrote {SCENE_PATH}")
    return SCENE_PATH


if __name__ == "__main__":
    main()
