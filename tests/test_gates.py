"""The gates pass a faithful conversion and stop an unfaithful one."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import gates
from booster_soccer.agents import conversion
from booster_soccer.agents import sac as nets
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.store import checkpoints


def save(path: Path, stage: str, arrays: dict, parent: checkpoints.Checkpoint | None) -> checkpoints.Checkpoint:
    obs = np.random.default_rng(0).standard_normal((checkpoints.GOLDEN_PAIRS, OBS_SIZE)).astype(np.float32)
    checkpoints.save(path, stage, arrays, obs, {}, 0, 0, [] if parent is None else [parent], {})
    return checkpoints.load(path)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> checkpoints.Checkpoint:
    """Fresh networks, but an actor that depends on what it sees, and a normaliser that does something."""
    actor_key, critic_key = jax.random.split(jax.random.key(0))
    arrays = nets.flatten("actor", nets.init_actor(actor_key))
    for prefix in ("critic", "target_critic"):
        arrays |= nets.flatten(prefix, nets.init_critics(critic_key))
    rng = np.random.default_rng(0)
    arrays["actor.output.kernel"] = 30 * arrays["actor.output.kernel"]
    arrays["normalizer.mean"] = rng.normal(0.0, 1.0, OBS_SIZE)
    arrays["normalizer.std"] = rng.uniform(1.0, 5.0, OBS_SIZE)
    arrays["log_alpha"] = np.array(-3.0)
    arrays = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
    return save(tmp_path_factory.mktemp("gates") / "pretrain", "pretrained", arrays, None)


@pytest.fixture(scope="module")
def converted(pretrained) -> checkpoints.Checkpoint:
    arrays = conversion.convert(pretrained.arrays)
    return save(pretrained.path.with_name("converted"), "converted", arrays, pretrained)


@pytest.fixture(scope="module")
def perturbed(pretrained, converted) -> checkpoints.Checkpoint:
    """A conversion with one joint's action off by about 0.001."""
    arrays = converted.arrays | {"actor.output.bias": converted.arrays["actor.output.bias"].copy()}
    arrays["actor.output.bias"][3] += 1e-3
    return save(pretrained.path.with_name("perturbed"), "converted", arrays, pretrained)


def measured(report: dict) -> dict[str, dict]:
    return {check["name"]: check for check in report["checks"]}


def test_a_faithful_conversion_passes(pretrained, converted, tmp_path, capsys):
    file = tmp_path / "gates.json"
    report = gates.main(
        gates.Config(pretrained.path, converted.path, json=file, states=100, episodes=2, behaviour_episodes=3)
    )
    assert report["passed"], capsys.readouterr().err
    assert json.loads(file.read_text()) == report
    again = gates.Config(pretrained.path, converted.path, json=file, states=100, episodes=2, behaviour_episodes=3)
    assert gates.main(again) == report  # its own finished result
    with pytest.raises(UserError, match="exists and is not overwritten"):
        gates.main(replace(again, seed=1))
    checks = measured(report)
    assert {check["gate"] for check in report["checks"]} == {1, 2, 3}
    assert 0.0 < checks["observation, JAX float32 and NumPy"]["measured"] <= 1e-6
    in_float64, in_float32 = (checks[f"action, JAX and PyTorch actors, float{bits}"] for bits in (64, 32))
    assert 0.0 < in_float64["measured"] <= in_float64["high"] == 1e-5
    assert 0.0 < in_float32["measured"] <= in_float32["high"] == 1e-4
    assert -5.0 <= report["log_std"]["min"] < report["log_std"]["max"] <= 2.0
    assert capsys.readouterr().err.count("failed:") == 0


