"""Figures of the reports, drawn by matplotlib: axes with units, one colour one meaning, told apart in grey too."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from booster_soccer.envs import constants as c

if TYPE_CHECKING:  # as long to import as all else that a script needs, so only where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of each task: a colour, from dark to light in grey, and a line.
STYLES = {"goalie": ("#1f3f7f", "-"), "obstacle": ("#cf5f12", "--"), "target": ("#62b9a6", "-.")}
MEAN_STYLE = ("#000000", "-")
OTHER_COLOUR = "#4d4d4d"
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "|||", "++", "**")
_MOST_POINTS = 300  # of a curve: more than pixels, and the page grows
_TEXT: Any = {"svg.fonttype": "none", "svg.hashsalt": "booster_soccer", "font.family": "sans-serif", "font.size": 9}
# What the numbers of a run are measured in, by the end of their names; else none.
UNITS = {
    "score": "points",
    "success": "share",
    "fell": "share",
    "fall_rate": "share",
    "length": "actions",
    "physics_steps": "physics steps",
    "steps_per_s": "steps/s",
    "gain": "points",
    "checkpoint_s": "s",
    "memory_percent": "%",
    "utilization_percent": "%",
    "memory_utilization_percent": "%",
    "memory_gb": "GB",
    "temperature_c": "°C",
    "power_w": "W",
    "power_limit_w": "W",
    "clock_mhz": "MHz",
    "memory_clock_mhz": "MHz",
}

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


def svg(figure: "Figure") -> str:
    """A figure as an SVG element to stand in a page."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context(_TEXT):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]


def _figure(width_in: float, height_in: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def unit_of(name: str) -> str:
    """The unit of a number of a run by its name, such as `eval/score_goalie`."""
    if "reward/" in name:
        return ""
    quantity = name.rsplit("/", 1)[-1]
    for task in c.TASKS:
        quantity = quantity.removesuffix(f"_{task}")
    return UNITS.get(quantity, "")


def curves_by_task(curves: Mapping[str, Curve], title: str, mean: str | None = None) -> "Figure":
    """Curves named `<name>_<task>` over the steps, and their mean, if it is named."""
    figure = _figure(7.2, 2.9)
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        task = next((task for task in c.TASKS if name.endswith(task)), None)
        colour, line = MEAN_STYLE if task is None else STYLES[task]
        width = 2.2 if task is None else 1.4
        axes.plot(
            *_thinned(steps, values), line, color=colour, linewidth=width, label=task or mean, marker=_marker(steps)
        )
    _over_steps(axes, title, unit_of(next(iter(curves), "")))
    axes.legend(fontsize="small")
    return figure


def small_multiples(curves: Mapping[str, Curve]) -> "Figure":
    """One small plot for each curve, over the steps."""
    columns = 4
    rows = -(-len(curves) // columns)
    figure = _figure(9.6, 1.75 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, (axes, (name, (steps, values))) in enumerate(zip(grid.flat, curves.items())):
        axes.plot(*_thinned(steps, values), color=OTHER_COLOUR, linewidth=1.2, marker=_marker(steps))
        _over_steps(axes, name, unit_of(name))
        axes.title.set_fontsize(8)
        axes.tick_params(labelsize=7)
        if i + columns < len(curves):
            axes.set_xlabel("")  # there is a plot below
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    return figure


def _marker(steps: Sequence[float]) -> str:
    return "o" if len(steps) < 3 else ""


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    every = -(-len(steps) // _MOST_POINTS)
    return np.asarray(steps, float)[::every] / 1e6, np.asarray(values, float)[::every]


def _over_steps(axes: "Axes", title: str, unit: str) -> None:
    axes.set(title=title, xlabel="million steps", ylabel=unit)
    axes.grid(alpha=0.3)


def score_intervals(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Mean scores with their 95 % intervals, a line for each row with `policy`, `mean` and `ci95`."""
    figure = _figure(7.2, 0.8 + 0.32 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        axes.plot(row["ci95"], [place, place], color=OTHER_COLOUR, linewidth=3, alpha=0.5, solid_capstyle="butt")
        axes.plot(row["mean"], place, "o", color=MEAN_STYLE[0])
    axes.set_yticks(range(len(rows)), [row["policy"] for row in reversed(rows)])
    axes.axvline(0.0, color=OTHER_COLOUR, linewidth=0.8)
    axes.set(xlabel="official score, points (mean, 95 % interval)", ylim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="x", alpha=0.3)
    return figure


def terms(result: Mapping[str, Any]) -> "Figure":
    """Mean weighted terms of the score of each task, as bars that add up to it."""
    figure = _figure(9.6, 2.7)
    for axes, (task, of_task) in zip(figure.subplots(1, len(result["tasks"])), result["tasks"].items()):
        names = list(of_task["terms"])[::-1]
        axes.barh(names, [of_task["terms"][name] for name in names], color=STYLES[task][0])
        axes.axvline(0.0, color=OTHER_COLOUR, linewidth=0.8)
        axes.set(title=f"{task}: {of_task['mean']:+.2f}", xlabel="points")
        axes.tick_params(labelsize=7)
    return figure


def scores(result: Mapping[str, Any], title: str = "") -> "Figure":
    """A histogram of each task's scores, by how the episodes ended, with mean and interval."""
    from matplotlib.patches import Patch

    figure = _figure(13, 4)
    endings = sorted({name for of_task in result["tasks"].values() for name in of_task["endings"]})
    shades = np.linspace(0.25, 0.9, max(len(endings), 2))
    looks = {name: {"facecolor": str(shade), "hatch": hatch, "edgecolor": "#202020", "linewidth": 0.4}
             for name, shade, hatch in zip(endings, shades, _HATCHES * len(endings))}  # fmt: skip
    for axes, (task, of_task) in zip(figure.subplots(1, len(result["tasks"])), result["tasks"].items()):
        values = [row["score"] for row in of_task["results"]]
        bins = np.linspace(np.nanmin(values) - 0.05, np.nanmax(values) + 0.05, 31)
        bottom = np.zeros(30)
        for name in of_task["endings"]:
            counts, _ = np.histogram([row["score"] for row in of_task["results"] if row["ending"] == name], bins)
            axes.bar(bins[:-1], counts, np.diff(bins), bottom, align="edge", label=name, **looks[name])
            bottom += counts
        axes.axvspan(*of_task["ci95"], color=STYLES["obstacle"][0], alpha=0.35)
        axes.axvline(of_task["mean"], color=STYLES["obstacle"][0])
        low, high = of_task["ci95"]
        heading = f"{task}: {of_task['mean']:+.2f} ({low:+.2f} .. {high:+.2f}), n = {len(values)}"
        axes.set(title=heading, xlabel="official score, points", ylabel="episodes")
        handles = [*axes.get_legend_handles_labels()[0], Patch(color=STYLES["obstacle"][0], alpha=0.5)]
        axes.legend(handles, [*of_task["endings"], "mean, 95 % CI"], fontsize="small")
    figure.suptitle(title)
    return figure
