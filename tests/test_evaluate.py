"""The evaluation: arithmetic by hand on made-up episodes, and short real runs in worker processes."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import evaluate
from booster_soccer.envs import constants as c
from booster_soccer.envs import official, scene, twin
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.rollout import scores
from booster_soccer.rollout.lanes import OfficialLanes, TwinLanes
from booster_soccer.rollout.play import Episode, EpisodeResult, hold_default_pose, play
from booster_soccer.store import checkpoints
from booster_soccer.tracking import report
from tests import small_checkpoints

REPO = Path(evaluate.__file__).parent


def episode(task: str, seed: int, score: float, **changes) -> EpisodeResult:
    fields = dict(physics_steps=1000, fell=False, success=False, touches=0, imu_height_m=0.6)
    fields |= dict(shot_speed_m_s=None, shot_direction_deg=None, roll_phase_deg=None, roll_score=0.0)
    fields |= dict(ball_speed_site_m_s=0.0, ball_speed_centre_m_s=0.0, ball_height_max_m=0.12)
    fields |= dict(walked_m=0.0, ball_distance_min_m=1.0, aim_pos_w=[0.0, 0.0, 0.0], path=[])
    return EpisodeResult(task=task, seed=seed, score=score, terms={"steps": -1.0}, **(fields | changes))


@pytest.fixture
def made_up(monkeypatch):
    """Replaces the environments: scores 0, 1, 2, ... within each task; records what was asked for."""
    asked = []

    def play_in_workers(backend, policy, episodes, start_noise_rad, workers, progress):
        asked.extend(episodes)
        counts = dict.fromkeys(c.TASKS, 0)
        results = []
        for task, seed in episodes:
            i = counts[task]
            counts[task] += 1
            fields = dict(physics_steps=100 * (i + 1), fell=i % 2 == 0, success=i == 0)
            results.append(episode(task, seed, float(i), **fields))
        return list(progress(iter(results)))

    monkeypatch.setattr(scores, "play_in_workers", play_in_workers)
    return asked


# --- arithmetic -------------------------------------------------------------------------------------


def test_means_rates_and_deviation_by_hand(made_up):
    result = scores.evaluate(None, episodes=4, start_noise_rad=0.02)
    for task in c.TASKS:
        of_task = result["tasks"][task]
        assert of_task["episodes"] == of_task["distinct_episodes"] == 4
        assert of_task["mean"] == 1.5  # of 0, 1, 2, 3
        assert of_task["std"] == pytest.approx(1.290994449)  # sqrt(5 / 3)
        assert of_task["success_rate"] == 0.25
        assert of_task["fall_rate"] == 0.5
        assert of_task["mean_physics_steps"] == 250.0
        assert of_task["terms"] == {"steps": -1.0}
        assert of_task["terms_std"] == {"steps": 0.0}
        assert [r["score"] for r in of_task["results"]] == [0.0, 1.0, 2.0, 3.0]
    assert result["mean"] == 1.5


def test_the_mean_weighs_the_tasks_equally_though_the_goalie_plays_once(made_up):
    result = scores.evaluate(None, episodes=3)
    assert result["tasks"]["goalie"]["distinct_episodes"] == 1
    assert result["tasks"]["goalie"]["episodes"] == 3
    assert result["tasks"]["goalie"]["std"] == 0.0
    assert result["tasks"]["goalie"]["ci95"] == [0.0, 0.0]
    assert result["mean"] == pytest.approx((0.0 + 1.0 + 1.0) / 3)
    assert result["tasks"]["target"]["ci95"] == [0.0, 2.0]  # of 0, 1, 2: each alone in 1 of 27 resamples


def test_every_task_plays_the_platforms_seeds(made_up):
    scores.evaluate(None, episodes=3, seed=7, start_noise_rad=0.02)
    seeds = [official.match_seed(7, i) for i in range(3)]
    assert made_up == [(task, seed) for task in c.TASKS for seed in seeds]


def test_the_interval_is_that_of_the_mean(made_up):
    """Of many episodes the bootstrap meets mean +- 1.96 standard errors."""
    result = scores.evaluate(None, episodes=200, start_noise_rad=0.02)
    of_task = result["tasks"]["target"]
    half_width = 1.96 * of_task["std"] / np.sqrt(200)
    low, high = of_task["ci95"]
    assert low == pytest.approx(of_task["mean"] - half_width, abs=0.15 * half_width)
    assert high == pytest.approx(of_task["mean"] + half_width, abs=0.15 * half_width)
    assert result["ci95"] == pytest.approx(of_task["ci95"])  # the made-up scores are the same in each task


def test_the_interval_of_the_mean_knows_that_tasks_share_their_starts():
    """Scores that cancel start by start leave the mean of the tasks without spread."""
    of_task = np.random.default_rng(1).normal(size=100)
    means = scores._resampled_means([of_task, -of_task, np.zeros(100)])
    assert np.ptp(means[0]) > 0.3
    assert np.ptp(means.mean(axis=0)) < 1e-12


def test_the_table_names_what_stands_for_identical_episodes(made_up, capsys):
    report.print_scores(scores.evaluate(None, episodes=3), "made up")
    shown = capsys.readouterr().out
    assert "goalie: without start noise every seed gives the same episode" in shown
    assert "stands for 3" in shown
    assert "obstacle: without" not in shown


def test_how_an_episode_ended_in_a_word():
    def word(task="goalie", terms=None, **changes):
        result = episode(task, 0, 0.0, **({"physics_steps": 300} | changes))
        return scores.ending(dataclasses.replace(result, terms=terms or {}))

    assert word(success=True) == "success"
    assert word(success=True, terms={"ball_blocked": -0.5, "offside": -0.0}) == "success+blocked"
    assert word(terms={"offside": -3.0}, fell=True) == "offside+fell"
    assert word(physics_steps=5000) == "timeout"
    assert word(physics_steps=5000, fell=True) == "fell"
    assert word(physics_steps=4999) == "diverged"


def test_spreads_by_hand():
    def spread(name, values):
        return scores._spread([episode("target", 0, 0.0, **{name: value}) for value in values], name)

    assert spread("shot_speed_m_s", [1.0, None, 4.0]) == {"n": 2, "mean": 2.5, "std": pytest.approx(4.5**0.5)}
    assert spread("shot_speed_m_s", [None]) == {"n": 0, "mean": None, "std": None}
    around_back = spread("shot_direction_deg", [170.0, -170.0])  # 10 degrees either side of 180
    assert abs(around_back["mean"]) == pytest.approx(180.0)
    assert around_back["std"] == pytest.approx(10.0, abs=0.1)  # near the usual one (N) of +-10
    assert spread("roll_phase_deg", [260.0, 280.0])["mean"] == pytest.approx(270.0)
    assert spread("shot_direction_deg", [90.0, -90.0])["std"] > 300.0  # no direction at all


def test_worst_episodes_and_the_command_that_plays_one_again(made_up, capsys):
    evaluate.main(evaluate.Config(policy="hold", episodes=7, start_noise=0.02, seed=1))
    shown = capsys.readouterr().out
    listed = [line.split() for line in shown[shown.index("Worst episodes") :].splitlines()]
    of_target = [row for row in listed if row[:1] == ["target"]]
    seeds = [official.match_seed(1, i) for i in range(report.WORST)]  # the fixture's scores rise
    assert [row[1:3] for row in of_target] == [[str(seed), f"+{i}.00"] for i, seed in enumerate(seeds)]
    command = f"evaluate.py --policy hold --only target:{seeds[0]} --start-noise 0.02"
    assert command in shown


def test_what_is_on_the_page_is_not_printed_again(made_up, tmp_path, capsys):
    evaluate.main(evaluate.Config(policy="hold", episodes=3, json=tmp_path / "score.json"))
    shown = capsys.readouterr().out
    assert "Official score" in shown and "Worst episodes" not in shown and "score.html" in shown
    assert "Worst episodes" in (tmp_path / "score.html").read_text()


def test_a_result_that_is_there_already_claims_once(made_up, tmp_path, monkeypatch, capsys):
    """The evaluation came before the gates, or was killed between its file and its end."""
    checkpoint, gates, file = tmp_path / "finetuned", tmp_path / "gates.json", tmp_path / "score.json"
    small_checkpoints.save(checkpoint, stage="finetuned")
    gates.write_text("{}")
    claims = []

    class Noting(contextlib.nullcontext):
        def __init__(self, *about, resumed=False):
            super().__init__(self)
            self.resumed = resumed

        def result(self, result):
            claims.append((self.resumed, result.claim))

    monkeypatch.setattr(evaluate, "Recorder", Noting)
    config = evaluate.Config(checkpoint=checkpoint, episodes=3, json=file)
    evaluate.main(config)
    evaluate.main(config)  # nothing more to tell
    evaluate.main(dataclasses.replace(config, gates=gates))
    assert claims == [(False, None), (True, (checkpoint, gates, file))] and len(made_up) == 7
    assert capsys.readouterr().out.count("Official score") == 3
    monkeypatch.setattr(evaluate, "has_claimed", lambda place: place == file)
    evaluate.main(dataclasses.replace(config, gates=gates))
    assert len(claims) == 2


def test_the_plot_is_written(made_up, tmp_path, capsys):
    file = tmp_path / "plots" / "scores.png"
    evaluate.main(evaluate.Config(policy="zero", episodes=5, plot=file))  # the goalie has one score only
    assert file.read_bytes().startswith(b"\x89PNG") and str(file) in capsys.readouterr().out


# --- the ball ---------------------------------------------------------------------------------------


def test_the_direction_of_a_shot_by_hand():
    line = np.array([-2.0, 0.0, 0.0])  # toward the goal
    assert official.direction_deg(np.array([-3.0, 0.0, 9.0]), line) == pytest.approx(0.0)
    assert official.direction_deg(np.array([-1.0, -1.0, 0.0]), line) == pytest.approx(45.0)  # left, facing -x
    assert official.direction_deg(np.array([0.0, 1.0, 0.0]), line) == pytest.approx(-90.0)


@pytest.mark.parametrize(
    ("site_from_centre", "phase"),
    [((0, 0, -1), 0.0), ((0, -1, 0), 90.0), ((0, 0, 1), 180.0), ((0, 1, 0), 270.0), ((1, 0, 1), 180.0)],
)
def test_the_roll_phase_by_hand(site_from_centre, phase):
    """Of a ball that rolls along y: under the centre, behind it, on top, in front."""
    site, velocity = c.BALL_RADIUS_M * np.array(site_from_centre, float), np.array([0.0, 2.0, 0.0])
    assert official.roll_phase_deg(site, velocity) == pytest.approx(phase)
    spin_w = np.cross([0.0, 0.0, 1.0], velocity) / c.BALL_RADIUS_M
    along = (velocity + np.cross(spin_w, site))[1]
    assert along == pytest.approx(2.0 * (1 - np.cos(np.radians(phase))), abs=1e-9)


def test_what_is_said_about_the_ball_by_hand():
    """A ball that rolls at 2 m/s toward the goal with its site on top, shot there at 3 m/s by 4 upward."""
    pos, up = np.array([-9.0, 1.0, 0.11]), np.array([0.0, 0.0, c.BALL_RADIUS_M])
    end = official.Ball(pos, np.array([-2.0, 0.0, 0.0]), pos + up, np.array([-4.0, 0.0, 0.0]))
    shot = end._replace(centre_vel_w=np.array([-3.0, 0.0, 4.0]))
    aim = pos + [-1.0, -1.0, 0.0]  # the shot passes it on the right
    found = official.ball_quantities(shot, end, aim)
    assert found == pytest.approx({"shot_speed_m_s": 5.0, "shot_direction_deg": -45.0, "roll_phase_deg": 180.0})
    still = end._replace(centre_vel_w=np.array([-0.04, 0.0, 0.0]))
    untouched = official.ball_quantities(None, still, aim)
    assert untouched["shot_speed_m_s"] is untouched["shot_direction_deg"] is untouched["roll_phase_deg"] is None


def thrown_at_the_robot(qpos, qvel, address) -> None:
    to_robot = qpos[address.root_q][:2] - qpos[address.ball_q][:2]
    qvel[address.ball_v][:2] = 8.0 * to_robot / np.linalg.norm(to_robot)


@pytest.fixture
def thrown_balls(monkeypatch):
    """Every episode starts with the ball on its way to the robot, in both backends."""
    official_reset, twin_reset = official.reset, twin.TwinEnv.reset

    def reset(env, *args):
        official_reset(env, *args)
        base = env.unwrapped
        model, data = base.sim.model._model, base.sim.data._data
        thrown_at_the_robot(data.qpos, data.qvel, scene.official_addresses(model))
        return base._get_obs(), base._get_info() | {"task_index": env.task_index}

    def reset_twin(self, *args):
        twin_reset(self, *args)
        for qpos, qvel in zip(self.qpos, self.qvel):
            thrown_at_the_robot(qpos, qvel, scene.official_addresses(self._source.model))
        info = self._info()
        return self._obs(info), info

    monkeypatch.setattr(official, "reset", reset)
    monkeypatch.setattr(twin.TwinEnv, "reset", reset_twin)


@pytest.mark.parametrize("task", c.TASKS)
def test_both_backends_say_the_same_about_a_ball_that_was_played(task, thrown_balls):
    episodes = [Episode(task, seed) for seed in (1, 2, 3)]
    expected = list(play(OfficialLanes(task), hold_default_pose, episodes, 0.02))
    assert list(play(TwinLanes(task, 3), hold_default_pose, episodes, 0.02)) == expected
    for result in expected:
        assert result.touches > 0 and result.shot_speed_m_s > 0.0 and abs(result.shot_direction_deg) <= 180.0
    assert any(result.ball_speed_centre_m_s != result.shot_speed_m_s for result in expected)  # was released
    if task == "goalie":
        for result in expected:
            velocity_score = result.terms["ball_vel_twd_goal"]
            assert abs(velocity_score - result.roll_score) <= 1.5 * result.ball_speed_centre_m_s + 1e-9


# --- real episodes ----------------------------------------------------------------------------------


def test_numbers_depend_neither_on_workers_nor_on_the_backend_and_one_episode_can_be_played_again(capsys):
    policy = hold_default_pose
    one, three, in_twin = (
        scores.evaluate(policy, 2, seed=3, start_noise_rad=0.02, backend=backend, workers=workers)
        for backend, workers in (("official", 1), ("official", 3), ("twin", 1))
    )
    assert one == three
    assert one == in_twin | {"backend": "official"}
    [here] = play(OfficialLanes("target"), hold_default_pose, [Episode("target", official.match_seed(3, 1))], 0.02)
    row = one["tasks"]["target"]["results"][1]
    assert row["score"] == here.score

    config = evaluate.Config(policy="hold", only=f"target:{row['seed']}", start_noise=0.02, backend="twin")
    again = evaluate.main(config)
    assert {name: again[name] for name in row} == row
    assert f"{row['score']:.6f}" in capsys.readouterr().out


def test_a_checkpoint_is_scored_and_written(tmp_path, capsys):
    rng = np.random.default_rng(0)
    sizes = {"input": (16, OBS_SIZE), "hidden": (16, 16), "output": (c.NUM_JOINTS, 16)}
    arrays = {f"actor.{layer}.weight": rng.normal(0, 0.1, size) for layer, size in sizes.items()}
    arrays |= {f"actor.{layer}.bias": np.zeros(size[0]) for layer, size in sizes.items()}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    obs = rng.normal(size=(16, OBS_SIZE)).astype(np.float32)
    path = checkpoints.save(tmp_path / "policy", "converted", arrays, obs, {}, 0, 0, [], {})

    json_file = tmp_path / "scores" / "score.json"
    result = evaluate.main(evaluate.Config(checkpoint=path, episodes=1, json=json_file))
    written = json.loads(json_file.read_text())
    assert written == result
    assert written["stage"] == "converted"
    assert set(written["tasks"]) == set(c.TASKS)
    for of_task in written["tasks"].values():
        keys = {"mean", "std", "ci95", "success_rate", "fall_rate", "mean_physics_steps", "terms", "results"}
        assert keys <= set(of_task)
    scores = [of_task["mean"] for of_task in written["tasks"].values()]
    assert written["mean"] == pytest.approx(np.mean(scores))
    shown = capsys.readouterr().out
    assert "Official score" in shown
    assert shown.splitlines()[-2:] == [str(json_file), str(json_file.with_suffix(".html"))]
    assert path.name in json_file.with_suffix(".html").read_text()

    assert evaluate.main(evaluate.Config(checkpoint=path, episodes=1, json=json_file)) == result  # recognised
    assert "has this result already" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists and is not overwritten"):
        evaluate.main(evaluate.Config(checkpoint=path, episodes=1, seed=1, json=json_file))


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
    with pytest.raises(UserError, match="NaN or infinity in task '(goalie|obstacle)'.*earlier checkpoint"):
        scores.evaluate(nan_policy, episodes=1, workers=2)


# --- bad input --------------------------------------------------------------------------------------


def test_bad_input_is_told_before_anything_runs(made_up, tmp_path):
    def refused(match, **config):
        with pytest.raises(UserError, match=match):
            evaluate.main(evaluate.Config(**config))

    refused("either --checkpoint DIR or --policy")
    refused("either --checkpoint DIR or --policy", checkpoint=tmp_path, policy="zero")
    refused("episodes .0. .*must be at least 1", policy="zero", episodes=0)
    refused("seed .-1.", policy="zero", seed=-1)
    refused("start noise .-0.1.", policy="zero", start_noise=-0.1)
    refused("workers .0.", policy="zero", workers=0)
    refused("--start-noise cannot be nan", policy="zero", start_noise=float("nan"))
    for only in ("target", "target:", "target:-1", "target:1.5", "keeper:3", f"target:{2**64}"):
        refused(f"--only {only} is not task:seed", policy="zero", only=only)
    refused("needs a name that ends in .png", policy="zero", plot=tmp_path / "plot.txt")
    refused("and no --only", policy="zero", plot=tmp_path / "plot.png", only="target:1")
    (tmp_path / "file").write_text("")
    refused("cannot write .*file/score.json: .*name another", policy="zero", json=tmp_path / "file/score.json")
    refused("cannot write .*: File name too long", policy="zero", plot=tmp_path / f"{'x' * 300}.png")
    refused("nowhere", checkpoint=tmp_path / "nowhere")
    gates = {"policy": "zero", "gates": tmp_path / "file"}
    refused("a Champion needs this file .*, --json FILE and the official", **gates)
    refused("a Champion needs", **gates, json=tmp_path / "new.json", backend="twin")
    refused("a Champion needs", policy="zero", gates=tmp_path / "none", json=tmp_path / "new.json")
    refused("a baseline cannot be the Champion", **gates, json=tmp_path / "new.json")
    assert made_up == []


def test_an_existing_file_is_not_overwritten(made_up, tmp_path):
    file = tmp_path / "score.json"
    file.write_text("mine")
    with pytest.raises(UserError, match="score.json exists and is not overwritten"):
        evaluate.main(evaluate.Config(policy="zero", json=file))
    assert file.read_text() == "mine"
    assert made_up == []


@pytest.mark.parametrize("name", ["pretraining", "crystal_ball", "../twin"])
def test_an_unknown_backend_is_refused_with_the_choices(name):
    with pytest.raises(UserError, match=f"no backend '{name}': choose one of official, twin, scene$"):
        scores.evaluate(None, backend=name)


def test_nothing_but_the_result_is_written_where_nobody_looks(tmp_path):
    """No progress bar in a file."""
    command = [sys.executable, "evaluate.py", "--policy", "zero", "--episodes", "1", "--backend", "twin"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert run.returncode == 0 and "Official score: zero" in run.stdout
    assert run.stderr == ""


def test_the_command_line_ends_with_status_2_and_one_line():
    run = subprocess.run(
        [sys.executable, "evaluate.py", "--policy", "zero", "--episodes", "0"],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: episodes (0)") and run.stderr.count("\n") == 1
