"""Command lines: `--preset` gives the defaults, `--help` shows them, the other options change them."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Literal

import pytest

import finetune_ddpg
import train_mjx_sac
from booster_soccer import cli, errors


@dataclasses.dataclass(frozen=True)
class Learner:
    discount: float = 0.5
    layers: tuple[int, int] = (8, 8)


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path  # where to
    preset: str
    engine: Literal["native", "mjx"] = "native"
    total_steps: int = 1000
    learner: Learner = Learner()
    resume: bool = False
    init: Path | None = None


CPU = Config(Path("runs/cpu"), "cpu")
PRESETS = {
    "demo": dataclasses.replace(CPU, out=Path("runs/demo"), preset="demo", total_steps=37, learner=Learner(0.25)),
    "cpu": CPU,
    "l4": dataclasses.replace(CPU, out=Path("runs/l4"), preset="l4", engine="mjx"),
}


@pytest.fixture
def parse(monkeypatch):
    def call(*arguments: str) -> Config:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        return cli.parse(PRESETS, "What the script does.", "cpu")

    return call


def test_a_preset_is_the_whole_default(parse):
    assert parse() == CPU
    for name in PRESETS:
        assert parse("--preset", name) == parse(f"--preset={name}") == PRESETS[name]
    assert parse("--preset", "demo", "--preset", "l4") == PRESETS["l4"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_the_other_options_win_over_the_preset_wherever_they_stand(parse, where):
    options = ["--total-steps", "5", "--engine", "mjx", "--resume", "--init", "a/b"]
    config = parse(*(["--preset", "demo", *options] if where == "after" else [*options, "--preset", "demo"]))
    assert config == dataclasses.replace(PRESETS["demo"], total_steps=5, engine="mjx", resume=True, init=Path("a/b"))
    assert parse("--total-steps", "5", "--total-steps", "6").total_steps == 6


def test_a_preset_file_gives_options_and_the_command_line_wins(parse, tmp_path):
    file = tmp_path / "best.json"
    file.write_text('{"preset": "demo", "discount": 0.75, "layers": [4, 2], "resume": true, "total_steps": 5}')
    config = dataclasses.replace(PRESETS["demo"], learner=Learner(0.75, (4, 2)), resume=True, total_steps=5)
    assert parse("--preset-file", str(file)) == parse(f"--preset-file={file}") == config
    assert parse("--total-steps", "6", "--preset-file", str(file)).total_steps == 6
    assert parse("--preset-file", str(file), "--preset", "l4").engine == "mjx"
    file.write_text('{"discount": 0.75}')
    assert parse("--preset-file", str(file)) == dataclasses.replace(CPU, learner=Learner(0.75))


def test_a_preset_file_that_is_none_is_one_line(parse, tmp_path, capsys):
    file = tmp_path / "best.json"
    for wrong in ("[1]", "no JSON"):
        file.write_text(wrong)
        with pytest.raises(errors.UserError, match="--preset-file .* is no JSON object of options"):
            parse("--preset-file", str(file))
    for absent in ([str(tmp_path / "none")], []):
        with pytest.raises(errors.UserError, match="--preset-file .* is no JSON object of options"):
            parse("--preset-file", *absent)
    file.write_text('{"discounts": 0.75}')
    with pytest.raises(SystemExit) as ended:
        parse("--preset-file", str(file))
    assert ended.value.code == 2 and "--discounts" in capsys.readouterr().err


def test_nested_options_are_flat(parse):
    changed = parse("--preset", "demo", "--layers", "4", "2")
    assert changed.learner == Learner(0.25, (4, 2))
    assert parse("--discount", "0.75").learner == Learner(0.75)


def test_help_shows_the_values_of_the_preset(parse, capsys):
    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            parse(*arguments)
        assert ended.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    demo = shown("--preset", "demo", "--help")
    assert "What the script does." in demo and "where to" in demo
    for value in ("runs/demo", "37", "0.25"):
        assert f"default: {value}" in demo
    assert "--discount" in demo and "--learner" not in demo
    assert "default: runs/cpu" in shown("--help") and "default: 1000" in shown("--help", "--preset", "l4")


@pytest.mark.parametrize("arguments", [["--preset", "h100"], ["--preset=h100"], ["--preset=h100", "--help"]])
def test_an_unknown_preset_is_one_line(parse, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        errors.run(parse, *arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --preset h100 is unknown: use one of demo, cpu, l4\n"


def test_a_preset_without_a_name_is_one_line(parse):
    with pytest.raises(errors.UserError, match="--preset .*: use one of demo, cpu, l4"):
        parse("--preset")


def test_a_wrong_option_or_value_ends_with_status_2(parse, capsys):
    for wrong in (["--total-stepz", "5"], ["--total-steps", "many"], ["--engine", "warp"]):
        with pytest.raises(SystemExit) as ended:
            parse(*wrong)
        assert ended.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def leaves(config) -> dict[str, object]:
    """Every setting of a configuration by the name of its option."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= leaves(value) if dataclasses.is_dataclass(value) else {field.name.replace("_", "-"): value}
    return found


@pytest.mark.parametrize(
    ("script", "preset"), [*(("train_mjx_sac", name) for name in train_mjx_sac.PRESETS),
                           *(("finetune_ddpg", name) for name in finetune_ddpg.PRESETS)]
)  # fmt: skip
def test_help_of_a_training_script_shows_what_it_does_and_every_default(script, preset, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--preset", preset, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parent.parent / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())
    module = sys.modules[script]
    description, options = shown.split("-h, --help")
    assert " ".join(module.__doc__.split()) in description
    for name, value in leaves(module.PRESETS[preset]).items():
        default = re.search(rf"--{name}[, ](.*?)\(default: ?(.*?)\)", options)
        words = value if isinstance(value, tuple) else (value,)
        assert default and default[2] == " ".join(map(str, words)), name
        meaning = re.sub(r"--no-\S+|\{.*?\}|\[.*?\]|\b[A-Z]+\b", " ", default[1])
        assert re.search(r"[a-z]{2}", meaning), f"--{name} says nothing"