def test_another_policy_stops_the_command_with_a_line_for_each_failure(pretrained, perturbed):
    script = Path(gates.__file__)
    command = [
        sys.executable,
        str(script),
        "--pretrained",
        str(pretrained.path),
        "--converted",
        str(perturbed.path),
    ]
    command += ["--states", "100", "--episodes", "2", "--behaviour-episodes", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    failures = [line for line in result.stderr.splitlines() if line.startswith("failed:")]
    for bits in (64, 32):
        assert any(f"gate 2, action, JAX and PyTorch actors, float{bits}: 0.00" in line for line in failures)
    assert any("gate 2, action along the trajectory: 0.00" in line for line in failures)
    assert not any("gate 1" in line for line in failures)
    last = f"failed: {len(failures) - 1} of "
    assert failures[-1].startswith(last) and failures[-1].endswith("; more: docs/05-verification-gates.md#gate-failed")
    assert "Traceback" not in result.stderr


def test_rounding_of_a_network_that_kicks_hard_passes_and_a_wrong_digit_does_not(pretrained, converted, monkeypatch):
    """2e-5 in float32 is the order of a sum; the same in float64 is another network."""
    for measured, failed in (
        ({"float64": 1e-7, "float32": 2e-5}, []),
        ({"float64": 2e-5, "float32": 2e-5}, ["action, JAX and PyTorch actors, float64"]),
        ({"float64": 1e-7, "float32": 2e-4}, ["action, JAX and PyTorch actors, float32"]),
    ):
        monkeypatch.setattr(gates.conversion, "compare", lambda *_, found=measured: found)
        checks, _ = gates.actor_checks(pretrained, converted, pretrained.golden_obs)
        assert [check.name for check in checks if not check.passed] == failed


def test_log_std_out_of_range_fails_by_the_rule_of_the_conversion(pretrained, converted):
    arrays = pretrained.arrays | {"actor.output.bias": pretrained.arrays["actor.output.bias"].copy()}
    arrays["actor.output.bias"][-1] = 2.5
    diverged = dataclasses.replace(pretrained, arrays=arrays)
    checks, spread = gates.actor_checks(diverged, converted, pretrained.golden_obs)
    assert [check.name for check in checks if not check.passed] == ["log_std before clipping, max"]
    assert not spread["inside"]


@pytest.mark.parametrize(("converted_means", "passed"), [([0.5], True), ([1.5, -0.5], True), ([2, 2, 2, 2], False)])
def test_a_missed_score_is_repeated(pretrained, converted, monkeypatch, converted_means, passed):
    """Against the interval [-1, 1]: rounds until one hits, four at most."""
    seeds = []

    def evaluate(policy, episodes, seed, start_noise_rad, backend):
        policy(np.zeros(OBS_SIZE, np.float32))
        mean = 0.0
        if isinstance(policy, gates.Recorded):
            mean = converted_means[len(seeds)]
            seeds.append(seed)
        return {"mean": mean, "ci95": [-1.0, 1.0], "tasks": {}}

    monkeypatch.setattr(gates, "evaluate", evaluate)
    config = gates.Config(pretrained.path, converted.path, seed=4)
    (actions, score), rounds = gates.trajectory_checks(pretrained, converted, config)
    assert score.passed == passed and len(rounds) == len(seeds)
    assert seeds == [4, 5, 6, 7][: len(rounds)] and rounds[-1]["converted"]["mean"] == score.measured
    assert actions.passed and 0.0 <= actions.measured < 1e-6


def test_a_quaternion_read_in_another_order_is_noticed(monkeypatch):
    """As if the official `robot_quat` were w, x, y, z."""
    assert gates.rotation_error("goalie", seed=0) < gates.ROTATION_LIMIT
    observe = gates.observe

    def misread(joint_pos, joint_vel, info, xp):
        return observe(joint_pos, joint_vel, info | {"robot_quat": info["robot_quat"][..., [1, 2, 3, 0]]}, xp)

    monkeypatch.setattr(gates, "observe", misread)
    assert gates.rotation_error("goalie", seed=0) > 0.1


def test_difference_by_hand():
    expected, actual = np.zeros((2, OBS_SIZE)), np.zeros((2, OBS_SIZE))
    expected[1, -1], actual[1, -1] = 20.0, 20.5  # 0.5 / max(1, 20)
    expected[0, 0], actual[0, 0] = 0.1, 0.12  # 0.02 / max(1, 0.1)
    assert gates.difference(actual, expected) == (pytest.approx(0.025), "task_one_hot")
    spin = gates.SLICES["ball_angvel_rel_robot_h"].start
    expected[1, spin : spin + 3], actual[1, spin : spin + 3] = (30.0, 40.0, 0.0), (30.0, 40.0, 2.0)  # 2 / 50
    defenders = gates.SLICES["defenders_pos_rel_robot_h"].start
    expected[0, defenders + 4] = actual[0, defenders + 4] = 10.0
    actual[0, defenders + 3] = 0.3  # 0.3 / 10: the second one's own length
    assert gates.difference(actual, expected) == (pytest.approx(0.04), "ball_angvel_rel_robot_h")
    actual[0, defenders] = 0.3  # 0.3 / 1: the first one is at zero
    assert gates.difference(actual, expected) == (pytest.approx(0.3), "defenders_pos_rel_robot_h")
    actual[0, 1] = np.nan
    apart, feature = gates.difference(actual, expected)
    assert np.isnan(apart) and feature == "joint_pos"


def test_a_check_has_two_ends_and_nan_fails():
    check = gates.Check(2, "log_std", -5.0, -5.0, 2.0, "", "")
    assert check.passed
    for value in (-5.001, 2.001, np.nan):
        assert not dataclasses.replace(check, measured=value).passed


def test_one_sided_limits():
    check = gates.Check(3, "score", 0.0, -0.75, None, "", "")
    assert dataclasses.replace(check, measured=9.0).passed
    assert check.limits == ">= -0.75"
    for value in (-0.76, np.nan):
        assert not dataclasses.replace(check, measured=value).passed
    upward = dataclasses.replace(check, low=None, high=0.15)
    assert dataclasses.replace(upward, measured=-1.0).passed and upward.limits == "<= 0.15"
    for value in (0.16, np.nan):
        assert not dataclasses.replace(upward, measured=value).passed


# --- gate 3 -----------------------------------------------------------------------------------------------


def test_the_allowed_difference_by_hand():
    """Differences 1, 0, 1, 0: deviation 1 / sqrt(3), standard error 1 / (2 sqrt(3)), three of them 0.866."""
    expected, actual = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 4.0, 4.0])
    allowed, standard_error = gates.limit(gates.Tolerance(0.5), expected, actual)
    assert standard_error == pytest.approx(0.2886751) and allowed == pytest.approx(0.8660254)
    assert gates.limit(gates.Tolerance(1.0), expected, actual)[0] == 1.0
    assert gates.limit(gates.Tolerance(1.0, 0.5), expected, actual)[0] == 1.25  # half of 2.5


