"""The smallest pre-training that does everything, shared by tests so that it is compiled once."""

from dataclasses import replace
from pathlib import Path

import numpy as np

import train_mjx_sac as train
from booster_soccer.agents.sac import SacConfig
from booster_soccer.envs import constants as c
from booster_soccer.envs.tasks import StartMix
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.rollout.collect import ROW_SHAPES, CollectConfig, Lanes, MjxLoop
from booster_soccer.rollout.judge import Scores
from booster_soccer.store.replay import Replay
from booster_soccer.store.run import RecordConfig

LANES, CALL = 6, MjxLoop.ITERATIONS_PER_CALL
# Everything that ramps goes from its first to its last value at the last iteration of MJX's first call; the ring is
# full after two calls and a half. Episodes are so short that nobody falls, and start in free fall, in which both
# engines agree.
COLLECT = CollectConfig(
    num_envs=LANES, buffer_size=LANES * (2 * CALL + CALL // 2), batch_size=32, updates_per_iteration=2,
    learning_starts=CALL * LANES, ramp_steps=((CALL - 1) * LANES, CALL * LANES), first_task_share=(0.5, 0.5, 0.0),
    max_actions=7, dr_level=2, starts=StartMix(task_share=(0.0, 0.0, 1.0), official_pose=1.0),
)  # fmt: skip
LEARNER = SacConfig(learning_rate=(0.0, 1e-3))
RECORDS = RecordConfig(log_every=60, judge_every=10**9, checkpoint_every=CALL * LANES, checkpoint_interval_s=0.0)


def config(out: Path, **changes) -> train.Config:
    """Two calls of MJX's loop: nothing is learned in the first."""
    small = {"total_steps": 2 * CALL * LANES, "collect": COLLECT, "sac": LEARNER, "records": RECORDS}
    return replace(train.PRESETS["cpu"], out=out, judge_episodes=2, **small | changes)


def no_judge(*_) -> Scores:
    """Stands for the judge, which takes seconds: every score is 0."""
    return Scores(*np.zeros((4, c.NUM_TASKS, 2)))


class Still:
    """A loop that collects nothing; from its tenth iteration on, what it learned is NaN."""

    ITERATIONS_PER_CALL, NAN_FROM = 1, 10

    def __init__(self, *_):
        self.lanes = Lanes(None, np.zeros((LANES, CRITIC_OBS_SIZE), np.float32), None)
        self.replay, self.count = Replay(LANES, ROW_SHAPES), 0

    def iterate(self, state, learn, statistics):
        self.count += 1
        return state, {"critic_loss": np.float32(1.0 if self.count < self.NAN_FROM else np.nan)}

    def begin(self, state, count):
        self.count, self.log_alpha = count, float(state.log_alpha)

    def arrays(self):
        return {"count": np.array(self.count)}

    def close(self):
        pass
