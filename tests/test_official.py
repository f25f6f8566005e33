"""The official environments as we run them, against the bare environments and values worked out by hand."""

import dataclasses
import hashlib
import hmac
import math

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, scene
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.official import WEIGHTS, score_terms
from booster_soccer.rollout.lanes import OfficialLanes
from booster_soccer.rollout.play import Episode, EpisodeResult, Policy, play, reference_policy


@pytest.fixture(scope="module")
def envs():
    return {task: official.make(task) for task in c.TASKS}


def run_episode(env, task: str, policy: Policy, seed: int, start_noise_rad=0.0, hold_steps=10) -> EpisodeResult:
    [result] = play(OfficialLanes(task, env, hold_steps), policy, [Episode(task, seed)], start_noise_rad)
    return result


def physics(env):
    sim = env.unwrapped.sim
    return sim.model._model, sim.data._data


def place_ball(env, centre_w, velocity_w=(0.0, 0.0, 0.0)):
    """Put the ball's centre somewhere, not turned and without spin."""
    model, data = physics(env)
    where = scene.official_addresses(model)
    site_w = np.array(centre_w) - [0.0, 0.0, c.BALL_RADIUS_M]
    data.qpos[where.ball_q] = [*site_w, 1.0, 0.0, 0.0, 0.0]
    data.qvel[where.ball_v] = [*velocity_w, 0.0, 0.0, 0.0]


def play_ball(env, centre_w, velocity_w):
    """Steps without torque from a start with this ball until the end; the score's terms."""
    official.reset(env, seed=1)
    place_ball(env, centre_w, velocity_w)
    terminated = truncated = False
    while not (terminated or truncated):
        _, _, terminated, truncated, _ = env.step(np.zeros(c.NUM_JOINTS))
    return env.unwrapped.compute_reward()


# --- environment, seeds, start ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "one_hot"), [("goalie", [1.0, 0.0, 0.0]), ("obstacle", [0.0, 1.0, 0.0]), ("target", [0.0, 0.0, 1.0])]
)
def test_task_one_hot_is_in_info_on_reset_and_step(envs, task, one_hot):
    _, info = envs[task].reset(seed=1)
    *_, info_after_step = envs[task].step(np.zeros(12))
    for found in (info["task_index"], info_after_step["task_index"]):
        assert found.dtype == np.float32 and found.tolist() == one_hot


def test_match_seeds_are_derived_as_the_platform_does():
    """HMAC-SHA-256 by hand (extract and expand, as of RFC 5869), and two numbers that its package once gave."""
    for master, index in ((0, 0), (7, 3), (2**64 - 1, 99)):
        key = hmac.new(bytes(32), master.to_bytes(32, "big"), hashlib.sha256).digest()
        drawn = hmac.new(key, index.to_bytes(8, "big") + b"\x01", hashlib.sha256).digest()
        assert official.match_seed(master, index) == int.from_bytes(drawn[:8], "big")
    assert official.match_seed(1, 1) == 17601251312311990324
    assert official.match_seed(1, 2) == 6862948550870928247


def test_start_noise_moves_the_joints_by_the_seeds_noise_and_nothing_else(envs):
    for task, env in envs.items():
        obs, info = official.reset(env, seed=5)
        _, data = physics(env)
        qpos = data.qpos.copy()
        noisy_obs, noisy_info = official.reset(env, seed=5, noise_sd_rad=0.02)
        noise = official.start_noise_rad(5, 0.02)
        joints = scene.official_addresses(env.unwrapped.sim.model._model).joint_q
        qpos[joints] += noise
        np.testing.assert_array_equal(data.qpos, qpos)
        assert not data.qvel.any()
        np.testing.assert_allclose(noisy_obs[:12], obs[:12] + noise, atol=1e-7)
        assert not noisy_obs[12:24].any()
        assert set(noisy_info) == set(info), task
        np.testing.assert_array_equal(noisy_info["target_xpos_rel_robot"], info["target_xpos_rel_robot"])