AS_IN_PRETRAINING = {"physics_steps": 3000.0, "fell": 0.0, "walked_m": 4.0, "touches": 1.0, "score": 2.0}


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [
        ("physics_steps", (2501.0, 3499.0), (2499.0, 3501.0)),
        ("fell", (0.0, 0.0), (1.0, 1.0)),
        ("walked_m", (3.1, 4.9), (2.9, 5.1)),  # a quarter of 4
        ("touches", (0.1, 1.9), (-0.1, 2.1)),
        ("score", (1.3, 99.0), (1.2, -1.0)),
    ],
)
def test_each_quantity_of_gate_3_can_fail(name, passes, fails):
    """Starts that all go alike: no standard error, so only the tolerance counts."""

    def failed(value: float) -> list[str]:
        expected = {key: np.full(4, number) for key, number in AS_IN_PRETRAINING.items()}
        checks, numbers = gates.compare_behaviour("target", expected, expected | {name: np.full(4, value)})
        assert numbers[name]["official"]["ci95"] == [value, value] and numbers[name]["standard_error"] == 0.0
        return [check.name for check in checks if not check.passed]

    for value in passes:
        assert failed(value) == []
    for value in fails:
        assert failed(value) == [f"target: {name}, official - pre-training"]


def test_chance_passes_gate_3_and_a_real_difference_does_not():
    """Of 40 starts 4 fall more: mean 0.1. Of 40 starts 12: mean 0.3, standard error 0.0734, limit 0.22."""
    expected = {key: np.full(40, number) for key, number in AS_IN_PRETRAINING.items()}
    for falls, passed in ((4, True), (12, False)):
        fell = (np.arange(40) < falls).astype(float)
        checks, numbers = gates.compare_behaviour("goalie", expected, expected | {"fell": fell})
        assert checks[1].passed == passed
    assert numbers["fell"]["standard_error"] == pytest.approx((0.3 * 0.7 / 39) ** 0.5)
    assert numbers["fell"]["limit"] == pytest.approx(0.2201398, abs=1e-6)


