"""The evaluation: arithmetic by hand on made-up episodes, and short real runs in worker processes."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import checkpoints
import evaluate
from envs import constants as c
from envs import official
from envs.official import EpisodeResult
from errors import UserError
from models.numpy_policy import policy_from_arrays
from preprocess.observation import OBS_SIZE

REPO = Path(evaluate.__file__).parent


def episode(task: str, seed: int, score: float, **changes) -> EpisodeResult:
    fields = dict(steps=1000, fell=False, success=False, touches=0, imu_height_m=0.6)
    fields |= dict(ball_speed_site_m_s=0.0, ball_speed_centre_m_s=0.0, walked_m=0.0, ball_distance_min_m=1.0)
    return EpisodeResult(task=task, seed=seed, score=score, terms={"steps": -1.0}, **(fields | changes))


@pytest.fixture
def play(monkeypatch):
    """Replaces the environments: scores 0, 1, 2, ... within each task; records what was asked for."""
    asked = []

    def run_episodes(policy, episodes, start_noise_rad, workers, progress):
        asked.extend(episodes)
        counts = dict.fromkeys(c.TASKS, 0)
        results = []
        for task, seed in episodes:
            i = counts[task]
            counts[task] += 1
            fields = dict(steps=100 * (i + 1), fell=i % 2 == 0, success=i == 0)
            results.append(episode(task, seed, float(i), **fields))
        return list(progress(iter(results)))

    monkeypatch.setattr(evaluate, "_backend", lambda name: run_episodes)
    return asked


# --- arithmetic -------------------------------------------------------------------------------------


def test_means_rates_and_deviation_by_hand(play):
    result = evaluate.evaluate(None, episodes=4, start_noise_rad=0.02)
    for task in c.TASKS:
        of_task = result["tasks"][task]
        assert of_task["episodes"] == of_task["distinct_episodes"] == 4
        assert of_task["mean"] == 1.5  # of 0, 1, 2, 3
        assert of_task["std"] == pytest.approx(1.290994449)  # sqrt(5 / 3)
        assert of_task["success_rate"] == 0.25
        assert of_task["fall_rate"] == 0.5
        assert of_task["mean_steps"] == 250.0
        assert of_task["terms"] == {"steps": -1.0}
        assert of_task["terms_std"] == {"steps": 0.0}
        assert [r["score"] for r in of_task["results"]] == [0.0, 1.0, 2.0, 3.0]
    assert result["mean"] == 1.5


def test_the_mean_weighs_the_tasks_equally_though_the_goalie_plays_once(play):
    result = evaluate.evaluate(None, episodes=3)
    assert result["tasks"]["goalie"]["distinct_episodes"] == 1
    assert result["tasks"]["goalie"]["episodes"] == 3
    assert result["tasks"]["goalie"]["std"] == 0.0
    assert result["tasks"]["goalie"]["ci95"] == [0.0, 0.0]
    assert result["mean"] == pytest.approx((0.0 + 1.0 + 1.0) / 3)
    assert result["tasks"]["target"]["ci95"] == [0.0, 2.0]  # of 0, 1, 2: each alone in 1 of 27 resamples


def test_every_task_plays_the_platforms_seeds(play):
    evaluate.evaluate(None, episodes=3, seed=7, start_noise_rad=0.02)
    seeds = [official.match_seed(7, i) for i in range(3)]
    assert play == [(task, seed) for task in c.TASKS for seed in seeds]


def test_the_interval_is_that_of_the_mean(play):
    """Of many episodes the bootstrap meets mean +- 1.96 standard errors."""
    result = evaluate.evaluate(None, episodes=200, start_noise_rad=0.02)
    of_task = result["tasks"]["target"]
    half_width = 1.96 * of_task["std"] / np.sqrt(200)
    low, high = of_task["ci95"]
    assert low == pytest.approx(of_task["mean"] - half_width, abs=0.15 * half_width)
    assert high == pytest.approx(of_task["mean"] + half_width, abs=0.15 * half_width)
    assert result["ci95"] == pytest.approx(of_task["ci95"])  # the made-up scores are the same in each task


def test_the_interval_of_the_mean_knows_that_tasks_share_their_starts():
    """Scores that cancel start by start leave the mean of the tasks without spread."""
    scores = np.random.default_rng(1).normal(size=100)
    means = evaluate._resampled_means([scores, -scores, np.zeros(100)])
    assert np.ptp(means[0]) > 0.3
    assert np.ptp(means.mean(axis=0)) < 1e-12


def test_the_table_names_what_stands_for_identical_episodes(play, capsys):
    evaluate.print_result(evaluate.evaluate(None, episodes=3), "made up")
    shown = capsys.readouterr().out
    assert "goalie: without start noise every seed gives the same episode" in shown
    assert "stands for 3" in shown
    assert "obstacle: without" not in shown


# --- real episodes ----------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_the_number_of_workers():
    one, three = (
        evaluate.evaluate(official.reference_policy("hold"), 2, seed=3, start_noise_rad=0.02, workers=workers)
        for workers in (1, 3)
    )
    assert one == three
    env = official.make("target")
    here = official.run_episode(env, "target", official.hold_default_pose, official.match_seed(3, 1), 0.02)
    assert one["tasks"]["target"]["results"][1]["score"] == here.score


def test_a_checkpoint_is_scored_and_written(tmp_path, capsys):
    rng = np.random.default_rng(0)
    sizes = {"input": (16, OBS_SIZE), "hidden": (16, 16), "output": (c.NUM_JOINTS, 16)}
    arrays = {f"actor.{layer}.weight": rng.normal(0, 0.1, size) for layer, size in sizes.items()}
    arrays |= {f"actor.{layer}.bias": np.zeros(size[0]) for layer, size in sizes.items()}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    obs = rng.normal(size=(16, OBS_SIZE)).astype(np.float32)
    actions = policy_from_arrays(arrays)(obs).astype(np.float32)
    path = checkpoints.save(tmp_path / "policy", "converted", arrays, obs, actions, {}, 0, 0, None, {})

    json_file = tmp_path / "scores" / "score.json"
    result = evaluate.main(evaluate.Config(checkpoint=path, episodes=1, json=json_file))
    written = json.loads(json_file.read_text())
    assert written == result
    assert written["stage"] == "converted"
    assert set(written["tasks"]) == set(c.TASKS)
    for of_task in written["tasks"].values():
        keys = {"mean", "std", "ci95", "success_rate", "fall_rate", "mean_steps", "terms", "results"}
        assert keys <= set(of_task)
    scores = [of_task["mean"] for of_task in written["tasks"].values()]
    assert written["mean"] == pytest.approx(np.mean(scores))
    shown = capsys.readouterr().out
    assert "Official score" in shown
    assert shown.splitlines()[-1] == str(json_file)


def test_workers_do_not_import_jax_though_the_main_script_does(tmp_path):
    (tmp_path / "probe.py").write_text(
        textwrap.dedent("""
            import os, sys
            import numpy as np

            def policy(obs):
                assert "jax" not in sys.modules and "torch" not in sys.modules
                assert os.environ["OMP_NUM_THREADS"] == "1"
                return np.zeros(12)
        """)
    )
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import os, sys
            import jax
            import evaluate, probe

            if __name__ == "__main__":
                before = os.environ.get("OMP_NUM_THREADS")
                result = evaluate.evaluate(probe.policy, episodes=1, workers=2)
                assert os.environ.get("OMP_NUM_THREADS") == before
                assert sys.modules["__main__"].__file__ == __file__
                print("mean", result["mean"])
        """)
    )
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{REPO}:{tmp_path}", "PATH": "", "HOME": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("mean -1.7")


