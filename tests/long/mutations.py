"""Bytes, JSON, tables of arrays and official `info` as they should not be, drawn at random from good ones."""

import random
from typing import Any

import numpy as np

# Width of each entry that the observation reads.
INFO = {
    "robot_quat": 4,
    "robot_gyro": 3,
    "robot_accelerometer": 3,
    "robot_velocimeter": 3,
    "goal_team_0_rel_robot": 3,
    "goal_team_1_rel_robot": 3,
    "goal_team_0_rel_ball": 3,
    "goal_team_1_rel_ball": 3,
    "ball_xpos_rel_robot": 3,
    "ball_velp_rel_robot": 3,
    "ball_velr_rel_robot": 3,
    "player_team": 2,
    "goalkeeper_team_0_xpos_rel_robot": 3,
    "goalkeeper_team_0_velp_rel_robot": 3,
    "goalkeeper_team_1_xpos_rel_robot": 3,
    "goalkeeper_team_1_velp_rel_robot": 3,
    "target_xpos_rel_robot": 3,
    "target_velp_rel_robot": 3,
    "defender_xpos": 9,
    "task_index": 3,
}


def other_bytes(rng: random.Random, content: bytes) -> bytes:
    """Changed content: flips, cuts, insertions, zeros."""
    at, length = rng.randrange(min(len(content), rng.choice([400, len(content)])) + 1), rng.randint(1, 64)
    before, after = content[:at], content[at:]
    flipped = bytes(byte ^ rng.choice([0, 1 << rng.randrange(8)]) for byte in after[:4]) + after[4:]
    return rng.choice([before + flipped, before + flipped, before, before + rng.randbytes(length) + after,
                       before + after[length:], before + bytes(length) + after, b"", content * 2])  # fmt: skip


def other_value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that JSON can hold, hostile ones included."""
    simple = [None, True, 0, -1, 2**63, 10**400, 1e308, "", "x", "../../etc/passwd", "/etc/passwd", "a\nb", "\ud800",
              "pretrained", "arrays.safetensors/../x", "x" * 5000, "__import__('os')", [], {}]  # fmt: skip
    kind = rng.random()
    if depth < 3 and kind < 0.1:
        return [other_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if depth < 3 and kind < 0.2:
        return {str(other_value(rng, 3))[:20]: other_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return rng.choice(simple)


def change_somewhere(rng: random.Random, node: Any) -> None:
    """Replace, delete or add one entry of nested dictionaries and lists, in place."""
    while True:
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not (isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.6):
            break
        node = node[key]
    kind = rng.random()
    if kind < 0.25:
        del node[key]
    elif kind < 0.5 and isinstance(node, dict):
        node[str(other_value(rng, 3))[:40]] = other_value(rng)
    else:
        node[key] = other_value(rng)


def other_table(rng: random.Random, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of which one is missing, new, or of another type, shape or content."""
    table = dict(table)
    name = rng.choice(sorted(table)) if table else "new"
    value = table.get(name, np.zeros(3))
    with np.errstate(all="ignore"):
        number = np.array(rng.choice([2**62, -(2**62), rng.randint(-1000, 1000)])).astype(value.dtype)
        retyped = value.astype(rng.choice([np.float64, np.float32, np.int8, np.int64, np.uint64, bool]))
    kind = rng.random()
    if kind < 0.1:
        table.pop(name, None)
    elif kind < 0.2:
        table[rng.choice(["new", "../x", name + ".0", "a.b.c.d", ""])] = value
    else:
        full = np.full(value.shape, number)
        table[name] = rng.choice([retyped, full, full, full, rng.choice([np.stack([value, value]), value[..., None]]),
                                  value.ravel()[: rng.randint(0, value.size)],
                                  np.zeros((0, *value.shape[1:]), value.dtype)])  # fmt: skip
    return table


def official_like(rng: np.random.Generator, batch: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An `obs` (B, 45) and an `info` of official names and widths, random; unbatched if None."""
    lead = () if batch is None else (batch,)
    info = {name: rng.normal(size=(*lead, width)).astype(np.float32) for name, width in INFO.items()}
    info["robot_quat"] /= np.linalg.norm(info["robot_quat"], axis=-1, keepdims=True)
    info["player_team"] = np.zeros((*lead, 2)) + [1.0, 0.0]
    return rng.normal(size=(*lead, 45)), info


def other_array(rng: random.Random, value: np.ndarray) -> Any:
    """One entry of an `info` with another type, shape or content."""
    with np.errstate(all="ignore"):
        retyped = value.astype(rng.choice([np.float64, np.float32, np.float16, np.int64, np.int8, bool]))
    broken = np.array(value, np.float64)
    broken[tuple(map(rng.randrange, value.shape))] = rng.choice([np.nan, np.inf, -np.inf, 1e308, -1e-320])
    kinds = [
        [retyped], [retyped], [broken], [broken],
        [value[..., :-1]], [np.concatenate([value, value], axis=-1)], [value.T.copy(), value[..., ::-1].T],
        [value.ravel()], [value[None], value[..., None]], [np.stack([value] * rng.randint(1, 4)), value[:1]],
        [None], ["", "x", b"x", "nan", "__import__('os')"], [value.tolist(), [value.tolist(), [1]]], [{"a": 1}],
        [np.full(value.shape, rng.choice([None, "x", {}]), object)],
        [0, 1.5, np.nan, np.float32(2), 10**400, True],
    ]  # fmt: skip
    return rng.choice(rng.choice(kinds))
