"""The reports: self-contained pages that say what the files beside them hold; advice by hand; failing ends nothing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs import twin_source
from booster_soccer.rollout import scores
from booster_soccer.rollout.play import EpisodeResult
from booster_soccer.tracking import advice, page, plots, stage_pages
from booster_soccer.tracking.page import Section, Table
from tests import metric_names, small_checkpoints

_PATH = [[0.0, -6.8, 0.0, -8.8, 0.0, 0.12], [0.1, -6.9, 0.0, -8.8, 0.1, 0.12]]
_SEED = 2**63 + 11  # more bits than a number of JavaScript has


def row(task: str = "goalie", seed: int = _SEED, score: float = 0.5, **changes) -> dict:
    """One episode as an evaluation's JSON holds it: stood there for ten seconds, as far as nothing else is said."""
    fields = dict(physics_steps=5000, fell=False, success=False, touches=0, imu_height_m=0.6, terms={"steps": -1.0})
    fields |= dict(shot_speed_m_s=None, shot_direction_deg=None, roll_phase_deg=None, roll_score=0.0)
    fields |= dict(ball_speed_site_m_s=0.0, ball_speed_centre_m_s=0.0, ball_height_max_m=0.12)
    fields |= dict(walked_m=0.0, ball_distance_min_m=0.5, aim_pos_w=[-10.97, 0.0, 0.0], path=_PATH)
    result = EpisodeResult(task=task, seed=seed, score=score, **(fields | changes))
    return vars(result) | {"ending": scores.ending(result)}


def evaluation(rows: dict[str, list[dict]]) -> dict:
    tasks = {}
    for task, of_task in rows.items():
        names = EpisodeResult.__dataclass_fields__
        summary = scores._summary([EpisodeResult(**{name: one[name] for name in names}) for one in of_task])
        tasks[task] = {"episodes": len(of_task)} | summary | {"ci95": [0.25, 0.75]}
    return {"checkpoint": "runs/<b>x</b>", "stage": "finetuned", "hash": "0123456789abcdef", "backend": "twin",
            "seed": 3, "start_noise_rad": 0.02, "confidence_interval": "95 %", "mean": 0.5, "ci95": [0.25, 0.75],
            "tasks": tasks}  # fmt: skip


def standing() -> dict[str, list[dict]]:
    return {task: [row(task, _SEED + i, score=0.5 + i) for i in range(3)] for task in c.TASKS}


def written(files: list[Path]) -> str:
    [file] = files
    return file.read_text()


def assert_self_contained(text: str) -> None:
    """Nothing is fetched from anywhere: links to pages beside it, data, and names of XML are all that is there."""
    for address in re.findall(r"https?://[^\s\"'<>)]+", text):
        assert address.startswith("http://www.w3.org/")
    fetched = re.findall(r"(?:<script[^>]*src|<link[^>]*stylesheet|@import|<img|<iframe|url\((?!#))", text)
    assert fetched == []
    assert len(text) < 5_000_000


# --- pages --------------------------------------------------------------------------------------------------


def test_the_page_of_an_evaluation(tmp_path):
    file = tmp_path / "score.json"
    file.write_text(json.dumps(evaluation(standing())))
    text = written(stage_pages.of_evaluation(file))
    assert_self_contained(text)
    for words in ("+0.25 .. +0.75", "0123456789abcdef", f"--only target:{_SEED} --start-noise 0.02", "timeout"):
        assert words in text
    assert "runs/&lt;b&gt;x" in text and "<b>x</b>" not in text
    [played] = re.findall(r'<script type="application/json" class="data">(.*?)</script>', text, re.DOTALL)
    episodes = json.loads(played)
    assert [one["task"] for one in episodes] == [task for task in c.TASKS for _ in range(3)]
    assert episodes[0]["seed"] == str(_SEED) and episodes[0]["path"] == _PATH
    assert text.count("<svg") == text.count("</svg>") == 2


def test_the_page_of_a_run_shows_every_number_that_was_logged(tmp_path):
    out = small_checkpoints.save(tmp_path / "tuned", stage="finetuned", metrics=_VERDICT | {"result": "start"})
    lines = [{"step": step, "wall_s": 60.0 * step, "eval/score": 1.0, "eval/score_goalie": 2.0, "odd": None,
              "train/episode/score_target": -0.2, "gpu/memory_percent": 40.0, "train/reward/alive": 0.5}
             for step in (1, 2)]  # fmt: skip
    content = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval/sc'
    (tmp_path / "tuned.metrics.jsonl").write_text(content)
    text = written(stage_pages.of_run(out))
    assert_self_contained(text)
    for words in (
        "The start was kept, because",
        "train/reward/alive",
        "gpu/memory_percent",
        "2.0 min",
        "million steps",
        "Fine-tuning: tuned",
    ):
        assert words in text
    assert "diverged" not in text


