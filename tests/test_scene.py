"""The committed scene is what the script writes, and its numbers are the official model's."""

from pathlib import Path

import mujoco
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs import scene
from booster_soccer.envs.make_scene import (
    FEET,
    GROUND_PLANES,
    LOWER_PLANES,
    POSTS,
    ROBOT_COLLIDERS,
    ROBOT_PREFIX,
    SHANKS,
    THIGHS,
    scene_xml,
)
from booster_soccer.errors import UserError


@pytest.fixture(scope="module")
def official(official_envs):
    return official_envs["target"].sim.model._model


@pytest.fixture(scope="module")
def ours():
    return mujoco.MjModel.from_xml_path(str(scene.SCENE_PATH))


def test_committed_file_is_what_the_script_writes(official):
    assert scene.SCENE_PATH.read_text() == scene_xml(official)


def test_bodies_equal_the_official(official, ours):
    names = [official.body(i).name for i in range(official.nbody) if official.body(i).name.startswith(ROBOT_PREFIX)]
    assert len(names) == 13
    for name, official_name in [(n.removeprefix(ROBOT_PREFIX), n) for n in names] + [("soccer_ball", "soccer_ball")]:
        a, b = ours.body(name), official.body(official_name)
        for field in ("mass", "inertia", "ipos"):
            np.testing.assert_allclose(
                getattr(a, field), getattr(b, field), rtol=1e-9, atol=1e-12, err_msg=f"{name}.{field}"
            )
        assert abs(abs(np.dot(a.iquat, b.iquat)) - 1) < 1e-9
        if name not in ("Trunk", "soccer_ball"):  # those two hang on free joints
            np.testing.assert_allclose(a.pos, b.pos, atol=1e-12)
            np.testing.assert_allclose(a.quat, b.quat, atol=1e-12)


def test_joints_and_motors_equal_the_official(official, ours):
    for name in c.JOINT_NAMES:
        a, b = ours.joint(name), official.joint(ROBOT_PREFIX + name)
        for field in ("range", "axis", "damping", "armature", "frictionloss", "stiffness"):
            np.testing.assert_allclose(
                getattr(a, field), getattr(b, field), rtol=1e-9, atol=1e-12, err_msg=f"{name}.{field}"
            )
        a, b = ours.actuator(name), official.actuator(ROBOT_PREFIX + name)
        for field in ("ctrlrange", "gear", "gainprm", "biasprm"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=f"{name}.{field}")


def test_native_colliders_equal_the_official(official):
    """Shape, size, place and contact parameters; and every pair of robot, ball and ground collides as there."""
    ours = scene.load_native_model()
    names = {name: ROBOT_PREFIX + name for name in ("Trunk", *SHANKS, *THIGHS, *FEET)}
    geoms = {name: (ours.geom(name).id, official.geom(name).id) for name in ("ball", *LOWER_PLANES)}
    for name, body in names.items():
        collides = [
            g
            for g in range(official.ngeom)
            if official.geom_bodyid[g] == official.body(body).id and official.geom_contype[g]
        ]
        assert len(collides) == 1
        geoms[name] = (ours.geom(name).id, collides[0])
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    for name, (a, b) in geoms.items():
        assert ours.geom_type[a] == official.geom_type[b], name
        fields = ("geom_solref", "geom_solimp", "geom_condim")
        fields += () if ours.geom_type[a] == plane else ("geom_size", "geom_pos", "geom_friction")
        for field in fields:
            np.testing.assert_allclose(
                getattr(ours, field)[a], getattr(official, field)[b], atol=1e-9, err_msg=f"{name}.{field}"
            )
    for name in LOWER_PLANES:
        assert ours.geom(name).pos[2] == official.geom(name).pos[2]
    data = mujoco.MjData(official)
    mujoco.mj_kinematics(official, data)
    mesh = official.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    on_field = official.geom_bodyid == official.body("football_field").id
    (hull,) = np.flatnonzero(on_field & mesh & (official.geom_contype > 0))
    half = official.geom_size[hull].min()  # its frame is turned: the thinnest side stands up
    pitch = ours.geom("pitch")
    assert pitch.pos[2] + pitch.size[1] == pytest.approx(data.geom_xpos[hull][2] + half, abs=1e-6)
    assert pitch.size[1] == pytest.approx(half, abs=3e-4)
    for first, (a1, b1) in geoms.items():
        for second, (a2, b2) in geoms.items():
            if first < second:
                assert _may_collide(ours, a1, a2) == _may_collide(official, b1, b2), (first, second)


def _may_collide(model: mujoco.MjModel, a: int, b: int) -> bool:
    return bool(model.geom_contype[a] & model.geom_conaffinity[b] or model.geom_contype[b] & model.geom_conaffinity[a])


def test_constants_equal_the_official_motors(official):
    limits = [official.actuator(ROBOT_PREFIX + name).ctrlrange[1] for name in c.JOINT_NAMES]
    np.testing.assert_array_equal(limits, c.TORQUE_LIMIT_NM)
    assert official.opt.timestep == c.PHYSICS_DT_S
    assert official.geom("ball").size[0] == c.BALL_RADIUS_M