def test_info_of_a_noisy_start_belongs_to_the_moved_joints(envs):
    env = envs["goalie"]
    _, info = official.reset(env, seed=5)
    _, noisy_info = official.reset(env, seed=5, noise_sd_rad=0.2)
    assert not np.array_equal(info["robot_accelerometer"], noisy_info["robot_accelerometer"])
    model, data = physics(env)
    mujoco.mj_forward(model, data)
    np.testing.assert_array_equal(
        noisy_info["robot_accelerometer"], data.sensor("robot_0:accelerometer").data.astype(np.float32)
    )


def test_start_noise_has_the_asked_spread_and_its_own_stream():
    noise = np.array([official.start_noise_rad(seed, 0.02) for seed in range(2000)])
    assert noise.shape == (2000, 12)
    assert abs(noise.mean()) < 0.001
    assert noise.std() == pytest.approx(0.02, rel=0.02)
    # The environment draws from the bare seed: our noise must not repeat its numbers.
    assert not np.allclose(noise[3], np.random.default_rng(3).normal(0.0, 0.02, 12))


# --- episodes ---------------------------------------------------------------------------------------


def test_baselines_fall_when_measured_before(envs):
    zero = run_episode(envs["goalie"], "goalie", reference_policy("zero"), seed=1)
    hold = run_episode(envs["goalie"], "goalie", reference_policy("hold"), seed=1)
    assert (zero.physics_steps, hold.physics_steps) == (278, 576)
    assert zero.fell and hold.fell
    assert zero.imu_height_m <= c.FALL_HEIGHT_M
    assert zero.score == pytest.approx(-2.49, abs=0.005)
    assert hold.score == pytest.approx(-2.47, abs=0.005)
    assert zero.terms["robot_fallen"] == -1.5 and zero.terms["steps"] == -1.0
    assert zero.touches == 0 and not zero.success


def test_target_baseline_scores_by_the_distance_alone(envs):
    result = run_episode(envs["target"], "target", None, seed=3)
    model, data = physics(envs["target"])
    distance = np.linalg.norm(data.site("ball").xpos - data.site("target0").xpos)
    assert result.score == pytest.approx(0.5 * math.exp(-distance) - 0.3)
    assert result.fell and result.physics_steps == 278


def test_an_episode_depends_on_its_seed_and_noise_only(envs):
    policy = reference_policy("hold")
    for task in ("obstacle", "target"):
        first = run_episode(envs[task], task, policy, seed=11, start_noise_rad=0.02)
        run_episode(envs[task], task, None, seed=12)
        again = run_episode(envs[task], task, policy, seed=11, start_noise_rad=0.02)
        fresh = run_episode(official.make(task), task, policy, seed=11, start_noise_rad=0.02)
        assert first == again == fresh
        assert first != run_episode(envs[task], task, policy, seed=11)


def test_goalie_is_one_episode_whatever_the_seed_until_the_start_is_noisy(envs):
    env, policy = envs["goalie"], reference_policy("hold")
    results = [run_episode(env, "goalie", policy, seed) for seed in (1, 2)]
    assert dataclasses.replace(results[0], seed=2) == results[1]
    noisy = [run_episode(env, "goalie", policy, seed, start_noise_rad=0.02) for seed in (1, 2)]
    assert noisy[0].score != noisy[1].score


