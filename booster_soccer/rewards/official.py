"""The platform's score: zero on every step but the last, there the weighted terms of `env.compute_reward()`.

Source: participants' copies of the competition's evaluation page; `steps` is the constant 1.0 added on the
last step, not a count. A term without a weight (such as the obstacle task's `ball_distance_target`) is not
scored.
"""

from booster_soccer.envs import constants as c

PENALTY_WEIGHTS = {
    "goal_scored": 2.5,
    "ball_vel_twd_goal": 1.5,
    "robot_distance_ball": 0.25,
    "offside": -3.0,
    "robot_fallen": -1.5,
    "ball_blocked": -0.5,
    "ball_hits": -0.2,
    "steps": -1.0,
}
TARGET_WEIGHTS = {"success": 2.0, "distance": 0.5, "offside": -1.0, "steps": -0.3}
WEIGHTS = {"goalie": PENALTY_WEIGHTS, "obstacle": PENALTY_WEIGHTS, "target": TARGET_WEIGHTS}
assert set(WEIGHTS) == set(c.TASKS)


def score_terms(task: str, raw_terms: dict) -> dict[str, float]:
    """Weighted score terms of an episode from the raw reward terms of its last step.

    Terms the environment did not report (the goalie task has no keeper when it is a plain penalty kick)
    count zero. The score is the sum of the values.
    """
    raw = dict(raw_terms) | {"steps": 1.0}
    return {name: weight * float(raw.get(name, 0.0)) for name, weight in WEIGHTS[task].items()}


def official_score(raw_terms: dict, task, xp):
    """The platform's score (...) of raw reward terms, each (...) of every name in `WEIGHTS`, if the episode ended now.

    `task` (...) is the index into `constants.TASKS`; `xp` is numpy or jax.numpy.
    """
    scores = [sum(raw_terms[term] * weight for term, weight in WEIGHTS[name].items()) for name in c.TASKS]
    return xp.select([task == i for i in range(c.NUM_TASKS)], scores)
