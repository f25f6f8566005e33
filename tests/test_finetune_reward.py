"""Terms of the fine-tuning reward, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES
from booster_soccer.rewards.finetune import TERMS, FinetuneWeights, Reading, Transition, dense_reward, dense_terms

GOAL_W = [-10.97, 0.0, 0.0]


def reading(robot=(0, 0, 0.7), ball=(-1, 0, 0.12), ball_vel=(0, 0, 0), aim=GOAL_W) -> Reading:
    return Reading(*(np.array([values], dtype=float) for values in (robot, ball, ball_vel, aim)))


def terms(
    before: Reading, after: Reading, task="goalie", action=0.0, previous=0.0, gravity=(0, 0, -1), fell=False
) -> dict:
    obs = np.zeros((1, OBS_SIZE))
    obs[0, SLICES["task_one_hot"]] = np.eye(c.NUM_TASKS)[c.TASKS.index(task)]
    obs[0, SLICES["projected_gravity_b"]] = gravity
    actions = (np.full((1, c.NUM_JOINTS), value) for value in (action, previous))
    transition = Transition(before, after, obs, *actions, np.array([fell]))
    return {name: value.item() for name, value in dense_terms(transition).items()}


def test_approach_is_the_speed_toward_the_ball():
    # 8 mm nearer in 20 ms: 0.4 m/s; the height does not count; 40 mm is clipped at 1 m/s.
    assert terms(reading(), reading(robot=(-0.008, 0, 0.6)))["approach"] == pytest.approx(0.4)
    assert terms(reading(), reading(robot=(0.008, 0, 0.7)))["approach"] == pytest.approx(-0.4)
    assert terms(reading(), reading(robot=(-0.04, 0, 0.7)))["approach"] == 1.0


def test_approach_is_neutral_while_a_shot_is_on_its_way():
    rolling = reading(ball_vel=(-2, 0, 0))
    assert terms(rolling, rolling)["approach"] == 0.5


def test_a_kick_is_paid_once_by_its_speed_toward_the_goal():
    kicked = reading(ball_vel=(-2, 0, 0))
    assert terms(reading(), kicked)["shot"] == pytest.approx(3.0)  # 1.5 points per m/s
    assert terms(kicked, kicked)["shot"] == 0.0
    assert terms(reading(), reading(ball_vel=(0, 2, 0)))["shot"] == pytest.approx(0.0, abs=1e-12)
    assert terms(reading(), reading(ball_vel=(5, 0, 0)))["shot"] == pytest.approx(-1.5)  # clipped at -1 m/s


def test_a_ball_faster_than_useful_is_not_paid_on_targets():
    fast = reading(ball=(0, 0, 0.1), ball_vel=(0, 6, 0), aim=(0, 3, 0))
    still = reading(ball=(0, 0, 0.1), aim=(0, 3, 0))
    assert terms(still, fast, task="target")["shot"] == pytest.approx(3.0)  # 2 m/s at most
    assert terms(still, fast, task="obstacle")["shot"] == pytest.approx(9.0)


def test_idle_means_that_nothing_moves():
    still = reading()
    assert terms(still, still)["idle"] == 1.0
    assert terms(still, reading(robot=(0, 0.004, 0.7)))["idle"] == 0.0  # 0.2 m/s
    rolling = reading(ball_vel=(0, 0.5, 0))
    assert terms(rolling, rolling)["idle"] == 0.0


def test_posture_and_smoothness():
    values = terms(reading(), reading(), action=0.3, previous=0.1, gravity=(0.6, 0.0, -0.8))
    assert values["tilt"] == pytest.approx(0.36)
    assert values["action_rate"] == pytest.approx(12 * 0.04)
    assert values["alive"] == 1.0 and values["fallen"] == 0.0
    assert terms(reading(), reading(), fell=True)["fallen"] == 1.0


def test_every_term_has_a_switch():
    raw = {name: np.array([1.0]) for name in TERMS}
    weights = FinetuneWeights(**{name: 2.0**i for i, name in enumerate(TERMS)})
    total = dense_reward(raw, weights)
    for name, value in vars(weights).items():
        assert dense_reward(raw, replace(weights, **{name: 0.0})) == total - value
