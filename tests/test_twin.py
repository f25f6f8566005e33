"""The twin gives the official environments' numbers, to the bit, lane by lane.

A short cut of `tests/long/twin_equality.py` (100 seeds, 5,000 steps), and what a batch adds: lanes that do
not disturb each other, threads, errors.
"""

import functools
import threading
import time

import mujoco
import numpy as np
import pytest

from booster_soccer.agents.policy import NumpyPolicy
from booster_soccer.envs import constants as c
from booster_soccer.envs import official, twin, twin_physics, twin_source
from booster_soccer.envs.twin import TwinEnv
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from tests.long import twin_equality

pytestmark = pytest.mark.filterwarnings("ignore")  # gymnasium warns of deprecated versions of these ids

# Episodes (seeds of the source `launched`) that end in every way, and some touch the ball more than once.
THROWN = {"goalie": (6, 9, 10, 13), "obstacle": (1, 7, 8), "target": (10, 11)}
THROWN_EVENTS = {
    "goalie": {"success", "blocked", "offside", "touched", "touched again"},
    "obstacle": {"success", "blocked", "offside", "touched", "touched again"},
    "target": {"success", "offside"},
}

official_env = functools.cache(official.make)


def record(task: str, source: str, seed: int, max_steps: int) -> twin_equality.Recording:
    return twin_equality.record(official_env(task), task, source, seed, max_steps)


def random_policy(scale: float = 1.0) -> NumpyPolicy:
    """A network of the real size with random weights."""
    rng = np.random.default_rng(0)
    sizes = ((OBS_SIZE, 256), (256, 256), (256, c.NUM_JOINTS))
    kernels = tuple(scale * rng.normal(0, n**-0.5, (n, m)).astype(np.float32) for n, m in sizes)
    biases = tuple(np.zeros(m, np.float32) for _, m in sizes)
    return NumpyPolicy(kernels, biases, np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32))


def played(env: TwinEnv, seeds, num_actions: int = 10) -> list[twin.Step]:
    """Steps of a lively episode, the same action for a lane whatever its neighbours do."""
    env.reset(seeds)
    steps = []
    for k in range(num_actions):
        actions = [np.random.default_rng([seed, k]).normal(0, 0.5, c.NUM_JOINTS) for seed in seeds]
        steps.append(env.step_action(np.stack(actions)))
    return steps


def assert_same_lane(found: twin.Step, lane: int, expected: twin.Step, expected_lane: int) -> None:
    def rows(step: twin.Step, i: int) -> dict:
        flat = {"obs": step.obs, "reward": step.reward, "terminated": step.terminated}
        return {key: values[i] for key, values in (flat | step.info | step.reward_terms).items()}

    a, b = rows(found, lane), rows(expected, expected_lane)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# --- equality with the official environments ------------------------------------------------------------


@pytest.mark.parametrize("task", c.TASKS)
def test_sensors_leave_the_official_model_as_it_is(task):
    official_env(task).reset(seed=0)
    ours, theirs = twin_source.load(task).model, official_env(task).unwrapped.sim.model._model
    about_names = ("name_sensoradr", "names", "names_map", "nbuffer", "nnames", "nnames_map", "signature")
    compared = 0
    for field in dir(theirs):
        value = getattr(theirs, field)
        if field.startswith(("_", "sensor_", "nsensor")) or callable(value) or field in about_names:
            continue
        if field == "geom_rgba" or not isinstance(value, (np.ndarray, int, float)):
            continue
        if isinstance(value, (int, float)) or value.dtype.kind in "iufb":
            np.testing.assert_array_equal(getattr(ours, field), value, err_msg=field)
            compared += 1
    assert compared > 300
    for field in (f for f in dir(theirs.opt) if not f.startswith("_")):
        np.testing.assert_array_equal(getattr(ours.opt, field), getattr(theirs.opt, field), err_msg=field)