def test_gate_3_stops_a_policy_that_falls_where_it_ran_in_pretraining():
    """The shipped policy runs to the ball; a policy that only bends the knees falls where it stands."""
    shipped = checkpoints.load(Path(gates.__file__).parent / "assets" / "policies" / "pretrained")
    bias = shipped.arrays["actor.output.bias"].copy()  # means, then log_std
    bias[: c.NUM_JOINTS] = np.where(["Knee" in name for name in c.JOINT_NAMES], 2.0, 0.0)
    blind = {"actor.output.bias": bias, "actor.output.kernel": 0 * shipped.arrays["actor.output.kernel"]}
    bent = dataclasses.replace(shipped, arrays=shipped.arrays | blind)
    config = gates.Config(shipped.path, shipped.path, behaviour_episodes=3)
    checks, behaviour = gates.behaviour_checks(shipped, bent, config)
    assert behaviour["tasks"]["goalie"]["walked_m"]["pretraining"]["mean"] > 1.5
    failed = [check.name for check in checks if not check.passed]
    assert {f"{task}: walked_m, official - pre-training" for task in ("goalie", "obstacle")} <= set(failed)


def test_bad_input(pretrained, converted, tmp_path):
    for config, message in (
        (gates.Config(pretrained.path, pretrained.path), "'pretrained', but converted is needed"),
        (gates.Config(tmp_path, converted.path), "is no checkpoint"),
        (gates.Config(pretrained.path, converted.path, states=99), "at least 100 states"),
        (
            gates.Config(pretrained.path, converted.path, behaviour_episodes=1),
            "behaviour-episodes 1: at least 2",
        ),
        (
            gates.Config(pretrained.path, converted.path, json=converted.path / "manifest.json"),
            "not overwritten",
        ),
    ):
        with pytest.raises(UserError, match=message):
            gates.main(config)
    other_arrays = pretrained.arrays | {"log_alpha": np.array(-1.0, np.float32)}
    other = save(tmp_path / "other", "pretrained", other_arrays, None)
    with pytest.raises(UserError, match="was not converted from"):
        gates.main(gates.Config(other.path, converted.path))


def test_a_failed_result_that_is_there_already_says_what_failed(pretrained, converted, monkeypatch, capsys):
    nothing = gates.Check(3, "walked", np.nan, 0.5, None, "the twin", "look at the gait")
    row = dataclasses.asdict(nothing) | {"measured": None, "passed": False}
    monkeypatch.setattr(gates, "finished", lambda file, identity: {"passed": False, "checks": [row]})
    assert not gates.main(gates.Config(pretrained.path, converted.path))["passed"]
    assert "failed: gate 3, walked: nan is not within >= +0.5 (the twin); look at the gait" in capsys.readouterr().err
