"""A plain install: one top-level name, its data files, and a user's own modules beside it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(path.stem for path in (ROOT / "booster_soccer").iterdir() if not path.name.startswith("__"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder into which the package is installed, not as a link; built from a copy, for building writes beside it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "booster_soccer", source / "booster_soccer", ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-compile", "--no-index", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *flags, str(source)]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return site


def test_one_name_is_installed(site):
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"booster_soccer", "booster_t1_football"}
    assert [path.name for path in site.glob("booster_t1_football-*")] != []
    assert next(site.glob("*.dist-info/**/LICENSE")).read_text().startswith("MIT License")


def test_every_module_and_the_scene_are_installed(site):
    def names(package: Path) -> set[str]:
        kept = {path for path in package.rglob("*") if path.is_file() and path.suffix in (".py", ".xml")}
        return {str(path.relative_to(package)) for path in kept}

    assert names(site / "booster_soccer") == names(ROOT / "booster_soccer")


def test_a_users_own_modules_do_not_shadow_ours(site, tmp_path):
    """In a folder with the user's own `models.py`, `envs.py`, `errors.py`: the scene loads, from the install."""
    for name in {"models", *ROOMS}:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user own {name}.py was imported')\n")
    program = (
        "import booster_soccer\n"
        "from booster_soccer.envs.scene import load_mjx_model\n"
        "from booster_soccer.store import checkpoints\n"
        "print(booster_soccer.__file__, load_mjx_model().nu)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [str(site / "booster_soccer/__init__.py"), "12"]
