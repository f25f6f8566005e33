"""The check of a GPU: what it reads from a run, shows, and says about cost. For real, on a CPU: make gpu-check."""

import json
import sys
from datetime import datetime
from pathlib import Path

import pytest

import cloud.gpu_check as check
from booster_soccer import cli
from booster_soccer.errors import UserError
from booster_soccer.rollout.collect import MjxLoop
from tests import metric_names
from train_mjx_sac import PRESETS

GPU = {"name": "NVIDIA L4", "memory_gb": 24.0, "driver": "550.54"}
INVENTORY = {"python": "3.12.3", "cores": 12, "packages": {"jax": "0.10.2"}, "cuda": ["12"], "gpu": GPU,
             "jax_devices": ["NVIDIA L4"]}  # fmt: skip
MEASURED = {"preset": "l4", "lanes": 2048, "inventory": INVENTORY, "compile_s": 61.2, "resumed": True,
            "resumed_run_s": 20.0, "steps_per_s": 50_000, "memory_gb": 5.5, "critic_losses": [0.5, 0.25],
            "frame": "frame.png", "time": "2026-11-26T10:00:00"}  # fmt: skip
NOW = datetime(2026, 11, 26, 10, 0)


def failed(**changes) -> list[str]:
    return [row.what for row in check.rows(MEASURED | changes) if row.passed is False]


def test_compile_time_and_speed_by_hand():
    """Two calls a second with the updates, four without; the first call took 30 s longer than one with updates."""
    walls = [30.5, 30.75, 31.0, 31.25, 31.75, 32.25, 32.75]
    lines = [{"step": 100 * (i + 1), "wall_s": wall} for i, wall in enumerate(walls)]
    assert check.speeds(lines) == pytest.approx((30.0, 200.0))


def test_the_length_of_a_call_is_the_loops():
    assert check.CALL == MjxLoop.ITERATIONS_PER_CALL


@pytest.mark.parametrize("lanes", [None, 8])
def test_the_training_script_takes_the_command(tmp_path, monkeypatch, lanes):
    training = check.Training(tmp_path / "run", "l4", lanes, 2048, tmp_path)
    monkeypatch.setattr(sys, "argv", training.command()[1:])
    parsed = cli.parse(PRESETS, "", "demo")
    call = check.CALL * (lanes or 2048)
    assert parsed.engine == "mjx" and parsed.resume and parsed.collect.num_envs == (lanes or 2048)
    assert parsed.total_steps == check.CALLS * call and parsed.records.log_every == call
    assert parsed.collect.learning_starts < check.KILL_AFTER * call


def test_what_must_hold_is_said_to_fail():
    assert failed() == []
    assert failed(resumed=False) == ["SIGKILL, then --resume to the end"]
    assert failed(memory_gb=18.5) == ["GPU memory, most"]
    for losses in ([], [0.5, float("nan")]):
        assert failed(critic_losses=losses) == ["critic loss over the updates"]
    for cuda in (["12", "13"], []):
        assert failed(inventory=INVENTORY | {"cuda": cuda}) == ["CUDA libraries in the environment"]


def test_without_a_gpu_the_page_says_so():
    on_cpu = INVENTORY | {"gpu": None, "cuda": [], "jax_devices": ["cpu"]}
    assert failed(inventory=on_cpu, memory_gb=None) == []
    assert "There was no GPU" in check.page(MEASURED | {"inventory": on_cpu, "memory_gb": None})
    text = check.page(MEASURED)
    assert "There was no GPU" not in text and "| steps/s with updates | 30,000 on an H100 (`l4`) | 50,000 |  |" in text
    assert "| GPU memory, most | at most 18 GB; 3.5 GB on an H100 (`l4`) | 5.5 GB | passed |" in text


def test_an_estimate_by_hand():
    steps = {"pre-training": 90_000_000, "fine-tuning": 3_600_000}
    lines = check.estimate(steps, {"pre-training": 50_000.0, "fine-tuning": 1_000.0}, 2.0, NOW)
    assert lines[1:] == [
        "fine-tuning: 3,600,000 steps at 1,000/s, 1.0 hours",
        "together: 1.5 hours, price: 3.00, it would end at 2026-11-26 11:30",
    ]
    part = check.estimate(steps, {"pre-training": 50_000.0, "fine-tuning": None}, 0.0, NOW)
    assert (
        "not measured" in part[1] and "together of what is measured: 0.5 hours, price: give --price-per-hour" in part[2]
    )
    assert len(check.estimate(steps, dict.fromkeys(steps), 2.0, NOW)) == 2


def test_only_a_check_of_the_same_preset_on_a_gpu_gives_a_speed(tmp_path, capsys):
    file = tmp_path / "gpu_check.json"
    assert check.measured_speed(file, "l4") is None
    file.write_text(json.dumps(MEASURED))
    assert check.measured_speed(file, "l4") == 50_000 and check.measured_speed(file, "h200") is None
    check.main(check.Config(tmp_path, estimate=True, price_per_hour=1.0))
    assert f"pre-training: {PRESETS['l4'].total_steps:,} steps at 50,000/s" in capsys.readouterr().out
    file.write_text(json.dumps(MEASURED | {"inventory": INVENTORY | {"gpu": None}}))
    assert check.measured_speed(file, "l4") is None
    file.write_text("{}")
    with pytest.raises(UserError, match="is no result of gpu_check.py: remove it"):
        check.measured_speed(file, "l4")


def test_a_training_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "inventory", lambda out: INVENTORY | {"gpu": None})
    monkeypatch.setattr(check.Training, "command", lambda self: [sys.executable, "-c", "raise SystemExit('no')"])
    with pytest.raises(UserError, match="training does not get under way: see .*training.log"):
        check.main(check.Config(tmp_path / "out"))
    assert Path(tmp_path / "out" / "training.log").read_text() == "no\n"


def test_the_names_that_it_reads_are_those_that_pretraining_logs():
    assert {check._REWARD, check._LOSS} <= metric_names.documented("pretrained").keys()
