"""What the critics see besides the observation: what the dense reward depends on and the policy cannot know.

Critics serve training only, so they may know more than the policy ("asymmetric actor-critic", Pinto et al.
2017, arXiv 1710.06542). The official ball quantities are those of a site that turns with the ball, rewards pay
new ground only, and time is not observed: without these numbers a critic explains 56 % of the variance of the
returns in the target task, with them 62 % (docs/experiments.md). Frames as in `preprocess/observation.py`; all
are of order one and need no normaliser.
"""

from booster_soccer.envs import constants as c
from booster_soccer.envs.situation import Memory, Situation
from booster_soccer.preprocess.observation import OBS_SIZE, Row, heading_cos_sin, to_heading
from booster_soccer.preprocess.observation import TABLE as OBS_TABLE
from booster_soccer.preprocess.symmetry import mirror_table

TABLE = (
    Row("ball_center_rel_site_h", 3, "ball radius", "heading"),
    Row("ball_center_vel_h", 3, "2 m/s", "heading"),
    Row("shot_value", 1, "5 points", "none"),
    Row("approach_above_least", 1, "m, at most 2", "none"),
    Row("aim_above_least", 1, "m, at most 2", "none"),
    Row("time_left", 1, "share of an episode", "none"),
    Row("prev_action", c.NUM_JOINTS, "1", "joint"),
)
PRIVILEGED_SIZE = sum(row.width for row in TABLE)
CRITIC_OBS_SIZE = OBS_SIZE + PRIVILEGED_SIZE  # the observation comes first
_PERMUTATION, _SIGN = mirror_table(OBS_TABLE + TABLE)


def privileged(s: Situation, memory: Memory, approach_m, aim_m, xp):
    """The critics' additional inputs (..., 22), from a situation and what is remembered in it.

    `approach_m` and `aim_m` (...) are the present distances whose least values the memory holds.
    """
    cos, sin = heading_cos_sin(s.imu_quat_wxyz, xp)

    def above_least(now_m, least_m):
        return xp.where(least_m < 0.0, 0.0, xp.clip(now_m - least_m, 0.0, 2.0))[..., None]

    parts = {
        "ball_center_rel_site_h": to_heading(s.ball_center_pos_w - s.ball_site_pos_w, cos, sin, xp) / c.BALL_RADIUS_M,
        "ball_center_vel_h": to_heading(s.ball_center_vel_w, cos, sin, xp) / 2.0,
        "shot_value": memory.shot_value[..., None] / 5.0,
        "approach_above_least": above_least(approach_m, memory.nearest_approach_m),
        "aim_above_least": above_least(aim_m, memory.nearest_aim_m),
        "time_left": (1.0 - s.action_count / c.EPISODE_ACTIONS)[..., None],
        "prev_action": memory.prev_action,
    }
    return xp.concatenate([parts[row.name] for row in TABLE], axis=-1)


def mirror_critic_observation(critic_obs):
    """Mirrored observations with what only the critics see, (..., 109)."""
    return critic_obs[..., _PERMUTATION] * _SIGN