@pytest.mark.parametrize("task", c.TASKS)
def test_an_episode_against_a_loop_written_out(envs, task):
    """Every number that the bare environment can give, with control, score and path by hand."""
    weights = np.random.default_rng(0).normal(0.0, 0.02, (OBS_SIZE, 12)).astype(np.float32)

    def policy(obs):
        assert obs.shape == (OBS_SIZE,) and obs.dtype == np.float32
        return np.tanh(obs @ weights)

    env = gym.make(c.GYM_ID[task])
    obs, info = env.reset(seed=9)
    base, (_, data) = env.unwrapped, physics(env)
    one_hot = np.eye(c.NUM_TASKS, dtype=np.float32)[c.TASKS.index(task)]
    path, distances = [data.site("robot_0:imu").xpos.copy()], []
    steps, ended = 0, False
    while not ended:
        if steps % 10 == 0:
            path.append(data.site("robot_0:imu").xpos.copy())
            distances.append(np.linalg.norm((path[-1] - data.geom("ball").xpos)[:2]))
            action = policy(Preprocessor().modify_state(obs, info | {"task_index": one_hot})[0])
        obs, _, terminated, truncated, info = env.step(pd.platform_torque_nm(action, obs[:12], obs[12:24]))
        steps, ended = steps + 1, terminated or truncated
    path.append(data.site("robot_0:imu").xpos.copy())
    raw = base.compute_reward() | {"steps": 1.0}

    result = run_episode(envs[task], task, policy, seed=9)
    assert result.physics_steps == steps and result.fell == (path[-1][2] <= 0.4) and not result.success
    assert result.touches == (0 if task == "target" else base.ball_hits_by_robot)  # there it never gets near
    assert result.score == pytest.approx(sum(weight * raw.get(name, 0) for name, weight in WEIGHTS[task].items()))
    assert result.walked_m == pytest.approx(np.linalg.norm(np.diff(np.array(path)[:, :2], axis=0), axis=1).sum())
    assert result.ball_distance_min_m == pytest.approx(min(distances), abs=0.02)  # the last instant may be nearer
    assert result.imu_height_m == path[-1][2] and result.ball_height_max_m == pytest.approx(0.12, abs=0.02)
    assert run_episode(envs[task], task, policy, seed=9, hold_steps=1).score != result.score


def test_walked_distance_and_ball_distance_of_a_falling_robot(envs):
    """Without torque the robot, 2 m behind the ball, sinks and moves by decimetres."""
    result = run_episode(envs["goalie"], "goalie", None, seed=1)
    assert 0.1 < result.walked_m < 0.3
    assert 2.0 - 0.3 < result.ball_distance_min_m < 2.0
    assert result.ball_speed_site_m_s < 1e-3 and result.ball_speed_centre_m_s < 1e-3


def test_touches_are_those_of_the_environment(envs, monkeypatch):
    """The robot falls onto a ball that lies before its feet."""
    reset = official.reset

    def reset_with_ball_at_the_feet(env, seed, noise_sd_rad=0.0):
        reset(env, seed, noise_sd_rad)
        model, data = physics(env)
        robot_w = data.site("robot_0:imu").xpos
        place_ball(env, [robot_w[0] - 0.35, 0.05, c.BALL_RADIUS_M + 0.01])
        mujoco.mj_forward(model, data)
        return env.unwrapped._get_obs(), env.unwrapped._get_info() | {"task_index": env.task_index}

    monkeypatch.setattr(official, "reset", reset_with_ball_at_the_feet)
    env = envs["goalie"]
    result = run_episode(env, "goalie", reference_policy("hold"), seed=1)
    assert result.touches == env.unwrapped.ball_hits_by_robot >= 1
    assert result.terms["robot_distance_ball"] == 0.25 * 1.5
    assert result.terms["ball_hits"] == pytest.approx(-0.2 * math.log(result.touches))


# --- the score at the environment's own events ------------------------------------------------------


def test_goal_beside_the_keeper(envs):
    raw = play_ball(envs["goalie"], centre_w=(-10.5, 1.3, 0.6), velocity_w=(-4.0, 0.0, 0.0))
    terms = score_terms("goalie", raw)
    assert terms["goal_scored"] == 2.5
    assert terms["ball_blocked"] == terms["offside"] == 0.0
    assert terms["ball_vel_twd_goal"] == pytest.approx(1.5 * 4.0, rel=1e-6)  # in flight, nothing slows it


def test_shot_at_the_keeper_is_blocked(envs):
    terms = score_terms("goalie", play_ball(envs["goalie"], (-10.5, 0.3, 0.6), (-4.0, 0.0, 0.0)))
    assert terms["ball_blocked"] == -0.5
    assert terms["offside"] == 0.0


