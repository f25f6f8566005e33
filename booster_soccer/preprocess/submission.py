"""The preprocessor class as it is submitted: self-contained, `np` its only name.

The platform takes this class's source with `inspect.getsource`, removes import lines and runs it alone
with only `np` (and `env`, which we do not use) in scope. So nothing outside the class body may be named,
and the arithmetic of `preprocess/observation.py` is repeated here; `tests/test_preprocess.py` holds the
two together.
"""

import numpy as np


class Preprocessor:
    """Official `obs` and `info` to the policy's (B, 87) float32, for any batch size or none.

    What lacks a number or has another shape is refused with a `ValueError`; NaN stays in its own row.
    """

    def modify_state(self, obs, info):
        joints = 12
        try:
            obs = np.asarray(obs, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("obs is no array of numbers") from None
        if obs.ndim == 0 or obs.shape[-1] < 2 * joints:
            raise ValueError(f"obs has shape {obs.shape}, not (batch, {2 * joints} joint numbers and more)")
        obs = obs.reshape(-1, obs.shape[-1])
        batch = obs.shape[0]

        def get(name, width):
            try:
                value = np.asarray(info[name], dtype=np.float64)
            except (KeyError, TypeError, ValueError, OverflowError):
                raise ValueError(f"info[{name!r}] is missing, or no array of numbers") from None
            if value.shape[-1:] != (width,) or value.size not in (width, batch * width):
                raise ValueError(f"info[{name!r}] has shape {value.shape}, not ({batch}, {width})")
            return np.broadcast_to(value.reshape(-1, width), (batch, width))

        x, y, z, w = get("robot_quat", 4).T
        cos, sin = (w - z) * (w + z) + (x - y) * (x + y), 2 * (w * z + x * y)
        norm = np.maximum(np.sqrt(cos * cos + sin * sin), 1e-9)
        cos, sin = cos / norm, sin / norm

        def heading(v):
            return np.stack([cos * v[:, 0] + sin * v[:, 1], cos * v[:, 1] - sin * v[:, 0], v[:, 2]], axis=-1)

        team_0, team_1 = get("player_team", 2)[:, :1], get("player_team", 2)[:, 1:]

        def attacked_and_own(prefix, suffix):
            of_0, of_1 = get(prefix + "0" + suffix, 3), get(prefix + "1" + suffix, 3)
            return heading(team_0 * of_0 + team_1 * of_1), heading(team_0 * of_1 + team_1 * of_0)

        goal_robot = attacked_and_own("goal_team_", "_rel_robot")
        goal_ball = attacked_and_own("goal_team_", "_rel_ball")
        keeper_pos = attacked_and_own("goalkeeper_team_", "_xpos_rel_robot")
        keeper_vel = attacked_and_own("goalkeeper_team_", "_velp_rel_robot")
        robot_pos_w = -0.5 * (get("goal_team_0_rel_robot", 3) + get("goal_team_1_rel_robot", 3))
        defenders = get("defender_xpos", 9)
        parts = [
            obs[:, : 2 * joints],
            np.stack([2 * (w * y - x * z), -2 * (y * z + w * x), 2 * (x * x + y * y) - 1], axis=-1),
            get("robot_gyro", 3),
            np.clip(get("robot_accelerometer", 3), -50.0, 50.0),
            get("robot_velocimeter", 3),
            *goal_robot,
            *goal_ball,
            heading(get("ball_xpos_rel_robot", 3)),
            heading(get("ball_velp_rel_robot", 3)),
            heading(get("ball_velr_rel_robot", 3)),
            *(vector for pair in zip(keeper_pos, keeper_vel) for vector in pair),
            heading(get("target_xpos_rel_robot", 3)),
            heading(get("target_velp_rel_robot", 3)),
            *(heading(defenders[:, 3 * i : 3 * i + 3] - robot_pos_w) for i in range(3)),
            get("task_index", 3),
        ]
        return np.concatenate(parts, axis=-1).astype(np.float32)
