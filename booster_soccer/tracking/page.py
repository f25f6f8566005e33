"""Self-contained HTML pages: text, tables, figures and episodes to play, without a network or any other file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.store.atomic import OTHER_PLACE, os_errors

_GENERATOR = '<meta name="generator" content="booster_soccer">'  # marks a page of ours, which may be written again
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("booster_soccer.tracking"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; all but the first column stand right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is left out."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    table: Table | None = None
    figure: str = ""  # an SVG element
    commands: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()  # text, and where to, relative to the page
    episodes: Sequence[dict[str, Any]] = ()  # rows of an evaluation with their `path`, to be played
    is_folded: bool = False
    notes: Sequence[tuple[str, str, str]] = field(default=())  # advice: what, seen, to do


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page's text."""
    field_m = {
        "half_length": c.FIELD_HALF_LENGTH_M,
        "half_width": c.FIELD_HALF_WIDTH_M,
        "goal_half_width": c.GOAL_HALF_WIDTH_M,
        "goal_depth": c.GOAL_DEPTH_M,
        "keeper_amplitude": c.KEEPER_AMPLITUDE_M,
        "keeper_frequency_hz": c.KEEPER_FREQUENCY_HZ,
        "keeper_half_width": c.KEEPER_HALF_WIDTH_HIGH_M,
        "defender_half_width": c.DEFENDER_HALF_WIDTH_M,
        "defender_slots_y": c.DEFENDER_SLOTS_Y_M.tolist(),
        "target_radius": c.TARGET_RADIUS_M,
        "window_radius": c.WINDOW_RADIUS_M,
        "ball_radius": c.BALL_RADIUS_M,
    }
    template = _ENVIRONMENT.get_template("page.html.jinja")
    generator, safe = markupsafe.Markup(_GENERATOR), markupsafe.Markup
    return template.render(
        title=title, subtitle=subtitle, sections=sections, field=field_m, generator=generator, safe=safe
    )


def write(file: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write a page, over an older one of ours; `UserError` where something else has its name."""
    with os_errors(f"write {file}", OTHER_PLACE):
        if file.exists() and _GENERATOR not in file.read_text(errors="replace")[:1000]:
            raise UserError(f"{file} is there already and no report of ours: move it away")
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.part")
        unfinished.write_text(render(title, subtitle, sections))
        unfinished.replace(file)
    return file