def test_a_run_without_a_metrics_file_has_a_page_all_the_same(tmp_path):
    text = written(stage_pages.of_run(small_checkpoints.save(tmp_path / "p", stage="pretrained")))
    assert "Pre-training: p" in text and "<svg" not in text


def test_the_chain_links_the_pages_that_are_there_and_says_what_to_do(tmp_path):
    out = tmp_path / "chain"
    small_checkpoints.save(out / "finetuned", stage="finetuned", metrics=_VERDICT | {"result": "start"})
    (out / "evaluations").mkdir()
    rows = []
    for policy, name, mean in (
        ("zero torque", "zero", -1.75),
        ("converted", "converted", 4.0),
        ("fine-tuned", "finetuned", 4.0),
    ):
        file = out / "evaluations" / f"{name}.json"
        file.write_text(json.dumps(evaluation(standing())))
        means = dict.fromkeys(c.TASKS, mean)
        rows.append(
            {
                "policy": policy,
                "backend": "twin",
                **means,
                "mean": mean,
                "ci95": [mean - 1, mean + 1],
                "file": str(file),
            }
        )
    stage_pages.of_evaluation(out / "evaluations" / "zero.json")
    failed = {"gate": 3, "name": "goalie: fell", "passed": False, "remedy": "-"}
    gates = {"passed": False, "checks": [failed], "checkpoints": {"pretrained": str(out / "gone")}}
    (out / "gates.json").write_text(json.dumps(gates))
    summary = {"settings": {"preset": "demo", "seed": 4}, "seconds": {"pretrain": 600.0}, "scores": rows}
    (out / "summary.json").write_text(json.dumps(summary))
    text = written(stage_pages.of_chain(out))
    assert_self_contained(text)
    assert re.findall(r'<a href="([^"]+)"', text) == ["evaluations/zero.html"]
    for words in (
        "simulators too far apart",
        "--dr-level 1",
        "short of time",
        "submit it first",
        "preset demo, seed 4",
    ):
        assert words in text


def test_gates_that_measured_what_is_no_number_have_a_page(tmp_path):
    """A lane that broke: its numbers are not finite, JSON has null for them, and a limit may be null too."""
    side, nothing = {"mean": 0.5, "std": 0.1}, {"mean": None, "std": None}
    check = {"gate": 3, "name": "score", "measured": None, "low": None, "high": 1.0, "passed": False, "where": "goalie"}
    gates = {
        "passed": False,
        "checks": [check | {"remedy": "-"}],
        "checkpoints": {"pretrained": str(tmp_path / "gone")},
        "identity": {"pretrained": "ab12"},
        "behaviour": {"tasks": {"goalie": {"score": {"pretraining": nothing, "official": side, "difference": None}}}},
    }
    file = tmp_path / "gates.json"
    file.write_text(json.dumps(gates))
    text = written(stage_pages.of_gates(file))
    assert "FAILED" in text and "nan ± nan" in text and "0.50 ± 0.10" in text


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    file = tmp_path / "score.json"
    file.write_text(json.dumps(evaluation(standing())))
    (tmp_path / "score.html").write_text("<html>mine</html>")
    assert stage_pages.of_evaluation(file) == []
    assert "score.html is there already and no report of ours" in capsys.readouterr().err
    assert (tmp_path / "score.html").read_text() == "<html>mine</html>"
    file.write_text('{"tasks": {}}')  # another program's
    assert stage_pages.of_evaluation(file) == []
    warning = capsys.readouterr().err
    assert warning.startswith("warning: the report of") and warning.count("\n") == 1


def test_a_page_of_ours_is_written_again(tmp_path):
    file = tmp_path / "a.html"
    page.write(file, "first", "", [])
    page.write(file, "second", "", [Section("S", table=Table(("", "b"), [("x & y", "1")]))])
    assert "second" in file.read_text() and "x &amp; y" in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_defenders_stand_where_the_page_draws_them():
    """In the slots that the window leaves; the page has the window only."""
    for seed in range(5):
        _, (_, *defenders, window) = twin_source.load("obstacle").draw_start(seed)
        free = min(c.DEFENDER_SLOTS_Y_M, key=lambda slot: abs(slot - window[1]))
        expected = sorted(slot for slot in c.DEFENDER_SLOTS_Y_M if slot != free)
        np.testing.assert_allclose(sorted(defender[1] for defender in defenders), expected, atol=0.01)


