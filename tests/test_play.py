"""The one player: the same numbers on all lanes and in any number of workers, which an exception ends at once."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from booster_soccer.agents.policy import NumpyPolicy
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.envs.official import Ball
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES
from booster_soccer.rollout import play as player
from booster_soccer.rollout.lanes import OfficialLanes, Outcome, SceneLanes, Sight, TwinLanes
from booster_soccer.rollout.play import Episode, hold_default_pose, play, play_in_workers


def random_policy() -> NumpyPolicy:
    """A network of the real size with random weights."""
    rng = np.random.default_rng(0)
    sizes = ((OBS_SIZE, 256), (256, 256), (256, c.NUM_JOINTS))
    kernels = tuple(rng.normal(0, n**-0.5, (n, m)).astype(np.float32) for n, m in sizes)
    biases = tuple(np.zeros(m, np.float32) for _, m in sizes)
    return NumpyPolicy(kernels, biases, np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32))


# --- by hand ----------------------------------------------------------------------------------------------


class ScriptedLanes:
    """One goalie lane whose robot walks 3-4-5 triangles past a ball that rolls at the goal, and falls."""

    tasks = ["goalie"]
    path = ([0.0, 0.0, 0.7], [-3.0, 4.0, 0.6], [-3.0, 4.0, 0.55], [-6.0, 0.0, 0.3])  # imu, m

    def reset(self, lanes, seeds, start_noise_rad):
        assert (lanes, seeds, start_noise_rad) == ([0], [5], 0.1)
        self.actions = []

    def hold(self, action):
        self.actions.append(action)
        return np.array([len(self.actions) == 3]), np.array([False])

    def observe(self):
        return np.full((1, OBS_SIZE), len(self.actions), np.float32)

    def look(self):
        centre_vel_w, site_vel_w = np.array([[-2.0, 0.0, 0.0]]), np.array([[-3.0, 0.0, 0.0]])
        ball = Ball(np.array([[-3.0, 3.5, 0.11]]), centre_vel_w, np.array([[-3.0, 3.5, 0.22]]), site_vel_w)
        now = len(self.actions)
        return Sight(np.array([10 * now]), np.array([self.path[now]]), ball, np.array([[-10.97, 0.0, 0.0]]))

    def outcome(self, lane):
        return Outcome(1.5, {"steps": -1.0}, True, False, 1, 0.5, None)


def test_what_is_said_of_an_episode_by_hand():
    lanes = ScriptedLanes()
    [result] = play(lanes, lambda obs: np.full(12, obs[0] / 4, np.float32), [Episode("goalie", 5)], 0.1)
    assert [action[0, 0] for action in lanes.actions] == [0.0, 0.25, 0.5]
    assert (result.task, result.seed, result.score, result.physics_steps, result.fell) == ("goalie", 5, 1.5, 30, True)
    assert result.walked_m == 10.0  # 5, 0 and 5 m
    assert result.ball_distance_min_m == 0.5 and result.imu_height_m == 0.3
    assert (result.ball_speed_site_m_s, result.ball_speed_centre_m_s) == (3.0, 2.0)
    assert result.roll_score == 1.5  # 1.5 points per m/s, of which the site has 1 more
    assert result.roll_phase_deg == pytest.approx(180.0) and result.shot_speed_m_s is None
    assert result.aim_pos_w == [-10.97, 0.0, 0.0]
    assert result.path == [[0.0, 0.0, 0.0, -3.0, 3.5, 0.11], [0.06, -6.0, 0.0, -3.0, 3.5, 0.11]]


# --- on lanes here ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "policy"),
    [*((task, random_policy()) for task in c.TASKS), ("goalie", hold_default_pose), ("target", None)],
)
def test_the_twin_gives_the_official_results_on_fewer_lanes_than_episodes(task, policy):
    """float64 actions, those of `hold_default_pose`, are taken as they are; None is zero torque."""
    episodes = [Episode(task, official.match_seed(3, i)) for i in range(3)]
    expected = list(play(OfficialLanes(task), policy, episodes, 0.02))
    assert list(play(TwinLanes(task, 2, num_threads=2), policy, episodes, 0.02)) == expected
    assert [(result.task, result.seed) for result in expected] == episodes
    for result in expected:  # ten rows of a path a second, and the end
        times = [row[0] for row in result.path]
        assert times[:-1] == [round(0.1 * i, 2) for i in range(len(times) - 1)]
        assert times[-1] == round(result.physics_steps * 0.002, 2)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda obs: np.full(c.NUM_JOINTS, np.nan), "returned NaN or infinity in task 'target', seed 9"),
        (lambda obs: np.zeros(24), r"returned shape \(24,\) instead of \(12,\) in task 'target', seed 9"),
    ],
)
def test_a_broken_policy_is_named(policy, message):
    with pytest.raises(UserError, match=message):
        list(play(TwinLanes("target", 1), policy, [Episode("target", 9)]))


def test_our_scene_starts_where_the_official_environments_do_and_tells_of_the_ball():
    """Robots that stand until they fall, one that has no ball to score with; more episodes than lanes."""
    lanes, episodes = SceneLanes(c.NUM_TASKS), [Episode(task, seed) for seed in (4, 5) for task in c.TASKS]
    lanes.reset(range(c.NUM_TASKS), c.NUM_TASKS * [4], 0.02)
    now, first = lanes.look(), lanes.observe()
    np.testing.assert_array_equal(first[:, SLICES["task_one_hot"]], np.eye(c.NUM_TASKS))
    for lane, task in enumerate(c.TASKS):
        of_task = OfficialLanes(task)
        of_task.reset([0], [4], 0.02)
        expected = of_task.look()
        np.testing.assert_allclose(now.imu_pos_w[lane], expected.imu_pos_w[0], atol=1e-6)
        np.testing.assert_allclose(now.aim_pos_w[lane], expected.aim_pos_w[0], atol=1e-6)
        np.testing.assert_allclose(now.ball.centre_pos_w[lane], expected.ball.centre_pos_w[0], atol=0.02)
        np.testing.assert_allclose(first[lane, :12], of_task.observe()[0, :12], atol=1e-6)
        of_task.close()
    results = list(play(lanes, hold_default_pose, episodes, 0.02))
    alone = list(play(lanes, hold_default_pose, episodes[4:5], 0.02))
    assert [(result.task, result.seed) for result in results] == episodes
    for result in results:
        assert result.fell and 300 < result.physics_steps < 1000 and result.touches == 0 and not result.success
        assert result.shot_speed_m_s is None and result.ball_height_max_m == pytest.approx(0.12, abs=0.02)
        assert sum(result.terms.values()) == pytest.approx(result.score, abs=1e-5)
    assert (alone[0].physics_steps, alone[0].score) == (results[4].physics_steps, results[4].score)
    with pytest.raises(UserError, match="no zero torque"):
        list(play(lanes, None, episodes))
    lanes.close()


def test_a_policy_meets_what_an_official_environment_shows(monkeypatch):
    observed, raw, info = player.record(
        "obstacle", hold_default_pose, 70, lambda i: 7 + i, 0.0, official.make("obstacle")
    )
    assert observed.shape == (70, OBS_SIZE) and len(raw) == len(info["task_index"]) == 70
    np.testing.assert_array_equal(observed[:, :24], raw[:, :24])
    starts = np.flatnonzero(~raw[:, :24].any(axis=1))  # standing straight, at rest
    assert len(starts) == 2 and starts[0] == 0  # it fell once
    for start, seed in zip(starts, (7, 8)):
        obs, _ = official.make("obstacle").reset(seed=seed)
        np.testing.assert_array_equal(raw[start], obs)
    met = player.met_observations(hold_default_pose, 2, 0, 0.02)
    assert met[:, SLICES["task_one_hot"]].tolist() == np.repeat(np.eye(c.NUM_TASKS), 2, axis=0).tolist()


# --- in workers -------------------------------------------------------------------------------------------


def test_workers_keep_the_order_and_the_numbers():
    episodes = [Episode("target", 5), Episode("goalie", 4), Episode("target", 6)]
    arrived = []

    def progress(results):
        for result in results:
            arrived.append(result)
            yield result

    found = play_in_workers("twin", None, episodes, workers=2, progress=progress)
    expected = [list(play(OfficialLanes(episode.task), None, [episode]))[0] for episode in episodes]
    assert found == arrived == expected
    assert play_in_workers("official", None, []) == []


class Slow:
    """A policy that never comes to an end."""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        time.sleep(600.0)


class Dying:
    """A policy that takes its process with it."""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        os._exit(3)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("wait_s", [0.2, 8.0])  # while the processes start, and while they play
def test_an_exception_of_a_signals_handler_ends_the_workers_at_once(wait_s):
    def stop(*_):
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, wait_s)
    started = time.monotonic()
    try:
        with pytest.raises(Stopped):
            play_in_workers("official", Slow(), [Episode("goalie", 1)] * 2, workers=2)
        assert not multiprocessing.active_children()
        assert time.monotonic() - started < wait_s + 5.0  # of the nine seconds that a run has to save
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_a_worker_that_dies_is_told_in_one_line():
    with pytest.raises(UserError, match="a worker process died, often for lack of memory: try fewer than 2"):
        play_in_workers("twin", Dying(), [Episode("goalie", 1)], workers=2)


def test_an_unexpected_error_comes_with_the_workers_traceback():
    with pytest.raises(RuntimeError, match="(?s)a worker process failed:.*ZeroDivisionError"):
        play_in_workers("twin", Faulty(), [Episode("goalie", 1)], workers=1)


class Faulty:
    """A policy with a mistake in it."""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return obs / (1 // 0)