def test_shot_past_the_post_is_offside(envs):
    terms = score_terms("goalie", play_ball(envs["goalie"], (-10.5, 2.5, 0.6), (-4.0, 0.0, 0.0)))
    assert terms["offside"] == -3.0
    assert terms["goal_scored"] == 0.0
    assert terms["ball_vel_twd_goal"] == pytest.approx(6.0, rel=1e-6)


def test_obstacle_needs_the_raised_window(envs):
    env = envs["obstacle"]
    official.reset(env, seed=1)
    window_w = env.unwrapped.sim.data.get_site_xpos("goalarea_site").copy()
    through = window_w + [0.6, 0.0, c.BALL_RADIUS_M]  # the site, below the centre, flies at its height
    terms = score_terms("obstacle", play_ball(env, through, (-6.0, 0.0, 0.0)))
    assert terms["goal_scored"] == 2.5
    beside = [-10.5, 2.0, 0.6]
    terms = score_terms("obstacle", play_ball(env, beside, (-6.0, 0.0, 0.0)))
    assert (terms["goal_scored"], terms["offside"]) == (0.0, -3.0)


def test_target_hit(envs):
    env = envs["target"]
    official.reset(env, seed=1)
    target_w = env.unwrapped.goal_pos.copy()
    raw = play_ball(env, target_w + [0.1, 0.0, c.BALL_RADIUS_M + 0.02], (0.0, 0.0, 0.0))
    terms = score_terms("target", raw)
    assert terms["success"] == 2.0
    assert terms["distance"] == pytest.approx(0.5 * math.exp(-0.1), rel=0.02)


def test_asking_for_the_reward_again_does_not_count_a_touch(envs):
    """What the platform does on every episode's last step; with the ball at the foot and away from it."""
    env = envs["goalie"]
    official.reset(env, seed=1)
    _, data = physics(env)
    foot_w = data.body("robot_0:left_foot_link").xpos.copy()
    away_w = foot_w + [-2.0, 0.0, 0.3]
    hits = []
    for centre_w in (foot_w, away_w, foot_w, away_w, foot_w):
        place_ball(env, centre_w)
        env.step(np.zeros(c.NUM_JOINTS))
        after_step = env.unwrapped.ball_hits_by_robot
        raw = [env.unwrapped.compute_reward() for _ in range(2)]
        assert env.unwrapped.ball_hits_by_robot == after_step
        assert raw[0] == raw[1]
        hits.append(after_step)
    assert hits == [1, 1, 2, 2, 3]
    assert score_terms("goalie", raw[-1])["ball_hits"] == pytest.approx(-0.2 * math.log(3))


# --- bad input --------------------------------------------------------------------------------------


def test_bad_input_is_told_in_one_line(envs):
    with pytest.raises(UserError, match="unknown task 'rugby'.*goalie, obstacle, target"):
        official.make("rugby")
    with pytest.raises(UserError, match="no lane plays task 'target', only goalie"):
        list(play(OfficialLanes("goalie", envs["goalie"]), None, [Episode("target", 1)]))
    with pytest.raises(UserError, match="unknown reference policy 'walk'.*zero, hold"):
        reference_policy("walk")
    with pytest.raises(UserError, match="NaN.*task 'goalie', seed 4, physics step 0"):
        run_episode(envs["goalie"], "goalie", lambda obs: np.full(12, np.nan), seed=4)
    with pytest.raises(UserError, match=r"shape \(24,\) instead of \(12,\)"):
        run_episode(envs["goalie"], "goalie", lambda obs: np.zeros(24), seed=4)


def test_another_mujoco_is_refused(monkeypatch):
    monkeypatch.setattr(scene.check_mujoco_version, "__defaults__", ("3.8.1",))
    with pytest.raises(UserError, match="mujoco 3.8.1 cannot load"):
        official.make("goalie")