def nan_policy(obs):
    return np.full(c.NUM_JOINTS, np.nan)


def test_a_policy_that_returns_nan_is_told_from_the_workers():
    with pytest.raises(UserError, match="NaN or infinity in task 'goalie'.*earlier checkpoint"):
        evaluate.evaluate(nan_policy, episodes=1, workers=2)


# --- bad input --------------------------------------------------------------------------------------


def test_bad_input_is_told_before_anything_runs(play, tmp_path):
    def refused(match, **config):
        with pytest.raises(UserError, match=match):
            evaluate.main(evaluate.Config(**config))

    refused("either --checkpoint DIR or --policy")
    refused("either --checkpoint DIR or --policy", checkpoint=tmp_path, policy="zero")
    refused("episodes .0. .*must be at least 1", policy="zero", episodes=0)
    refused("seed .-1.", policy="zero", seed=-1)
    refused("start noise .-0.1.", policy="zero", start_noise=-0.1)
    refused("workers .0.", policy="zero", workers=0)
    refused("nowhere", checkpoint=tmp_path / "nowhere")
    assert play == []


def test_an_existing_file_is_not_overwritten(play, tmp_path):
    file = tmp_path / "score.json"
    file.write_text("mine")
    with pytest.raises(UserError, match="score.json exists and is not overwritten"):
        evaluate.main(evaluate.Config(policy="zero", json=file))
    assert file.read_text() == "mine"
    assert play == []


def test_a_missing_backend_is_named():
    with pytest.raises(UserError, match="no backend 'crystal_ball'.*use --backend official"):
        evaluate.evaluate(None, backend="crystal_ball")


def test_the_command_line_ends_with_status_2_and_one_line():
    run = subprocess.run(
        [sys.executable, "evaluate.py", "--policy", "zero", "--episodes", "0"],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: episodes (0)") and run.stderr.count("\n") == 1