@pytest.mark.parametrize("task", c.TASKS)
@pytest.mark.parametrize("source", ["zero", "random", "policy"])
def test_every_number_of_every_step_is_the_official_one(task, source):
    recordings = [record(task, source, seed, max_steps=200) for seed in (0, 1)]
    report = twin_equality.compare(task, source, recordings)
    assert report.values > 10_000
    assert not report.unequal


@pytest.mark.parametrize("task", c.TASKS)
def test_goals_blocks_offsides_and_touches_are_the_official_ones(task):
    recordings = [record(task, "launched", seed, max_steps=1000) for seed in THROWN[task]]
    report = twin_equality.compare(task, "launched", recordings)
    assert set(report.events) == THROWN_EVENTS[task]
    assert all(recording.score for recording in recordings)
    assert not report.unequal


def test_the_comparison_sees_a_difference_of_one_bit():
    recording = record("target", "zero", 0, max_steps=10)
    recording.info["ball_xpos_rel_robot"][7, 0] = np.nextafter(recording.info["ball_xpos_rel_robot"][7, 0], 9)
    recording.terms["distance"][3] *= 1 + 1e-15
    report = twin_equality.compare("target", "zero", [recording])
    assert set(report.unequal) == {"info ball_xpos_rel_robot", "reward term distance"}
    assert not report.equal


@pytest.mark.parametrize("task", c.TASKS)
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_reset_draws_what_the_official_reset_draws(task, seed):
    env = TwinEnv(task, 2)
    env.reset([123, seed])
    base = official_env(task).unwrapped
    base.reset(seed=seed)
    model, data = base.sim.model._model, base.sim.data._data
    np.testing.assert_array_equal(env.qpos[1], data.qpos)
    np.testing.assert_array_equal(env.qvel[1], data.qvel)
    friction, *drawn = env.physics.field_values[1]
    np.testing.assert_array_equal(friction, model.geom("field_base").friction)
    if task == "obstacle":
        geoms = [f"defender_geom{i}" for i in range(c.NUM_DEFENDERS)]
        np.testing.assert_array_equal(drawn, [*(model.geom(g).pos for g in geoms), model.site("goalarea_site").pos])
        np.testing.assert_array_equal(env.defender_pos_w[1], [data.geom(g).xpos for g in geoms])
        np.testing.assert_array_equal(env.target_pos_w[1], data.site("goalarea_site").xpos)
    if task == "target":
        np.testing.assert_array_equal(drawn, [model.site("target0").pos])
        np.testing.assert_array_equal(env.target_pos_w[1], data.site("target0").xpos)


def test_time_is_up_after_5000_physics_steps():
    assert official_env("goalie").spec.max_episode_steps == c.EPISODE_PHYSICS_STEPS == 5000
    env = TwinEnv("goalie", 2)
    env.reset([0, 1])
    env.steps[0] = c.EPISODE_PHYSICS_STEPS - 14
    action = np.zeros((2, c.NUM_JOINTS))
    assert not env.step_action(action).truncated.any()
    step = env.step_action(action)
    assert step.truncated.tolist() == [True, False] and not step.terminated.any()
    assert env.steps.tolist() == [c.EPISODE_PHYSICS_STEPS, 20]


# --- lanes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_lane_does_not_depend_on_its_neighbours_or_its_thread(num_threads):
    together = played(TwinEnv("obstacle", 5, num_threads), [3, 1, 4, 1, 5])
    alone = played(TwinEnv("obstacle", 1), [4])
    for a, b in zip(together, alone, strict=True):
        assert_same_lane(a, 2, b, 0)
        assert_same_lane(a, 1, a, 3)


