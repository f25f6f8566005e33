"""Who may import whom, where import-linter (pyproject.toml) does not look: the scripts, and what runs at import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
PYTORCH_SCRIPTS = ("finetune_ddpg", "submit", "evaluate", "play")
# Worker processes import theirs without the script that started them. These are of the stage in JAX.
JAX_ROLLOUT = {"collect", "device_replay", "engines", "episode"}
ROLLOUT = {path.stem for path in (ROOT / "booster_soccer/rollout").glob("*.py")} - {"__init__"}


def imported(source: str) -> set[str]:
    """Top-level names of all that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b, c\nfrom d.e import f\ndef g():\n    from h import i\n    import j as k\n"
    assert imported(source) == {"a", "c", "d", "h", "j"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_a_script(script):
    others = imported((ROOT / f"{script}.py").read_text()) & set(SCRIPTS) - {script}
    assert not others, f"move what {script}.py takes from {sorted(others)} into booster_soccer/"


def test_every_script_is_named_in_the_contract_of_the_library():
    contracts = (ROOT / "pyproject.toml").read_text().split('id = "scripts"')[1].split("[[")[0]
    assert [script for script in SCRIPTS if f'"{script}"' not in contracts] == []


def test_pytorch_stages_and_their_workers_never_import_jax():
    """Really imported, one after the other: what a third-party package brings counts as well."""
    modules = [*PYTORCH_SCRIPTS, *(f"booster_soccer.rollout.{name}" for name in sorted(ROLLOUT - JAX_ROLLOUT))]
    program = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    found = {'jax', 'flax', 'optax'} & set(sys.modules)\n"
        "    assert not found, f'{name} imports {sorted(found)}'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_files_and_functions_stay_short_enough_to_read():
    """Habits: a file has at most 450 lines, a function at most 60."""
    places = (".", "booster_soccer", "booster_soccer/*", "benchmarks", "cloud")
    sources = {path: path.read_text() for place in places for path in ROOT.glob(f"{place}/*.py")}
    assert len(sources) > 100
    long = [str(path) for path, source in sources.items() if source.count("\n") > 450]
    for path, source in sources.items():
        functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
        long += [f"{path}:{node.name}" for node in functions if node.end_lineno - node.lineno + 1 > 60]
    assert long == []