# --- words --------------------------------------------------------------------------------------------------

_VERDICT = {
    "validation_start": 1.5,
    "validation_candidate": 2.0,
    "candidate_step": 12000,
    "gain": 0.5,
    "standard_error": 0.6,
    "confirmation": {"start/score": 1.25, "candidate/score": 1.75},
}


def test_the_verdict_in_words():
    [kept] = stage_pages.verdict_in_words(_VERDICT | {"result": "start"})
    assert kept.startswith(
        "The start was kept, because on fresh seeds the candidate gained +0.500, with a standard error of 0.600"
    )
    [replaced] = stage_pages.verdict_in_words(_VERDICT | {"result": "candidate", "gain": 0.9})
    assert (
        replaced.startswith("The candidate replaced the start, because")
        and "start scored +1.25, the candidate, of step 12,000, +1.75" in replaced
    )
    words = stage_pages.verdict_in_words({"result": "start", "validation_start": 1.5, "diverged_before_step": 7000})
    assert words[0].startswith("The start was kept, because no candidate scored above it in validation, where")
    assert words[1] == "Training diverged before step 7,000."


# --- advice -------------------------------------------------------------------------------------------------

_SHOT = {"touches": 1, "shot_speed_m_s": 6.0, "physics_steps": 900}


@pytest.mark.parametrize(
    ("task", "habit", "rule"),
    [
        ("goalie", {"fell": True, "physics_steps": 500}, "falls early"),
        ("goalie", {"fell": True, "physics_steps": 4000}, None),  # after eight seconds
        ("target", {"ball_distance_min_m": 1.8}, "stands but does not approach"),
        ("target", {}, None),
        ("goalie", _SHOT | {"shot_speed_m_s": 1.5}, "touches but weakly"),
        ("target", _SHOT | {"shot_speed_m_s": 1.5}, None),  # is enough there
        ("target", _SHOT | {"shot_speed_m_s": 0.4}, "touches but weakly"),
        ("obstacle", _SHOT | {"terms": {"ball_blocked": -0.5}}, "shoots but is blocked"),
        ("obstacle", _SHOT, None),
        ("target", _SHOT | {"fell": True}, "hits but then falls"),
        ("target", _SHOT | {"fell": True, "success": True}, None),
    ],
)
def test_advice_on_a_habit_of_one_task(task, habit, rule):
    """Half of the episodes have it; one in ten is chance."""
    others = [row(task) for _ in range(10)]
    found = advice.of_evaluation({"tasks": {task: {"results": [row(task, **habit) for _ in range(10)] + others}}})
    assert [one.rule for one in found] == ([rule] if rule else [])
    if rule:
        assert found[0].seen.startswith(f"{task}: 50%") or "50%" in found[0].seen
    seldom = {"tasks": {task: {"results": [row(task, **habit), *others[1:]]}}}
    assert advice.of_evaluation(seldom) == []


def test_advice_of_gates_and_of_a_chain():
    def gates(*failed: int) -> dict:
        return {
            "checks": [
                {"gate": gate, "name": f"of {gate}", "passed": gate not in failed, "remedy": "mend it"}
                for gate in (1, 2, 3)
            ]
        }

    assert advice.of_gates(gates(), 0) == []
    assert [(one.rule, one.do) for one in advice.of_gates(gates(1), 0)] == [("gate 1 failed", "mend it")]
    [apart] = advice.of_gates(gates(3), 2)
    assert apart.rule == "simulators too far apart" and "--dr-level 3" in apart.do and "--total-steps" in apart.do
    assert "--dr-level" not in advice.of_gates(gates(3), 3)[0].do  # there is no fourth
    scored = {"zero torque": {"mean": -1.8}, "converted": {"mean": 4.0, "ci95": [3.0, 5.0]}}
    assert [one.rule for one in advice.of_chain(scored, {"result": "start"})] == ["short of time"]
    assert advice.of_chain(scored, {"result": "candidate"}) == []
    assert advice.of_chain(scored | {"converted": {"mean": -1.0, "ci95": [-2.0, 0.0]}}, {"result": "start"}) == []


def test_every_number_of_the_gpu_has_a_unit():
    watched = [name for name in metric_names.documented("pretrained") if name.startswith("gpu/")]
    assert watched and [name for name in watched if not plots.unit_of(name)] == []
