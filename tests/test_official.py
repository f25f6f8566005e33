"""The official environments as we run them, against the bare environments and values worked out by hand."""

import dataclasses
import math

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd, scene
from booster_soccer.errors import UserError
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.official import score_terms


@pytest.fixture(scope="module")
def envs():
    return {task: official.make(task) for task in c.TASKS}


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


def test_task_one_hot_is_in_info_on_reset_and_step(envs):
    for i, task in enumerate(("goalie", "obstacle", "target")):
        _, info = envs[task].reset(seed=1)
        *_, info_after_step = envs[task].step(np.zeros(12))
        for one_hot in (info["task_index"], info_after_step["task_index"]):
            assert one_hot.dtype == np.float32
            assert one_hot.tolist() == [float(i == 0), float(i == 1), float(i == 2)]


def test_match_seed_is_the_platforms():
    from sai_rl.benchmark.seed import get_match_seed

    assert [official.match_seed(7, i) for i in range(5)] == [get_match_seed(7, i) for i in range(5)]
    # Pinned, so that another version of the platform's package is noticed.
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
    zero = official.run_episode(envs["goalie"], "goalie", official.reference_policy("zero"), seed=1)
    hold = official.run_episode(envs["goalie"], "goalie", official.reference_policy("hold"), seed=1)
    assert (zero.steps, hold.steps) == (278, 576)
    assert zero.fell and hold.fell
    assert zero.imu_height_m <= c.FALL_HEIGHT_M
    assert zero.score == pytest.approx(-2.49, abs=0.005)
    assert hold.score == pytest.approx(-2.47, abs=0.005)
    assert zero.terms["robot_fallen"] == -1.5 and zero.terms["steps"] == -1.0
    assert zero.touches == 0 and not zero.success


def test_target_baseline_scores_by_the_distance_alone(envs):
    result = official.run_episode(envs["target"], "target", None, seed=3)
    model, data = physics(envs["target"])
    distance = np.linalg.norm(data.site("ball").xpos - data.site("target0").xpos)
    assert result.score == pytest.approx(0.5 * math.exp(-distance) - 0.3)
    assert result.fell and result.steps == 278


def test_an_episode_depends_on_its_seed_and_noise_only(envs):
    policy = official.reference_policy("hold")
    for task in ("obstacle", "target"):
        first = official.run_episode(envs[task], task, policy, seed=11, start_noise_rad=0.02)
        official.run_episode(envs[task], task, None, seed=12)
        again = official.run_episode(envs[task], task, policy, seed=11, start_noise_rad=0.02)
        fresh = official.run_episode(official.make(task), task, policy, seed=11, start_noise_rad=0.02)
        assert first == again == fresh
        assert first != official.run_episode(envs[task], task, policy, seed=11)


def test_goalie_is_one_episode_whatever_the_seed_until_the_start_is_noisy(envs):
    env, policy = envs["goalie"], official.reference_policy("hold")
    results = [official.run_episode(env, "goalie", policy, seed) for seed in (1, 2)]
    assert dataclasses.replace(results[0], seed=2) == results[1]
    noisy = [official.run_episode(env, "goalie", policy, seed, start_noise_rad=0.02) for seed in (1, 2)]
    assert noisy[0].score != noisy[1].score


def test_held_control_against_a_loop_written_out(envs):
    """A loop over the bare environment gives the same episode."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0.0, 0.02, (87, 12)).astype(np.float32)

    def policy(obs):
        assert obs.shape == (87,) and obs.dtype == np.float32
        return np.tanh(obs @ weights)

    env = gym.make("LowerT1KickToTarget-v0")
    obs, info = env.reset(seed=9)
    steps, terminated, truncated = 0, False, False
    while not (terminated or truncated):
        info["task_index"] = np.array([0.0, 0.0, 1.0], dtype=np.float32)
        if steps % 10 == 0:
            action = policy(Preprocessor().modify_state(obs, info)[0])
        obs, _, terminated, truncated, info = env.step(pd.platform_torque_nm(action, obs[:12], obs[12:24]))
        steps += 1
    score = sum(score_terms("target", env.unwrapped.compute_reward()).values())

    result = official.run_episode(envs["target"], "target", policy, seed=9)
    assert (result.steps, result.score) == (steps, score)
    assert official.run_episode(envs["target"], "target", policy, seed=9, hold=1).score != score


def test_walked_distance_and_ball_distance_of_a_falling_robot(envs):
    """Without torque the robot, 2 m behind the ball, sinks and moves by decimetres."""
    result = official.run_episode(envs["goalie"], "goalie", None, seed=1)
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
    result = official.run_episode(env, "goalie", official.reference_policy("hold"), seed=1)
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
    with pytest.raises(UserError, match="unknown reference policy 'walk'.*zero, hold"):
        official.reference_policy("walk")
    with pytest.raises(UserError, match="NaN.*task 'goalie', seed 4, physics step 0"):
        official.run_episode(envs["goalie"], "goalie", lambda obs: np.full(12, np.nan), seed=4)
    with pytest.raises(UserError, match=r"shape \(24,\) instead of \(12,\)"):
        official.run_episode(envs["goalie"], "goalie", lambda obs: np.zeros(24), seed=4)


def test_another_mujoco_is_refused(monkeypatch):
    monkeypatch.setattr(scene.check_mujoco_version, "__defaults__", ("3.8.1",))
    with pytest.raises(UserError, match="mujoco 3.8.1 cannot load"):
        official.make("goalie")
