"""The ablation's arms, without training them."""

import json

import numpy as np
import pytest

import train_mjx_sac
from benchmarks import ablation
from envs import constants as c
from errors import UserError


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_every_arm_is_a_valid_run(arm, tmp_path):
    train_mjx_sac.resolve(train_mjx_sac.Config(out=tmp_path / "run", **ablation.ARMS[arm][1]))


def test_action_scale_arm_scales_the_targets(monkeypatch):
    from envs.pd import joint_target_rad

    monkeypatch.setattr(c, "ACTION_SCALE_RAD", c.ACTION_SCALE_RAD.copy())
    before = joint_target_rad(np.ones(c.NUM_JOINTS)) - c.DEFAULT_POSE_RAD
    ablation.ARMS["action-scale-half"][0]()
    np.testing.assert_allclose(joint_target_rad(np.ones(c.NUM_JOINTS)) - c.DEFAULT_POSE_RAD, before / 2)


def test_finished_runs_are_kept_and_others_named(tmp_path, capsys):
    config = ablation.Config(tmp_path, arms=("base",), seeds=(0,), minutes=10.0)
    row = {"eval/score": 1.5, "step": 2e6, "wall_s": 599.0} | {f"eval/score_{task}": 1.5 for task in c.TASKS}
    (tmp_path / "base-0.metrics.jsonl").write_text(json.dumps(row) + "\n")
    ablation.main(config)
    assert "+1.50" in capsys.readouterr().out
    (tmp_path / "base-0.metrics.jsonl").write_text(json.dumps(row | {"wall_s": 100.0}) + "\n")
    with pytest.raises(UserError, match="1.7 of 10 minutes: delete base-0"):
        ablation.main(config)
    with pytest.raises(UserError, match="warp unknown"):
        ablation.main(ablation.Config(tmp_path, arms=("warp",)))
