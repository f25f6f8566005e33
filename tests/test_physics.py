"""The PD layer, our scene against the official model, and MJX against native MuJoCo."""

import re

import mujoco
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs import scene
from booster_soccer.envs.pd import joint_target_rad, platform_torque_nm, torque_nm


def _targets(seed: int, actions: int) -> np.ndarray:
    """Random joint targets (actions, 12) with 0.05 rad spread around the default pose."""
    return c.DEFAULT_POSE_RAD + np.random.default_rng(seed).normal(0, 0.05, (actions, c.NUM_JOINTS))


def _start(model: mujoco.MjModel, address: scene.Addresses) -> mujoco.MjData:
    """The official drop, ball one metre ahead."""
    data = mujoco.MjData(model)
    data.qpos[:] = 0
    data.qpos[address.ball_q] = [1, 0, 0, 1, 0, 0, 0]
    data.qpos[address.root_q] = [0, 0, c.IMU_START_HEIGHT_M, 1, 0, 0, 0]
    return data


def _run_motors(model, address, targets) -> np.ndarray:
    """Base positions (physics steps, 3) under explicit torque from the state before each physics step."""
    data = _start(model, address)
    path = []
    for target in targets:
        for _ in range(c.PHYSICS_STEPS_PER_ACTION):
            data.ctrl[:] = torque_nm(target, data.qpos[address.joint_q], data.qvel[address.joint_v], np)
            mujoco.mj_step(model, data)
            path.append(data.qpos[address.root_q][:3].copy())
    return np.array(path)


def _run_pd_layer(model, address, targets) -> np.ndarray:
    """The same with the PD layer in the actuators."""
    data = _start(model, address)
    path = []
    for target in targets:
        data.ctrl[:] = target
        for _ in range(c.PHYSICS_STEPS_PER_ACTION):
            mujoco.mj_step(model, data)
            path.append(data.qpos[address.root_q][:3].copy())
    return np.array(path)


def test_torque_by_hand():
    action = np.zeros(c.NUM_JOINTS)
    action[0] = 0.1  # left hip pitch target: -0.2 + 0.1 * 1.0
    target = joint_target_rad(action)
    assert target[0] == pytest.approx(-0.1)
    pos, vel = c.DEFAULT_POSE_RAD.copy(), np.zeros(c.NUM_JOINTS)
    pos[3] += 1.0  # left knee 1 rad off: 200 N m, clipped to 65
    vel[5] = 2.0  # left ankle roll: -1 * 2
    torque = torque_nm(target, pos, vel, np)
    np.testing.assert_allclose(torque[[0, 3, 5]], [200 * 0.1, -65.0, -2.0])
    assert not torque[[1, 2, 4]].any() and not torque[6:].any()


