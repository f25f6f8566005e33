"""Files of results: JSON that any reader takes, also where a number is none."""

import json
import subprocess
import sys

import numpy as np
import pytest

import chain
from booster_soccer.tracking import report
from tests.test_entry import ROOT


def strict(text: str) -> dict:
    """As readers in other languages do it."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_numbers_not_finite_are_null_and_counted(tmp_path):
    content = {
        "mean": float("nan"),
        "tasks": {"goalie": [1.0, np.float32("inf")], "x": np.array([np.nan, 2.0])},
        "n": 3,
    }
    report.write_json(content, tmp_path / "x.json")
    assert strict((tmp_path / "x.json").read_text()) == {
        "mean": None, "tasks": {"goalie": [1.0, None], "x": [None, 2.0]}, "n": 3, "not_finite": 3,
    }  # fmt: skip
    report.write_json({"mean": 1.5}, tmp_path / "y.json")
    assert strict((tmp_path / "y.json").read_text()) == {"mean": 1.5}


def test_the_chain_reads_a_null_and_writes_none_but_nulls(tmp_path, monkeypatch, capsys):
    from tests.test_chain import pretend

    def with_nulls(_, command):
        pretend(command)
        if "--json" in command and command[0] == "evaluate.py":
            file = chain.Path(command[command.index("--json") + 1])
            file.write_text(file.read_text().replace("0.5", "null").replace("0.25", "null"))

    monkeypatch.setattr(chain, "run_script", with_nulls)
    chain.main(chain.Config(out=tmp_path / "out"))
    summary = strict((tmp_path / "out" / "summary.json").read_text())
    assert summary["scores"][0]["mean"] is None and summary["not_finite"] > 0
    assert "+nan" in capsys.readouterr().out


def test_mujoco_leaves_no_log_where_a_script_runs(tmp_path):
    """Of a broken state, in the official environment and in the twin's physics."""
    program = """
import numpy as np
from booster_soccer.envs import official
env = official.make("goalie")
env.reset(seed=0)
env.unwrapped.sim.data._data.qvel[:] = 1e20
env.step(np.zeros(12))
print("stepped")
"""
    environment = {"PYTHONPATH": str(ROOT), "MUJOCO_GL": "disable", "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert done.stdout == "stepped\n", done.stderr
    assert list(tmp_path.iterdir()) == []
