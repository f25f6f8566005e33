"""Command lines of the scripts: a preset's whole configuration as the defaults, and errors in one line."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import tyro

from booster_soccer.errors import UserError

Config = TypeVar("Config")


def parse(presets: Mapping[str, Config], description: str, default: str) -> Config:
    """The configuration of `--preset`, changed by the other options; `--help` shows that preset's values.

    `--preset-file FILE` gives options by name in a JSON file, `preset` among them; those of the command line win.
    """
    arguments = sys.argv[1:]
    if (file := _value(arguments, "--preset-file")) is not None:
        arguments = _from_file(file) + _without(arguments, "--preset-file")
    name = _value(arguments, "--preset")
    if name is None:
        name = default
    if name not in presets:
        raise UserError(f"--preset {name} is unknown: use one of {', '.join(presets)}")
    chosen = presets[name]
    shown = f"{description}\n\n--preset-file FILE takes options from a JSON file, as tune_sac.py writes it."
    return tyro.cli(
        type(chosen), default=chosen, args=arguments, description=shown, config=(tyro.conf.OmitArgPrefixes,)
    )


def _value(arguments: list[str], option: str) -> str | None:
    """What the last use of an option says; empty if it lacks its value, None where it is not given."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == option:
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _without(arguments: list[str], option: str) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        skip = argument == option and not skip
    return kept


def _from_file(file: str) -> list[str]:
    """The words that a preset file stands for."""
    try:
        content = json.loads(Path(file).read_text())
        if not isinstance(content, dict):
            raise ValueError
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--preset-file {file!r} is no JSON object of options: give what tune_sac.py wrote") from error
    words = []
    for name, value in content.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return words
