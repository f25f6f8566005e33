"""The platform's score, against values worked out by hand from the published weights."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.rewards.official import WEIGHTS, official_score, score_terms

# What `compute_reward()` of a penalty kick gives after one touch, the ball at rest, nothing else happened.
PENALTY = {
    "goal_scored": False,
    "ball_vel_twd_goal": 0.0,
    "robot_distance_ball": 1.5,
    "offside": False,
    "robot_fallen": False,
    "ball_blocked": False,
    "ball_hits": math.log1p(0),
}
TARGET = {"success": False, "distance": 0.0, "offside": False, "robot_distance_ball": 0.9}


def score(task: str, **raw) -> float:
    base = TARGET if task == "target" else PENALTY
    return sum(score_terms(task, base | raw).values())


@pytest.mark.parametrize("task", ["goalie", "obstacle"])
class TestPenaltyKicks:
    def test_goal_at_two_metres_per_second(self, task):
        # 2.5 goal + 1.5 * 2 velocity + 0.25 * 1.5 touched - 1 steps
        assert score(task, goal_scored=True, ball_vel_twd_goal=2.0) == pytest.approx(4.875)

    def test_offside_keeps_the_velocity_term(self, task):
        # 1.5 * 1 + 0.375 - 3 - 1
        assert score(task, offside=True, ball_vel_twd_goal=1.0) == pytest.approx(-2.125)

    def test_blocked_keeps_the_velocity_term(self, task):
        # 1.5 * 3 + 0.375 - 0.5 - 1
        assert score(task, ball_blocked=True, ball_vel_twd_goal=3.0) == pytest.approx(3.375)

    def test_goal_and_block_on_the_same_step(self, task):
        # 2.5 + 1.5 * 3 + 0.375 - 0.5 - 1
        assert score(task, goal_scored=True, ball_blocked=True, ball_vel_twd_goal=3.0) == pytest.approx(5.875)

    def test_ball_rolling_away_costs(self, task):
        # 1.5 * -0.7 + 0.375 - 1
        assert score(task, ball_vel_twd_goal=-0.7) == pytest.approx(-1.675)

    def test_velocity_is_not_clipped(self, task):
        assert score(task, ball_vel_twd_goal=20.0) == pytest.approx(30.0 + 0.375 - 1.0)

    def test_fall_two_metres_from_the_ball_untouched(self, task):
        # tanh(2) = 0.964027580: 0.25 * 0.035972420 - 1.5 - 1
        assert score(task, robot_fallen=True, robot_distance_ball=1 - math.tanh(2.0)) == pytest.approx(-2.491006895)

    def test_touch_before_a_fall(self, task):
        # 0.375 - 1.5 - 1
        assert score(task, robot_fallen=True) == pytest.approx(-2.125)

    def test_truncation_while_standing_two_metres_away(self, task):
        assert score(task, robot_distance_ball=1 - math.tanh(2.0)) == pytest.approx(-0.991006895)

    def test_three_touches(self, task):
        # ln 3 = 1.098612289: 0.375 - 0.2 * 1.098612289 - 1
        assert score(task, ball_hits=math.log1p(3 - 1)) == pytest.approx(-0.844722458)

    def test_steps_is_the_constant_one_not_a_count(self, task):
        assert score_terms(task, PENALTY)["steps"] == -1.0
        assert score_terms(task, PENALTY | {"steps": 5000.0})["steps"] == -1.0

    def test_other_terms_of_the_environment_are_not_scored(self, task):
        assert score(task, ball_distance_target=123.0) == score(task)


class TestKickToTarget:
    def test_success_at_thirty_centimetres(self):
        # exp(-0.3) = 0.740818221: 2 + 0.5 * 0.740818221 - 0.3
        assert score("target", success=True, distance=math.exp(-0.3)) == pytest.approx(2.070409110)

    def test_offside_five_metres_off(self):
        # exp(-5) = 0.006737947: 0.5 * 0.006737947 - 1 - 0.3
        assert score("target", offside=True, distance=math.exp(-5.0)) == pytest.approx(-1.296631027)

    def test_truncation_two_metres_off(self):
        # exp(-2) = 0.135335283: 0.5 * 0.135335283 - 0.3
        assert score("target", distance=math.exp(-2.0)) == pytest.approx(-0.232332358)

    def test_fall_touches_and_robot_distance_are_not_scored(self):
        raw = dict(robot_fallen=True, ball_hits=math.log1p(4), robot_distance_ball=1.5)
        assert score("target", **raw) == score("target") == pytest.approx(-0.3)

    def test_steps_is_the_constant_one_not_a_count(self):
        assert score_terms("target", TARGET | {"steps": 5000.0})["steps"] == pytest.approx(-0.3)


def test_every_weighted_term_is_returned_even_if_the_environment_does_not_report_it():
    for task in c.TASKS:
        assert set(score_terms(task, {})) == set(WEIGHTS[task])


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_the_score_of_many_lanes_is_that_of_each(xp):
    rng = np.random.default_rng(0)
    names = sorted({name for weights in WEIGHTS.values() for name in weights})
    raw = {name: rng.normal(size=(4, 6)).astype(np.float32) for name in names} | {"steps": np.ones((4, 6), np.float32)}
    task = rng.integers(0, c.NUM_TASKS, (4, 6))
    expected = [
        sum(score_terms(c.TASKS[task[at]], {name: values[at] for name, values in raw.items()}).values())
        for at in np.ndindex(4, 6)
    ]
    found = official_score({name: xp.asarray(values) for name, values in raw.items()}, xp.asarray(task), xp)
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-5, atol=1e-5)