@pytest.mark.parametrize("task", c.TASKS)
def test_any_number_of_threads_gives_the_same_bits(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning into a log file
    num_lanes, rng = 20, np.random.default_rng(0)
    envs = [TwinEnv(task, num_lanes, num_threads) for num_threads in (1, 2, 3)]
    actions, torques = rng.normal(0, 1.0, (2, 40, num_lanes, c.NUM_JOINTS))
    for env in envs:
        env.reset(range(num_lanes))
        env.qpos[7] = np.nan
    ended = 0
    for action, torque_nm in zip(actions, 20 * torques, strict=True):
        calls = [("step_action", action), ("step_torque", torque_nm)]
        results = [[getattr(env, name)(held) for name, held in calls] for env in envs]
        lanes = ~envs[0].alive
        if lanes.any():
            obs_and_infos = [env.reset(range(ended, ended + lanes.sum()), lanes=lanes) for env in envs]
            results = [[*steps, *rest] for steps, rest in zip(results, obs_and_infos, strict=True)]
            ended += lanes.sum()
        for result in results[1:]:
            assert_same_bits(result, results[0])
        for env in envs[1:]:
            assert_same_bits([env.qpos, *env.shot], [envs[0].qpos, *envs[0].shot])
    assert ended > num_lanes // 4
    for env in envs:
        env.close()


def assert_same_bits(found, expected) -> None:
    """For arrays, and dicts, tuples and lists of them; NaN included."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, b)
    else:
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()


def test_an_ended_lane_is_frozen_and_resets_alone():
    env = TwinEnv("target", 3)
    env.reset([0, 1, 2])
    env.qpos[1, env._address.root_q.start + 2] -= 0.35  # z of the trunk: fallen from the start
    action = np.zeros((3, c.NUM_JOINTS))
    first = env.step_action(action)
    assert first.terminated.tolist() == [False, True, False]
    assert env.steps.tolist() == [10, 1, 10]
    action[1] = np.nan  # nobody reads it
    second = env.step_action(action)
    assert second.reward[1] == 0.0
    assert_same_lane(second._replace(reward=first.reward), 1, first, 1)

    obs, info = env.reset([7], lanes=np.array([False, True, False]))
    fresh_obs, _ = TwinEnv("target", 1).reset([7])
    np.testing.assert_array_equal(obs[1], fresh_obs[0])
    np.testing.assert_array_equal(obs[[0, 2]], second.obs[[0, 2]])
    assert env.alive.all() and env.steps.tolist() == [20, 0, 20]


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e11])
@pytest.mark.parametrize("task", c.TASKS)
def test_a_broken_lane_does_what_the_official_environment_does_and_stops_nobody(task, broken, tmp_path, monkeypatch):
    """MuJoCo starts such a lane again, in the middle of the episode, which goes on: at another time of the keeper."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning into a log file
    env, healthy, base = TwinEnv(task, 3, num_threads=2), TwinEnv(task, 2), official_env(task)
    obs, _ = env.reset([0, 1, 2])
    base.reset(seed=1)
    healthy.reset([0, 2])
    sim = base.unwrapped.sim.data
    torques = np.random.default_rng(0).normal(0, 5, (60, 3, c.NUM_JOINTS))
    for i, torque in enumerate(torques):
        if i == 40:
            env.qpos[1, env._address.joint_q[0]] = broken
            sim.qpos[env._address.joint_q[0]] = broken
        if i == 50:
            env.qvel[1, env._address.joint_v[0]] = broken
            sim.qvel[env._address.joint_v[0]] = broken
        step = env.step_torque(torque)
        obs, reward, terminated, truncated, info = base.step(torque[1])
        assert not terminated and not truncated  # else nothing is left to compare
        assert (step.reward[1], step.terminated[1], step.truncated[1]) == (reward, terminated, truncated)
        np.testing.assert_array_equal(step.obs[1], obs)
        for key, value in info.items():
            if key in step.info:
                np.testing.assert_array_equal(step.info[key][1], value, err_msg=key)
        np.testing.assert_array_equal(env.qpos[1], sim.qpos)
        expected = healthy.step_torque(torque[[0, 2]])
    assert_same_lane(step, 0, expected, 0)
    assert_same_lane(step, 2, expected, 1)
    env.close()


def test_an_error_in_one_thread_waits_for_the_others(monkeypatch):
    env = TwinEnv("target", 4, num_threads=2)
    env.reset(range(4))
    started, finished = threading.Event(), threading.Event()
    slow, failing = env.physics._workers[1], env.physics._workers[0]

    def slowly(rows):
        started.set()
        time.sleep(0.3)
        finished.set()

    def fail(rows):
        started.wait()
        raise RuntimeError("broken")

    monkeypatch.setattr(slow, "advance", slowly)
    monkeypatch.setattr(failing, "advance", fail)
    with pytest.raises(RuntimeError, match="broken"):
        env.step_torque(np.zeros((4, c.NUM_JOINTS)))
    assert finished.is_set()
    env.close()


def test_state_that_the_copies_would_miss_is_refused():
    spec = twin_source.load("target").env.unwrapped.mjcf_model.copy()
    spec.worldbody.add_body(mocap=True).add_geom(size=[0.1, 0.1, 0.1])
    with pytest.raises(UserError, match="has more state"):
        twin_physics.layout_of(mujoco.MjData(spec.compile()))


# --- bad input ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env():
    env = TwinEnv("target", 2)
    env.reset([0, 1])
    return env


def actions_with(value: float) -> np.ndarray:
    actions = np.zeros((2, c.NUM_JOINTS))
    actions[1, 3] = value
    return actions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda env: env.step_torque(actions_with(np.nan)), "torque of lane 1 holds NaN"),
        (lambda env: env.step_action(actions_with(-np.inf)), "action of lane 1 holds NaN or infinity"),
        (lambda env: env.step_torque(np.zeros(12)), r"shape \(12,\), expected numbers of shape \(2, 12\)"),
        (lambda env: env.step_action(np.zeros((2, 11))), r"shape \(2, 11\), expected numbers of shape \(2, 12\)"),
        (lambda env: env.step_torque(np.zeros((2, 12)), num_steps=0), "be held for 0 physics steps"),
        (lambda env: env.step_action([[0.0] * 12, [0.0] * 11]), r"holds object .* \(2, 12\): one row for each lane"),
        (lambda env: env.step_action("stand"), "action holds <U5 .* expected numbers"),
        (lambda env: env.reset(3), "give a list of seeds"),
        (lambda env: env.reset([0], lanes=[2]), "lanes below 2"),
        (lambda env: env.reset([0], lanes=np.array([True])), "lanes below 2"),
        (lambda env: env.reset([0, -1]), "seed of lane 1 is -1"),
        (lambda env: env.reset([2**64], lanes=np.array([1])), "seed of lane 1 is 18446744073709551616"),
        (lambda env: env.reset([0.5, 1]), "seed of lane 0 is 0.5: give an integer"),
        (lambda env: env.reset([0]), "1 seeds for 2 lanes"),
        (lambda env: env.reset([0, 1], start_noise_rad=-0.1), "start noise is -0.1"),
        (lambda env: env.reset([0, None]), "seed of lane 1 is None: give an integer"),
        (lambda env: TwinEnv("penalty", 2), "unknown task 'penalty': choose one of goalie, obstacle, target"),
        (lambda env: TwinEnv("target", 0), r"lanes \(0\)"),
        (lambda env: TwinEnv("target", 1).step_torque(np.zeros((1, 12))), "call reset"),
    ],
)
def test_bad_input_is_one_clear_error(env, call, message):
    before = env.qpos.copy()
    with pytest.raises(UserError, match=message):
        call(env)
    np.testing.assert_array_equal(env.qpos, before)


def test_another_mujoco_is_named(monkeypatch):
    monkeypatch.setattr("booster_soccer.envs.scene.check_mujoco_version.__defaults__", ("3.4.0",))
    with pytest.raises(UserError, match="mujoco 3.4.0 cannot load"):
        TwinEnv("target", 1)
