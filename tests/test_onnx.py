"""The ONNX file: the same actions, in a session that knows nothing of this repository; refused where they are not."""

import json
import sys

import numpy as np
import onnxruntime
import pytest

import convert_jax2torch
from booster_soccer.agents import onnx_policy
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.store import checkpoints
from tests import small_checkpoints


def export(checkpoint, file):
    return convert_jax2torch.main(convert_jax2torch.Config(checkpoint=checkpoint, out=file, onnx=True))


@pytest.mark.parametrize("stage", ["pretrained", "converted"])
def test_the_file_acts_as_the_checkpoint_and_says_what_a_robot_must_know(tmp_path, stage):
    """A pre-trained one has a normaliser far from 0 and 1, which is folded in."""
    path = small_checkpoints.save(tmp_path / stage, stage=stage)
    file = export(path, tmp_path / "new" / "policy.onnx")
    session = onnxruntime.InferenceSession(file)
    obs = np.random.default_rng(5).normal(size=(7, OBS_SIZE)).astype(np.float32)
    [actions] = session.run(None, {"obs": obs})
    checkpoint = checkpoints.load(path)
    np.testing.assert_allclose(actions, policy_from_arrays(checkpoint.arrays)(obs), atol=1e-5)
    assert np.ptp(actions) > 0.5
    about = session.get_modelmeta().custom_metadata_map
    assert about["checkpoint"] == checkpoint.hash
    layer = json.loads(about["action"])
    assert layer["joint_names"] == list(c.JOINT_NAMES) and layer["kp_nm_per_rad"] == c.KP_NM_PER_RAD.tolist()
    assert layer["torque_limit_nm"] == c.TORQUE_LIMIT_NM.tolist()
    assert sum(row["width"] for row in json.loads(about["observation"])) == OBS_SIZE


def test_actions_that_differ_are_refused(tmp_path):
    checkpoint = checkpoints.load(small_checkpoints.save(tmp_path / "converted"))
    content = onnx_policy.to_bytes(policy_from_arrays(checkpoint.arrays), {})
    assert onnx_policy.check(content, checkpoint.golden_obs, checkpoint.golden_actions) < 1e-5
    wrong = checkpoint.golden_actions.copy()
    wrong[3, 5] += 2e-4
    for actions in (wrong, np.full_like(wrong, np.nan)):
        with pytest.raises(UserError, match="ONNX Runtime differ by (2.0e-04|nan) from the golden ones"):
            onnx_policy.check(content, checkpoint.golden_obs, actions)


def test_a_file_that_is_there_stays_and_a_missing_package_is_named(tmp_path, monkeypatch):
    path, file = small_checkpoints.save(tmp_path / "converted"), tmp_path / "policy.onnx"
    file.write_text("mine")
    with pytest.raises(UserError, match="policy.onnx is there already: name a new file"):
        export(path, file)
    assert file.read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"cannot import onnx .*install it with .*\[onnx\]"):
        export(path, tmp_path / "other.onnx")
