"""What to do next, by thresholds on what was measured: of an evaluation, the gates, and a chain.

Each rule says what it saw, in numbers, and what to try. A rule that has nothing to say is silent; no advice at all
means that no rule applies, not that nothing can be better.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from booster_soccer.envs import constants as c

# When a rule speaks; judgements, except where a line says measured.
_MANY = 0.3  # share of episodes in which something is a habit
_FALL_EARLY_S = 3.0  # zero torque falls at 0.6 s, a policy that only stands at 1.2 s (measured)
_FAR_M = 1.0  # least distance to the ball of a robot that did not approach; it starts 2 m away at penalties
_WEAK_M_S = 3.0  # ball speed at a shot; a walking controller reaches 2.9, the shipped policy 10 (measured)
_WEAK_TO_TARGET_M_S = 0.5  # slower is better there, but an episode ends after ten seconds


@dataclass(frozen=True)
class Advice:
    """One rule that applies."""

    rule: str  # a few words
    seen: str  # what was measured
    do: str  # what to try


def of_evaluation(result: Mapping[str, Any]) -> list[Advice]:
    """Advice on a result of `evaluate.py`, task by task."""
    found = []
    for task, of_task in result["tasks"].items():
        for rule in _RULES:
            if advice := rule(of_task["results"], task):
                found.append(Advice(advice.rule, f"{task}: {advice.seen}", advice.do))
    return found


def of_gates(gates: Mapping[str, Any], dr_level: int) -> list[Advice]:
    """Advice on a result of `gates.py`; `dr_level` is the level of randomisation of the pre-training."""
    failed = [check for check in gates["checks"] if not check["passed"]]
    by_gate = {gate: [check for check in failed if check["gate"] == gate] for gate in (1, 2, 3)}
    found = [
        Advice(f"gate {gate} failed", _listed(check["name"] for check in by_gate[gate]), by_gate[gate][0]["remedy"])
        for gate in (1, 2)
        if by_gate[gate]
    ]
    if by_gate[3]:
        harder = (
            f"pre-train at --dr-level {dr_level + 1}" if dr_level < 3 else "compare the scenes (tests/test_physics.py)"
        )
        seen = _listed(check["name"] for check in by_gate[3])
        do = f"give fine-tuning more steps in the official environment (--total-steps), and {harder}"
        found.append(Advice("simulators too far apart", seen, do))
    return found


def of_chain(scores: Mapping[str, Mapping[str, Any]], verdict: Mapping[str, Any]) -> list[Advice]:
    """Advice on a chain: rows of scores by policy, and what fine-tuning ended with."""
    baseline, converted = scores["zero torque"], scores["converted"]
    if converted["ci95"][0] <= baseline["mean"] or verdict.get("result") != "start":
        return []
    seen = f"the converted policy scores {converted['mean']:+.2f}, and fine-tuning has added nothing yet"
    do = "submit it first (submit.py --checkpoint with the converted one), then train on"
    return [Advice("short of time", seen, do)]


# --- rules on the episodes of one task ----------------------------------------------------------------------

Rows = list[Mapping[str, Any]]
Rule = Callable[[Rows, str], Advice | None]


def _falls_early(rows: Rows, task: str) -> Advice | None:
    fell = [row for row in rows if row["fell"]]
    seconds = _mean(row["physics_steps"] * c.PHYSICS_DT_S for row in fell)
    if len(fell) < _MANY * len(rows) or seconds > _FALL_EARLY_S or _share(fell, _touched) > 0.5:
        return None
    return Advice(
        "falls early",
        f"{len(fell) / len(rows):.0%} fell before they had played, after {seconds:.1f} s on average",
        "train longer before anything else; if it does not pass, raise --alive and the fall penalty (--fallen)",
    )


def _does_not_approach(rows: Rows, task: str) -> Advice | None:
    away = [row for row in rows if not row["fell"] and row["ball_distance_min_m"] > _FAR_M]
    if len(away) < _MANY * len(rows):
        return None
    nearest = _mean(row["ball_distance_min_m"] for row in away)
    return Advice(
        "stands but does not approach",
        f"{len(away) / len(rows):.0%} stayed up and came no nearer to the ball than {nearest:.1f} m",
        "raise --approach against --alive, and the idle penalty (--idle); start some episodes nearer to the ball",
    )


def _touches_weakly(rows: Rows, task: str) -> Advice | None:
    speeds = [row["shot_speed_m_s"] for row in rows if row["shot_speed_m_s"] is not None]
    weak_m_s = _WEAK_TO_TARGET_M_S if task == "target" else _WEAK_M_S
    if len(speeds) < _MANY * len(rows) or np.median(speeds) >= weak_m_s:
        return None
    return Advice(
        "touches but weakly",
        f"{len(speeds) / len(rows):.0%} touched the ball, at a median speed of {np.median(speeds):.1f} m/s",
        "train on: speed comes after balance; if it does not, raise --shot against the penalties on torque and action",
    )


def _is_blocked(rows: Rows, task: str) -> Advice | None:
    blocked = [row for row in rows if "blocked" in row["ending"] and (row["shot_speed_m_s"] or 0.0) >= _WEAK_M_S]
    if len(blocked) < _MANY * len(rows):
        return None
    return Advice(
        "shoots but is blocked",
        f"{len(blocked) / len(rows):.0%} of the episodes ended with a shot at the keeper or a defender",
        "the speed is there, the aim is not: train on with a longer horizon (a higher last --discount), on more seeds",
    )


def _falls_after_the_shot(rows: Rows, task: str) -> Advice | None:
    fell = [row for row in rows if row["fell"] and _touched(row) and not row["success"]]
    if len(fell) < _MANY * len(rows):
        return None
    return Advice(
        "hits but then falls",
        f"{len(fell) / len(rows):.0%} touched the ball and then fell, without success",
        "the fall is worth it now: raise the last fall penalty (--fallen) and the last discount, and train on",
    )


_RULES: tuple[Rule, ...] = (_falls_early, _does_not_approach, _touches_weakly, _is_blocked, _falls_after_the_shot)


def _touched(row: Mapping[str, Any]) -> bool:
    return row["touches"] > 0


def _share(rows: Rows, what: Callable[[Mapping[str, Any]], bool]) -> float:
    return sum(map(what, rows)) / max(len(rows), 1)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0


def _listed(names: Iterable[str]) -> str:
    return "; ".join(names)
