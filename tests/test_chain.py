"""The chain: the stages in order, each by its own process; the first that fails ends it, and so does SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chain
from booster_soccer.errors import UserError
from booster_soccer.tracking.record import TrackConfig
from cloud import check
from tests.long import soak

ROOT = Path(chain.__file__).parent
_CHAIN = """
import sys
from pathlib import Path
import chain
from booster_soccer import errors
chain.SCRIPTS, chain._PATIENCE_S = Path({scripts!r}), 1.5
errors.run(chain.main, chain.Config(out=Path({out!r})))
"""
_STAGE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from booster_soccer.store.signals import STOPPED, StopSignal
place = Path({place!r})
{body}
"""
_SAVES = """
with StopSignal() as stop:
    (place / "pid").write_text(str(os.getpid()))
    while not stop.received:
        time.sleep(0.01)
    (place / "saved").touch()
    raise SystemExit(STOPPED)
"""
_IGNORES = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(place / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize(("body", "saved"), [(_SAVES, True), (_IGNORES, False)])
def test_sigterm_reaches_the_stage_and_ends_both(tmp_path, body, saved):
    stage = _STAGE.format(root=str(ROOT), place=str(tmp_path), body=body)
    (tmp_path / "train_mjx_sac.py").write_text(stage)
    program = _CHAIN.format(scripts=str(tmp_path), out=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)  # to the chain alone, as a platform does
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert process.returncode == 143
    assert "SIGTERM: stage 'pretrain' is ended; the same command with --resume goes on" in output
    assert "Traceback" not in output
    assert (tmp_path / "saved").exists() == saved
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "out").exists()


def test_the_first_stage_that_fails_ends_the_chain(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "SCRIPTS", tmp_path)  # a machine without even the first script
    with pytest.raises(UserError, match="stage 'pretrain' failed: train_mjx_sac.py ended with status 2, .*--resume"):
        chain.main(chain.Config(out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def pretend(command: list[str]) -> None:
    """Leave what the chain reads of a script's output."""
    script, options = command[0], dict(zip(command[1:], command[2:]))
    if script == "evaluate.py" and "--json" in options:
        by_task = {"mean": 0.5, "mean_physics_steps": 100.0}
        result = {"tasks": dict.fromkeys(chain.c.TASKS, by_task), "mean": 0.5, "ci95": [0.25, 0.75]}
        file = Path(options["--json"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
    elif script == "submit.py":
        Path(options["--out"]).mkdir(exist_ok=True)
        (Path(options["--out"]) / "score.json").write_text('{"mean": 0.75}')


@pytest.mark.parametrize("commands", [chain.stages, soak.shortest])
@pytest.mark.parametrize("resume", [False, True])
def test_the_scripts_take_the_options_that_they_are_given(commands, resume, tmp_path):
    """Of the chain, and of the drill that runs it shortened."""
    of_stages = commands(chain.Config(resume=resume, tracking=TrackConfig(("none",))), tmp_path).values()
    found = [check.refused(script, options) for of_stage in of_stages for script, *options in of_stage]
    assert len(found) >= 8 and not any(found)


def test_a_chain_runs_every_stage_and_writes_its_summary_again(tmp_path, monkeypatch, capsys):
    ran: list[list[str]] = []
    monkeypatch.setattr(chain, "run_script", lambda _, command: (ran.append(command), pretend(command)))
    out = tmp_path / "out"
    for resume in (False, True):
        ran.clear()
        assert chain.main(chain.Config(out=out, seed=4, pretrain_steps=9, resume=resume)) == out
        assert [command[0] for command in ran] == [
            *("train_mjx_sac.py", "convert_jax2torch.py", "gates.py", "finetune_ddpg.py"),
            *("evaluate.py",) * 5,  # the last one films
            "submit.py",
        ]
        # What is long goes on from its saved state; the others know their output.
        assert [command[0] for command in ran if "--resume" in command] == [
            "train_mjx_sac.py",
            "finetune_ddpg.py",
        ] * resume
        assert all(options[options.index("--seed") + 1] == "4" for options in ran if "--video" not in options)
        assert ran[0][ran[0].index("--total-steps") + 1] == "9"
        summary = json.loads((out / "summary.json").read_text())
        assert summary["settings"] == {"preset": "demo", "seed": 4, "pretrain_steps": 9}
        assert list(summary["seconds"]) == ["pretrain", "convert", "gates", "finetune", "evaluate", "submit"]
        assert [row["policy"] for row in summary["scores"]][::3] == ["zero torque", "fine-tuned"]
        assert summary["sdk_score"] == 0.75
        assert "fine-tuned" in capsys.readouterr().out
    assert [path.name for path in out.glob("summary*")] == ["summary.json"]


def test_numbers_that_no_stage_takes_are_refused(tmp_path):
    for wrong in ({"seed": -1}, {"pretrain_steps": 0}):
        with pytest.raises(UserError, match="need at least"):
            chain.main(chain.Config(out=tmp_path / "out", **wrong))
