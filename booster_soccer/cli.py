"""Command lines of the scripts: a preset's whole configuration as the defaults, and errors in one line."""

import sys
from collections.abc import Mapping
from typing import TypeVar

import tyro

from booster_soccer.errors import UserError

Config = TypeVar("Config")


def parse(presets: Mapping[str, Config], description: str, default: str) -> Config:
    """The configuration of `--preset`, changed by the other options; `--help` shows that preset's values."""
    arguments = sys.argv[1:]
    name = default
    for position, argument in enumerate(arguments):
        if argument == "--preset":
            name = arguments[position + 1] if position + 1 < len(arguments) else ""
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    if name not in presets:
        raise UserError(f"--preset {name} is unknown: use one of {', '.join(presets)}")
    chosen = presets[name]
    return tyro.cli(type(chosen), default=chosen, description=description, config=(tyro.conf.OmitArgPrefixes,))
