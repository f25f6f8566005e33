"""JAX to PyTorch: folding, names, the checks before anything is written."""

import numpy as np
import pytest

import convert_jax2torch as stage
from booster_soccer.agents import conversion
from booster_soccer.agents.ddpg import Actor, fold_normalizer
from booster_soccer.agents.policy import HIDDEN
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.store import checkpoints


def pretrained_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Random networks of a pre-trained checkpoint, every array different from its default."""
    rng = np.random.default_rng(seed)

    def network(prefix: str, inputs: int, outputs: int, lead: tuple[int, ...]) -> dict[str, np.ndarray]:
        arrays = {}
        widths = (inputs, HIDDEN, HIDDEN, outputs)
        for layer, fan_in, fan_out in zip(("input", "hidden", "output"), widths, widths[1:]):
            arrays[f"{prefix}.{layer}.kernel"] = rng.normal(0, fan_in**-0.5, (*lead, fan_in, fan_out))
            arrays[f"{prefix}.{layer}.bias"] = rng.normal(0, 0.1, (*lead, fan_out))
        for norm in ("input_norm", "hidden_norm") if lead else ():
            arrays[f"{prefix}.{norm}.scale"] = rng.normal(1, 0.1, (*lead, HIDDEN))
            arrays[f"{prefix}.{norm}.bias"] = rng.normal(0, 0.1, (*lead, HIDDEN))
        return arrays

    arrays = network("actor", OBS_SIZE, 2 * c.NUM_JOINTS, ())
    for prefix in ("critic", "target_critic"):
        arrays |= network(prefix, CRITIC_OBS_SIZE + c.NUM_JOINTS, 1, (2,))
    arrays["normalizer.mean"] = rng.normal(0, 1, OBS_SIZE)
    arrays["normalizer.std"] = rng.uniform(2, 5, OBS_SIZE)  # real observations are then not far out
    arrays["log_alpha"] = np.array(-3.0)
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def write_pretrained(path, arrays: dict[str, np.ndarray]) -> checkpoints.Checkpoint:
    noise = np.random.default_rng(1).standard_normal((checkpoints.GOLDEN_PAIRS, OBS_SIZE))
    obs = (arrays["normalizer.mean"] + arrays["normalizer.std"] * noise).astype(np.float32)
    checkpoints.save(path, "pretrained", arrays, obs, {}, 3, 1000, [], {})
    return checkpoints.load(path)


@pytest.fixture
def pretrained(tmp_path) -> checkpoints.Checkpoint:
    return write_pretrained(tmp_path / "pretrain", pretrained_arrays())


def test_folding_by_hand():
    kernel = np.array([[2.0], [4.0], [7.0]])  # the third input, an action, is not normalised
    weight, bias = fold_normalizer(kernel, np.array([1.0]), np.array([3.0, 5.0]), np.array([0.5, 2.0]))
    np.testing.assert_array_equal(weight, [[4.0, 2.0, 7.0]])
    np.testing.assert_array_equal(bias, [1.0 - 3.0 * 4.0 - 5.0 * 2.0])


def test_jax_and_torch_agree(pretrained):
    """Gate 2 on drawn observations; the real ones are below."""
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((200, OBS_SIZE))
    obs = (pretrained.arrays["normalizer.mean"] + pretrained.arrays["normalizer.std"] * noise).astype(np.float32)
    differences = conversion.compare(pretrained.arrays, conversion.convert(pretrained.arrays), obs)
    assert set(differences) == {"float64", "float32", "critic", "target_critic"}
    assert differences["float64"] < 1e-6 and max(differences.values()) < 1e-5
    assert conversion.log_std(pretrained.arrays, obs).shape == (200, c.NUM_JOINTS)


def test_critics_keep_all_their_inputs(pretrained):
    """The weight of a privileged input is the pre-trained kernel's row, unscaled: nothing normalises it."""
    converted = conversion.convert(pretrained.arrays)
    kernel, weight = pretrained.arrays["critic.input.kernel"], converted["critic.1.input.weight"]
    assert weight.shape == (HIDDEN, CRITIC_OBS_SIZE + c.NUM_JOINTS)
    np.testing.assert_array_equal(weight[:, OBS_SIZE:], kernel[1, OBS_SIZE:].T)
    np.testing.assert_allclose(weight[:, 0], kernel[1, 0] / pretrained.arrays["normalizer.std"][0], rtol=1e-6)