def test_constants_equal_the_official_field(official_envs):
    env = official_envs["goalie"]
    field, goal = (env.parameters_dict["env_parameters"][k] for k in ("field", "goal"))
    assert (field["length"], field["width"]) == (c.FIELD_HALF_LENGTH_M, c.FIELD_HALF_WIDTH_M)
    assert (goal["width"], goal["height"], goal["depth"]) == (c.GOAL_HALF_WIDTH_M, c.GOAL_HEIGHT_M, c.GOAL_DEPTH_M)
    assert env.robots[0].standing_height[0] == c.FALL_HEIGHT_M
    assert env.robots[0].control_freq == round(1 / c.PHYSICS_DT_S)


def test_colliders_equal_the_official(official, ours):
    for name in ROBOT_COLLIDERS:
        body = official.body(ROBOT_PREFIX + name).id
        (geom_id,) = [g for g in range(official.ngeom) if official.geom_bodyid[g] == body and official.geom_contype[g]]
        geom = ours.geom(name)
        np.testing.assert_allclose(geom.pos, official.geom_pos[geom_id], atol=1e-12)
        if name in (*FEET, "Trunk"):
            np.testing.assert_allclose(geom.size, official.geom_size[geom_id], atol=1e-12)
        else:  # cylinder -> capsule: same radius, same total length
            assert name in (*SHANKS, *THIGHS)
            radius, half_length = official.geom_size[geom_id][:2]
            np.testing.assert_allclose([geom.size[0], geom.size[0] + geom.size[1]], [radius, half_length], atol=1e-12)


def test_contact_parameters_equal_the_official(official, ours):
    """All collidable geoms share MuJoCo's defaults but the lower planes, softer: official friction and softness."""
    for i in range(ours.ngeom):
        name = ours.geom(i).name
        for field in ("friction", "solref", "solimp", "condim", "margin", "priority", "solmix"):
            own = field == "solimp" and name in LOWER_PLANES
            expected = getattr(official.geom(name if own else "ball"), field)
            np.testing.assert_array_equal(getattr(ours.geom(i), field), expected, err_msg=f"{name}.{field}")
    for name in LOWER_PLANES:  # theirs never acts, since a contact takes the larger of two
        # which every reset draws anew by interpolation: equal ends may come out an ulp above
        assert (official.geom(name).friction <= official.geom("ball").friction * (1 + 1e-12)).all()


def test_who_collides(ours):
    """The bits give the intended pairs, by MuJoCo's rule."""
    bits = {ours.geom(i).name: (ours.geom_contype[i], ours.geom_conaffinity[i]) for i in range(ours.ngeom)}

    def collide(a, b):
        return bool(bits[a][0] & bits[b][1] or bits[b][0] & bits[a][1])

    for plane in GROUND_PLANES:
        assert {name for name in bits if collide(plane, name)} == {*FEET, *SHANKS, "ball"}
    for plane in LOWER_PLANES:
        assert {name for name in bits if collide(plane, name)} == {*FEET, "ball"}
    ball_ground = {*GROUND_PLANES, *LOWER_PLANES, "pitch_for_ball"}
    assert {name for name in bits if collide("ball", name)} == {*ball_ground, *ROBOT_COLLIDERS, *POSTS}
    foot_ground = {*GROUND_PLANES, *LOWER_PLANES, "pitch"}
    for foot in FEET:
        assert {name for name in bits if collide(foot, name)} == {*foot_ground, *FEET, *SHANKS, "ball"}
    for shank in SHANKS:
        assert {name for name in bits if collide(shank, name)} == {*GROUND_PLANES, *FEET, *SHANKS, *THIGHS, "ball"}
    for thigh in THIGHS:
        assert {name for name in bits if collide(thigh, name)} == {*SHANKS, *THIGHS, "ball"}


def test_kinematics_equal_the_official(official, ours):
    """Same joint angles: every shared site and foot collider at the same place."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        data = []
        quat = rng.normal(size=4)
        root = np.concatenate([rng.normal(size=3), quat / np.linalg.norm(quat)])
        joints = rng.uniform(-0.5, 0.5, 12)
        for model, address in ((ours, scene.addresses(ours)), (official, scene.official_addresses(official))):
            d = mujoco.MjData(model)
            d.qpos[address.root_q], d.qpos[address.joint_q] = root, joints
            mujoco.mj_kinematics(model, d)
            data.append(d)
        for site in ("imu", "left_foot", "right_foot"):
            np.testing.assert_allclose(data[0].site(site).xpos, data[1].site(ROBOT_PREFIX + site).xpos, atol=1e-9)


def test_no_mesh_and_names_only(ours):
    assert ours.nmesh == 0
    source = scene.SCENE_PATH.read_text()
    assert "mesh" not in source and "texture" not in source


@pytest.mark.parametrize("version", ["3.2.6", "3.3.0", "3.4.0", "3.17.0", "4.0.0"])
def test_another_mujoco_is_refused(version):
    with pytest.raises(UserError, match=f"mujoco {version} cannot load.*install mujoco==3.3.7"):
        scene.check_mujoco_version(version)


def test_the_pinned_mujoco_is_accepted():
    assert "mujoco==3.3.7\n" in (Path(__file__).parents[1] / "constraints.txt").read_text()
    scene.check_mujoco_version("3.3.7")