def test_platform_torque_is_the_same_law():
    """The float32 form that the SDK computes, against the float64 law, also where it clips."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (200, c.NUM_JOINTS)).astype(np.float32)
    pos, vel = rng.normal(0, 0.5, (2, 200, c.NUM_JOINTS)).astype(np.float32)
    expected = torque_nm(joint_target_rad(action), pos, vel, np)
    assert (np.abs(expected) == c.TORQUE_LIMIT_NM).any() and (np.abs(expected) < c.TORQUE_LIMIT_NM).any()
    np.testing.assert_allclose(platform_torque_nm(action, pos, vel), expected, atol=1e-3)


def test_pd_actuators_equal_explicit_torque():
    """Affine actuators under Euler against motors under implicitfast: bit for bit over 1 s."""
    motor, pd_layer = scene.load_native_motor_model(), scene.load_native_model()
    address = scene.addresses(motor)
    targets = _targets(0, 50)
    np.testing.assert_allclose(
        _run_pd_layer(pd_layer, address, targets), _run_motors(motor, address, targets), atol=1e-10
    )


def test_position_actuators_under_implicitfast_would_differ():
    """Why the integrator matters: the same actuators, damped implicitly, end millimetres away."""
    motor, wrong = scene.load_native_motor_model(), scene.load_native_model()
    wrong.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    address = scene.addresses(motor)
    targets = _targets(0, 50)
    difference = _run_pd_layer(wrong, address, targets) - _run_motors(motor, address, targets)
    assert np.abs(difference[-1]).max() > 1e-3


def test_our_scene_follows_the_official_model(official_envs):
    """Same targets, same law, ten seeds: base within 1 mm at 250 ms and 5 mm at 1 s."""
    official = official_envs["target"].sim.model._model
    ours = scene.load_native_model()
    errors = []
    for seed in range(10):
        targets = _targets(seed, 50)
        a = _run_motors(official, scene.official_addresses(official), targets)
        b = _run_pd_layer(ours, scene.addresses(ours), targets)
        errors.append(np.linalg.norm(a - b, axis=1))
    errors = np.array(errors)
    print(
        f"\nbase error: max {errors[:, 124].max() * 1e3:.4f} mm at 250 ms, {errors[:, 499].max() * 1e3:.3f} mm at 1 s"
    )
    assert errors[:, 124].max() < 1e-3
    assert errors[:, 499].max() < 5e-3


def test_a_running_step_follows_the_official_model(official_envs):
    """A foot driven 20 mm into the ground meets every plane and the thin hull, which then pushes it down."""
    official = official_envs["target"].sim.model._model
    ours = scene.load_native_model()
    errors, deepest = [], 0.0
    for seed in range(5):
        ends = []
        for model, address, law in (
            (official, scene.official_addresses(official), lambda t, q, v: torque_nm(t, q, v, np)),
            (ours, scene.addresses(ours), lambda t, q, v: t),
        ):
            rng = np.random.default_rng(seed)
            data = _start(model, address)
            data.qpos[address.joint_q] = target = c.DEFAULT_POSE_RAD + rng.normal(0, 0.3, c.NUM_JOINTS)
            data.qvel[address.root_v][:3] = [*rng.normal(0, 1.0, 2), -2.5]
            for _ in range(50):
                data.ctrl[:] = law(target, data.qpos[address.joint_q], data.qvel[address.joint_v])
                mujoco.mj_step(model, data)
                deepest = min(deepest, min((contact.dist for contact in data.contact), default=0.0))
            ends.append((data.qpos[address.root_q][:3].copy(), data.qvel[address.joint_v].copy()))
        errors.append([np.abs(a - b).max() for a, b in zip(*ends, strict=True)])
    base_m, joint_rad_s = np.max(errors, axis=0)
    print(f"\ndeepest {deepest * 1e3:.1f} mm; after 100 ms base {base_m * 1e3:.4f} mm, joints {joint_rad_s:.4f} rad/s")
    assert deepest < -0.015
    assert base_m < 1e-4 and joint_rad_s < 0.05


def test_mjx_follows_native():
    """MJX in float32 against native, from the drop and through hard landings, compiled once.

    With MJX's own plane-box function and the two logo planes alone, the landings are 49 to 112 mm and 6 to
    39 rad/s away from native after 100 ms.
    """
    import jax
    import jax.numpy as jnp

    from booster_soccer.envs.mjx_engine import MjxEngine

    ours = scene.load_native_model()
    address = scene.addresses(ours)
    hip_rolls = [c.JOINT_NAMES.index(f"{side}_Hip_Roll") for side in ("Left", "Right")]
    drops, landings, actions = 2, 6, 10
    starts, targets, paths = [], [], []  # per lane; a path is qpos and qvel after every action
    for lane in range(drops + landings):
        start, rng = _start(ours, address), np.random.default_rng(lane)
        target = _targets(0, actions)
        if lane >= drops:
            pose = c.DEFAULT_POSE_RAD + rng.normal(0, 0.2, c.NUM_JOINTS)
            pose[hip_rolls] += (0.3, -0.3)  # legs apart and feet tilted: they meet the ground, not each other
            pose = pose.astype(np.float32)
            start.qpos[address.joint_q], target[:] = pose, pose
            start.qvel[address.root_v][:3] = [*rng.normal(0, 1.0, 2).astype(np.float32), -2.5]
        starts.append((start.qpos.copy(), start.qvel.copy()))
        targets.append(target)
        paths.append([])
        for row in target:
            start.ctrl[:] = row
            mujoco.mj_step(ours, start, c.PHYSICS_STEPS_PER_ACTION)
            paths[-1].append(np.concatenate([start.qpos, start.qvel]))
    qpos, qvel = (jnp.asarray(np.stack(values), jnp.float32) for values in zip(*starts, strict=True))
    engine = MjxEngine(len(starts))
    data = jax.jit(engine.reset)(qpos, jnp.zeros_like(qvel))
    fresh = _start(ours, address)
    mujoco.mj_forward(ours, fresh)
    np.testing.assert_allclose(data.sensordata[0], fresh.sensordata, atol=1e-4)  # the light reset's sensors
    data, targets = data._replace(qvel=qvel), jnp.asarray(np.stack(targets, axis=1), jnp.float32)
    step, mjx_path = jax.jit(engine.step).lower(data, targets[0]).compile(), []
    # LAPACK's calls wait for themselves where there are many lanes and few threads: tests/long/mjx_lanes.py.
    assert set(re.findall(r'custom_call_target="(\w+)', step.as_text())) <= {"TopK"}
    for target in targets:
        data, touched = step(data, target)
        mjx_path.append(np.concatenate([data.qpos, data.qvel], axis=1))
        assert not np.asarray(touched)[:drops].any()
    mjx_path, native = np.stack(mjx_path, axis=1), np.array(paths)
    np.testing.assert_array_equal(mjx_path[0], mjx_path[1])
    error = np.abs(mjx_path - native)
    base_m = error[..., address.root_q][..., :3].max(axis=-1)  # (lanes, actions)
    joint_rad_s = error[..., ours.nq + address.joint_v].max(axis=-1)
    print(
        f"\nMJX against native, drop: base {base_m[0, 4] * 1e3:.4f} mm at 100 ms, {base_m[0, 9] * 1e3:.3f} mm at 200 ms"
        f"\nlandings, worst of {landings}: base {base_m[drops:, 4].max() * 1e3:.4f} mm, joints"
        f" {joint_rad_s[drops:, 4].max():.4f} rad/s at 100 ms"
    )
    assert base_m[0].max() < 1e-4
    assert base_m[drops:, 4].max() < 1e-3 and joint_rad_s[drops:, 4].max() < 0.5