def test_the_means_are_kept_and_the_spread_is_dropped(pretrained):
    converted = conversion.convert(pretrained.arrays)
    kernel = pretrained.arrays["actor.output.kernel"]
    np.testing.assert_array_equal(converted["actor.output.weight"], kernel[:, : c.NUM_JOINTS].T)
    assert {name: tuple(value.shape) for name, value in Actor().state_dict().items()} == {
        name.removeprefix("actor."): value.shape for name, value in converted.items() if name.startswith("actor.")
    }


def test_writes_a_checkpoint_with_its_lineage(pretrained, tmp_path, capsys):
    path = stage.main(stage.Config(pretrained.path, tmp_path / "converted", real_observations=17))
    converted = checkpoints.load(path, ("converted",))
    assert converted.manifest["parents"] == [{"stage": "pretrained", "hash": pretrained.hash}]
    assert converted.manifest["steps"] == 1000
    np.testing.assert_array_equal(converted.golden_obs, pretrained.golden_obs)
    np.testing.assert_allclose(converted.golden_actions, pretrained.golden_actions, rtol=0, atol=1e-5)
    metrics = converted.manifest["metrics"]
    seen = metrics["observations"]
    assert seen["real"] == 17 * c.NUM_TASKS and sum(seen.values()) < 2 * (seen["real"] + seen["golden"])
    assert set(metrics["log_std"]["by_joint"]) == set(c.JOINT_NAMES)
    assert capsys.readouterr().out.rstrip().endswith(str(path))


@pytest.mark.parametrize(("wrong", "limit"), [(1e-3, "1e-05"), (3e-5, "1e-05")])
def test_refuses_a_policy_that_acts_otherwise(pretrained, tmp_path, monkeypatch, wrong, limit):
    convert = conversion.convert

    def perturbed(arrays):
        converted = convert(arrays)
        converted["actor.output.bias"] += np.float32(wrong)
        return converted

    monkeypatch.setattr(conversion, "convert", perturbed)
    with pytest.raises(UserError, match=f"in float64 differ by .* more than {limit}: nothing was written"):
        stage.main(stage.Config(pretrained.path, tmp_path / "converted", real_observations=0))
    assert not (tmp_path / "converted").exists()


def test_the_source_is_left_alone(pretrained):
    before = {name: value.copy() for name, value in pretrained.arrays.items()}
    for value in conversion.convert(pretrained.arrays).values():
        value += 1.0
    for name, value in before.items():
        np.testing.assert_array_equal(pretrained.arrays[name], value)


def test_one_log_std_out_of_range_is_refused_and_reported():
    log_std, fine = np.full((100, c.NUM_JOINTS), -1.0), dict.fromkeys(("float64", "float32"), 0.0)
    report = conversion.log_std_report(log_std)
    assert report["inside"] and report["by_joint"]["Right_Hip_Pitch"] == {"min": -1.0, "mean": -1.0, "max": -1.0}
    conversion.check_conversion(fine, report)
    for value in (2.5, -5.5, np.nan):
        log_std[7, 0] = value
        report = conversion.log_std_report(log_std)
        assert not report["inside"]
        with pytest.raises(UserError, match="outside .* its training diverged"):
            conversion.check_conversion(fine, report)
    assert np.isnan(report["by_joint"]["Left_Hip_Pitch"]["min"])


def test_bad_input(pretrained, tmp_path):
    out = tmp_path / "converted"
    with pytest.raises(UserError, match="is not there"):
        stage.main(stage.Config(tmp_path / "nowhere", out))
    smaller = pretrained_arrays() | {"critic.hidden.bias": np.zeros((1, HIDDEN), np.float32)}
    other = write_pretrained(tmp_path / "other", smaller)
    with pytest.raises(UserError, match=r"critic.hidden.bias should have shape \(2, 256\), found \(1, 256\)"):
        stage.main(stage.Config(other.path, out))
    assert not out.exists()
    stage.main(stage.Config(pretrained.path, out, real_observations=0))
    assert stage.main(stage.Config(pretrained.path, out, real_observations=0)) == out  # recognised
    third = write_pretrained(tmp_path / "third", pretrained_arrays(1))
    with pytest.raises(UserError, match="already holds another conversion"):
        stage.main(stage.Config(third.path, out, real_observations=0))
    with pytest.raises(UserError, match="'converted', but pretrained"):
        stage.main(stage.Config(out, tmp_path / "again", real_observations=0))
