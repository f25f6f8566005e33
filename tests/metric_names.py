"""Holds the names that a run logged against the table of docs/metrics.md."""

import dataclasses
import json
import re
from pathlib import Path

from booster_soccer.envs import constants as c
from booster_soccer.rewards.dense import DenseWeights

_TABLE = Path(__file__).parents[1] / "docs" / "metrics.md"
_VALUES = {"<task>": c.TASKS, "<term>": tuple(field.name for field in dataclasses.fields(DenseWeights))}
_MACHINE, _SOMETIMES = "gpu/", " only"  # where there is a GPU; what the table says is there with some settings only


def documented(stage: str) -> dict[str, tuple[re.Pattern, bool]]:
    """Name -> its pattern, and whether every run of the stage logs it."""
    found = {}
    for line in _TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and stage in cells[1].split(", "):
            for name in re.findall(r"`([^`]+)`", cells[0]):
                pattern = re.escape(name)
                for placeholder, values in _VALUES.items():
                    pattern = pattern.replace(placeholder, f"({'|'.join(values)})")
                always = not name.startswith((_MACHINE, "result/")) and _SOMETIMES not in cells[2]
                found[name] = re.compile(pattern), always
    return found


def check(metrics: Path, stage: str) -> None:
    """Fail unless a run's metrics file has the documented names and no others."""
    logged = {name for line in metrics.read_text().splitlines() for name in json.loads(line)}
    table = documented(stage)
    unknown = {name for name in logged if not any(pattern.fullmatch(name) for pattern, _ in table.values())}
    missing = {name for name, (pattern, always) in table.items() if always and not any(map(pattern.fullmatch, logged))}
    assert not unknown and not missing, f"docs/metrics.md lacks {sorted(unknown)}; no run logs {sorted(missing)}"
