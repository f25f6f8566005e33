"""The ablation's arms, without training them."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import train_mjx_sac
from benchmarks import ablation
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.agents.sac import GAIN, Normalizer
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess import observation, privileged
from booster_soccer.rollout import judge, lanes
from booster_soccer.store import checkpoints

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_every_arm_is_a_valid_run(arm, tmp_path):
    config = ablation.settings(arm, 3, ablation.Config(tmp_path, minutes=2.0))
    train_mjx_sac.check(config)
    assert (config.out, config.seed, config.time_limit_s) == (tmp_path / f"{arm}-3", 3, 120.0)
    base = ablation.settings("base", 3, ablation.Config(tmp_path, minutes=2.0))
    changes_code = ablation.ARMS[arm][0] is not None
    same = (config.collect, config.sac) == (base.collect, base.sac)
    assert same == (changes_code or arm == "base")


def test_action_scale_arm_scales_the_targets(monkeypatch):
    from booster_soccer.envs.pd import joint_target_rad

    monkeypatch.setattr(c, "ACTION_SCALE_RAD", c.ACTION_SCALE_RAD.copy())
    before = joint_target_rad(np.ones(c.NUM_JOINTS)) - c.DEFAULT_POSE_RAD
    ablation.ARMS["action-scale-half"][0]()
    np.testing.assert_allclose(joint_target_rad(np.ones(c.NUM_JOINTS)) - c.DEFAULT_POSE_RAD, before / 2)


def test_an_arm_that_changes_the_code_is_judged_by_it(monkeypatch):
    """In this process the same scores as in workers; with half the action scale or in world axes others."""
    policy = policy_from_arrays(checkpoints.load(ROOT / "assets" / "policies" / "final").arrays)
    score = functools.partial(judge.judge, policy, [1, 2])
    in_workers = score().score
    for module, name in ((judge, "play_in_workers"), (lanes, "Preprocessor"), (observation, "heading_cos_sin"),
                         (privileged, "heading_cos_sin")):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))
    ablation._judge_here()
    np.testing.assert_array_equal(score().score, in_workers)
    ablation.ARMS["world-axes"][0]()
    assert (score().score != in_workers).all()
    monkeypatch.undo()
    monkeypatch.setattr(judge, "play_in_workers", judge.play_in_workers)
    monkeypatch.setattr(c, "ACTION_SCALE_RAD", c.ACTION_SCALE_RAD.copy())
    ablation._judge_here()
    ablation.ARMS["action-scale-half"][0]()
    assert (score().score != in_workers).all()


def test_world_axes_arm_takes_the_yaw_out_of_the_observation(monkeypatch):
    """A robot that looks along y: a ball at +y is ahead of it in the heading frame, beside it in world axes."""
    for module in (observation, privileged):
        monkeypatch.setattr(module, "heading_cos_sin", observation.heading_cos_sin)
    monkeypatch.setattr(lanes, "Preprocessor", lanes.Preprocessor)
    quat_wxyz, ball_w = np.array([np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)]), np.array([0.0, 2.0, 0.1])

    def heading(vector_w):
        return observation.to_heading(vector_w, *observation.heading_cos_sin(quat_wxyz, np), np)

    np.testing.assert_allclose(heading(ball_w), [2.0, 0.0, 0.1], atol=1e-9)
    ablation.ARMS["world-axes"][0]()
    np.testing.assert_allclose(heading(ball_w), ball_w, atol=1e-9)
    assert privileged.heading_cos_sin is observation.heading_cos_sin


def test_no_normalizer_arm_leaves_but_the_gains(monkeypatch):
    monkeypatch.setattr(Normalizer, "update", Normalizer.update)
    ablation.ARMS["no-normalizer"][0]()
    obs = np.random.default_rng(0).normal(3.0, 2.0, (1000, GAIN.size)).astype(np.float32)
    np.testing.assert_allclose(Normalizer.create().update(obs)(obs), obs * GAIN, rtol=1e-5)


def test_finished_runs_are_kept_and_one_cut_short_is_named_after_the_others(tmp_path, capsys):
    config = ablation.Config(tmp_path, arms=("base", "dr-1"), seeds=(0,), minutes=10.0)
    row = {"eval/score": 1.5, "step": 2_000_000, "wall_s": 599.0} | {f"eval/score_{task}": 1.5 for task in c.TASKS}
    (tmp_path / "base-0.metrics.jsonl").write_text(json.dumps(row) + "\n")  # without a result
    (tmp_path / "dr-1-0.metrics.jsonl").write_text(json.dumps(row | {"eval/score": 2.5}) + "\n")
    (tmp_path / "dr-1-0").mkdir()
    (tmp_path / "dr-1-0" / "manifest.json").touch()
    with pytest.raises(UserError, match="base-0 was cut short: delete"):
        ablation.main(config)
    assert "+2.50" in capsys.readouterr().out
    with pytest.raises(UserError, match="warp unknown"):
        ablation.main(ablation.Config(tmp_path, arms=("warp",)))
