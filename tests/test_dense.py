"""The dense terms and the critics' additional inputs by hand, from one body in NumPy and in JAX."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs.situation import Events, Memory, Situation
from booster_soccer.preprocess.privileged import TABLE, privileged
from booster_soccer.rewards import dense

SLOTS = c.DEFENDER_SLOTS_Y_M
TARGET_W = {
    "goalie": [0.0, 0.0, 0.0],
    "obstacle": [-c.FIELD_HALF_LENGTH_M, SLOTS[3], 1.2],
    "target": [4.0, 0.0, 0.0],
}
NOTHING = Events(*[np.array(False)] * 5)


@pytest.fixture(params=[np, jnp], ids=["numpy", "jax"])
def xp(request):
    return request.param


def situation(
    xp, task="goalie", ball=(0, 0), ball_vel=(0, 0, 0), robot=(-2, 0), yaw=0.0, action_count=1, **changes
) -> Situation:
    values = {
        "joint_pos_rad": c.DEFAULT_POSE_RAD,
        "joint_vel_rad_s": np.zeros(12),
        "imu_pos_w": [*robot, 0.65],
        "imu_quat_wxyz": [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)],
        "gyro_b": np.zeros(3),
        "velocimeter_b": np.zeros(3),
        "ball_site_pos_w": [*ball, 0.0],
        "ball_center_pos_w": [*ball, c.BALL_RADIUS_M],
        "ball_center_vel_w": ball_vel,
        "target_pos_w": TARGET_W[task],
        "defender_pos_w": [[-c.FIELD_HALF_LENGTH_M, y, 0.6] for y in SLOTS[:3]],
    }
    values = {name: xp.asarray(value, dtype=float) for name, value in (values | changes).items()}
    whole = {"task": xp.asarray(c.TASKS.index(task)), "action_count": xp.asarray(action_count)}
    return Situation(**values, **whole)


def remembered(xp, **changes) -> Memory:
    return Memory.start((), xp)._replace(**{name: xp.asarray(value, dtype=float) for name, value in changes.items()})


def terms(xp, s: Situation, before=None, after=None, action=0.0, **events) -> dict[str, float]:
    before, after = (remembered(xp, **(changes or {})) for changes in (before, after))
    events = NOTHING._replace(**{name: np.array(value) for name, value in events.items()})
    events = Events(*map(xp.asarray, events))
    raw = dense.dense_terms(s, before, after, events, xp.full(12, action), xp)
    return {name: float(value) for name, value in raw.items()}


def test_every_term_has_a_weight_that_switches_it(xp):
    raw = terms(xp, situation(xp), {"shot_value": 1.0}, {"shot_value": 3.0})
    assert set(raw) == {field.name for field in fields(dense.DenseWeights)}
    weights = dense.DenseWeights(**dict.fromkeys(raw, 0.0) | {"shot": 2.0, "alive": 0.5})
    assert dense.dense_reward(raw, weights) == pytest.approx(2.0 * 2.0 + 0.5)
    ones, weights = dict.fromkeys(raw, 1.0), dense.DenseWeights(**{name: 2.0**i for i, name in enumerate(raw)})
    for name, value in vars(weights).items():
        off = replace(weights, **{name: 0.0})
        assert dense.dense_reward(ones, off) == dense.dense_reward(ones, weights) - value


def test_pre_training_does_not_pay_for_idling():
    assert dense.DenseWeights().idle == 0.0


def test_shot_is_the_change_of_value(xp):
    assert terms(xp, situation(xp), {"shot_value": 1.5}, {"shot_value": 4.0})["shot"] == pytest.approx(2.5)


def test_approach_pays_new_ground_only_and_a_constant_while_a_penalty_is_under_way(xp):
    def approach(before, now, task="goalie", shot=0.0, **changes):
        before, after = {"nearest_approach_m": before}, {"nearest_approach_m": now, "shot_value": shot}
        return terms(xp, situation(xp, task, **changes), before, after)["approach"]

    assert approach(2.0, 1.99) == pytest.approx(0.5, abs=1e-4)  # 10 mm in 20 ms
    assert approach(2.0, 1.9) == 1.0 and approach(2.0, 2.0) == 0.0
    assert approach(-1.0, 2.0) == 0.0  # first action
    assert approach(2.0, 2.0, ball_vel=(0.31, 0, 0), shot=0.1) == 0.5
    assert approach(2.0, 2.0, ball_vel=(0.31, 0, 0), shot=-0.1) == 0.0
    assert approach(2.0, 2.0, ball_vel=(0.29, 0, 0), shot=0.1) == 0.0
    assert approach(2.0, 2.0, "target", ball_vel=(0.31, 0, 0), shot=0.1) == 0.0


def test_dribbling_pays_new_ground_of_the_ball_and_following_it_in_the_target_task_only(xp):
    def dribble_follow(task, before, now, robot=(-2, 0)):
        raw = terms(xp, situation(xp, task, robot=robot), {"nearest_aim_m": before}, {"nearest_aim_m": now})
        return raw["dribble"], raw["follow"]

    assert dribble_follow("target", 2.0, 1.99) == pytest.approx((0.5, np.exp(-2.0)), abs=1e-4)  # 10 mm, 2 m behind
    assert dribble_follow("target", 2.0, 1.9)[0] == 1.0 and dribble_follow("target", 2.0, 2.0)[0] == 0.0
    assert dribble_follow("target", -1.0, 2.0)[0] == 0.0  # first action
    beside = dribble_follow("target", 2.0, 2.0, robot=(0, 0.5))[1]
    assert beside == pytest.approx(np.exp(-0.5 - 1.2), abs=1e-4)
    assert dribble_follow("goalie", 2.0, 1.99) == (0.0, 0.0)


def test_memory_keeps_the_least_distances_the_action_and_the_balls_value(xp):
    s = situation(xp, "target", robot=(-1.5, 0), ball_vel=(1.2, 0, 0))
    for before, nearest in ((-1.0, 1.5), (2.0, 1.5), (1.0, 1.0)):
        memory = dense.next_memory(s, remembered(xp, nearest_approach_m=before), xp.full(12, 0.3), xp)
        assert float(memory.nearest_approach_m) == pytest.approx(nearest, abs=1e-4)
        assert float(memory.nearest_aim_m) == pytest.approx(4.0)
        assert float(memory.shot_value) == float(dense.shot_value(s, xp)) > 1.0
        np.testing.assert_allclose(memory.prev_action, 0.3, rtol=1e-6)


def test_the_kicking_position_is_behind_the_ball(xp):
    def distance(x, y):
        return float(dense.approach_distance_m(situation(xp, "target", robot=(x, y)), xp))

    assert distance(-1.0, 0.0) == pytest.approx(1.0, abs=1e-4)
    assert distance(0.0, 1.0) == pytest.approx(1.0 + 1.2, abs=1e-4)
    assert distance(1.0, 0.0) == pytest.approx(1.0 + 2.4, abs=1e-4)


def test_posture_terms_by_hand(xp):
    rolled = {"imu_quat_wxyz": [np.cos(0.15), np.sin(0.15), 0, 0], "gyro_b": [0.3, 0.4, 9.0]}
    raw = terms(xp, situation(xp, joint_vel_rad_s=np.full(12, 2.0), **rolled))
    assert raw["tilt"] == pytest.approx(np.sin(0.3) ** 2, rel=1e-5)
    assert raw["trunk_angvel"] == pytest.approx(0.25) and raw["joint_vel"] == pytest.approx(48.0)
    raw = terms(xp, situation(xp), {"prev_action": np.full(12, -0.1)}, action=0.1, fallen=True)
    assert raw["tilt"] == 0 and raw["trunk_angvel"] == 0 and raw["alive"] == 1 and raw["fallen"] == 1
    assert raw["action_rate"] == pytest.approx(12 * 0.04)
    torque = c.KP_NM_PER_RAD * 0.1 * c.ACTION_SCALE_RAD / c.TORQUE_LIMIT_NM
    assert raw["torque"] == pytest.approx(np.sum(torque**2), rel=1e-5)


def test_ball_done_is_an_end_without_a_fall_or_a_lost_ball(xp):
    def ball_done(task="goalie", **events):
        return terms(xp, situation(xp, task), **events)["ball_done"]

    assert ball_done() == 0.0
    assert ball_done(success=True) == ball_done(out_of_field=True) == ball_done(blocked=True) == 1.0
    assert ball_done("target", out_of_field=True) == 0.0 and ball_done("target", success=True) == 1.0
    assert ball_done(fallen=True) == ball_done(diverged=True) == ball_done(fallen=True, success=True) == 0.0


def test_facing(xp):
    assert terms(xp, situation(xp))["face_ball"] == pytest.approx(1.0)
    assert terms(xp, situation(xp, yaw=np.pi / 2))["face_ball"] == pytest.approx(0.0, abs=1e-6)


def test_idle_means_that_nothing_moves(xp):
    assert terms(xp, situation(xp))["idle"] == 1.0
    assert terms(xp, situation(xp, velocimeter_b=[0.0, 0.09, 0.0]))["idle"] == 1.0
    assert terms(xp, situation(xp, velocimeter_b=[0.0, 0.11, 0.0]))["idle"] == 0.0
    assert terms(xp, situation(xp, ball_vel=(0, 0.31, 0)))["idle"] == 0.0


def test_target_value_rewards_direction(xp):
    """On target: near the 8.1 points of a sure hit; across: little; still: zero."""

    def value(velocity):
        return float(dense.shot_value(situation(xp, "target", ball_vel=(*velocity, 0), action_count=0), xp))

    assert value((0, 0)) == 0
    assert value((1.2, 0)) == pytest.approx(3 * (2.0 + 0.7), abs=0.05)
    by_angle = [value((1.2 * np.cos(a), 1.2 * np.sin(a))) for a in (0.0, 0.25, 0.8, 3.0)]
    assert by_angle == sorted(by_angle, reverse=True) and len(set(by_angle)) == 4


def test_target_value_knows_when_the_ball_is_lost_or_late(xp):
    """Backwards at 1.2 m/s from the centre the line at 10.97 m is 9.1 s away."""

    def value(speed, actions):
        s = situation(xp, "target", ball_vel=(speed, 0, 0), action_count=actions)
        return float(dense.shot_value(s, xp))

    assert value(-1.2, 200) == pytest.approx(0.0, abs=0.05)  # 6 s left: still in the field
    assert value(-2.4, 200) == pytest.approx(-3.0, abs=0.05)  # 4.6 s to the line
    assert value(1.2, 450) == pytest.approx(3 * 0.7, abs=0.1)  # 1 s left, 3.3 s to the target


def test_goalie_value_rewards_speed_and_the_free_side(xp):
    """At 2.5 s after the start the keeper is at y = sin(2 pi 0.3 2.5) = -1.0 m: the middle and the left are free."""

    def value(velocity):  # after 2 s; the ball needs 0.5 s
        s = situation(xp, ball=(-8.77, 0), ball_vel=(*velocity, 0), action_count=100)
        return float(dense.shot_value(s, xp))

    toward = 2 * (10.97 - 8.77 - c.BALL_RADIUS_M)  # above the 3.3 m/s at which the end counts in full
    assert value((-toward, 0.5)) - 1.5 * toward == pytest.approx(2.5, abs=0.15)  # past the keeper
    into_its_hands = -0.5 - 0.2 * 1.5 * toward  # a fifth slower
    assert value((-toward, -2.0)) - 1.5 * toward == pytest.approx(into_its_hands, abs=0.1)
    assert value((-toward, 6.0)) - 1.5 * toward == pytest.approx(-3.0, abs=0.1)  # wide
    assert value((-2 * toward, 6.0)) > value((-toward, 6.0))


def test_a_weak_kick_is_never_worse_than_none(xp):
    """Straight at the raised window a rolling ball ends at -3, yet any faster ball is worth more."""
    wall = {"target_pos_w": [-c.FIELD_HALF_LENGTH_M, 0, 1.2], "defender_pos_w": [[0, y, 0] for y in (-1.5, 1.5, 1.5)]}
    values = [
        float(dense.shot_value(situation(xp, "obstacle", ball=(-8.77, 0), ball_vel=(-speed, 0, 0), **wall), xp))
        for speed in np.arange(0.0, 5.0, 0.25)
    ]
    assert np.all(np.diff(values) > 0)


def test_obstacle_value_prefers_a_defender_to_the_gap_for_a_rolling_ball(xp):
    toward = 2 * (10.97 - 8.77 - c.BALL_RADIUS_M)  # 0.5 s

    def value(y, vz=0.0):
        s = situation(xp, "obstacle", ball=(-8.77, 0), ball_vel=(-toward, 2 * y, vz))
        return float(dense.shot_value(s, xp)) - 1.5 * toward

    _, window_y, window_z = TARGET_W["obstacle"]
    assert value(SLOTS[0]) == pytest.approx(-0.5 - 0.2 * 1.5 * toward, abs=0.2)
    assert value(window_y) < -2.0
    rise = 2 * (window_z - c.BALL_RADIUS_M) + 0.25 * 9.81  # vertical speed that reaches the window after 0.5 s
    assert value(window_y, rise) == pytest.approx(2.5, abs=0.05)


def test_what_only_the_critics_see(xp):
    """Robot at (-2, 0) facing +y, ball at the origin rolling along +x, its site beside it; target 4 m beyond."""
    site = {"ball_site_pos_w": [0.0, c.BALL_RADIUS_M, c.BALL_RADIUS_M]}
    s = situation(xp, "target", ball_vel=(1, 0, 0), yaw=np.pi / 2, action_count=100, **site)
    memory = remembered(xp, shot_value=2.5, prev_action=np.arange(12.0), nearest_approach_m=1.5, nearest_aim_m=1.0)
    distances = dense.approach_distance_m(s, xp), dense.aim_distance_m(s, xp)
    widths = [row.width for row in TABLE]
    values = np.split(np.asarray(privileged(s, memory, *distances, xp)), np.cumsum(widths)[:-1])
    found = dict(zip((row.name for row in TABLE), values))
    np.testing.assert_allclose(found["ball_center_rel_site_h"], [-1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found["ball_center_vel_h"], [0.0, -0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(found["shot_value"], 0.5)
    np.testing.assert_allclose(found["approach_above_least"], 0.5, atol=1e-4)  # straight behind: no detour
    np.testing.assert_allclose(found["aim_above_least"], 2.0)  # 3 m, clipped
    np.testing.assert_allclose(found["time_left"], 1 - 100 / c.EPISODE_ACTIONS)
    np.testing.assert_array_equal(found["prev_action"], np.arange(12.0))
    first = memory._replace(nearest_approach_m=xp.asarray(-1.0), nearest_aim_m=xp.asarray(-1.0))
    assert float(privileged(s, first, *distances, xp)[7:9].sum()) == 0.0


def test_lanes_at_once_in_either_library_are_lanes_one_by_one():
    """200 random situations as (10, 20): NumPy in float64 against one lane at a time in JAX's float32."""
    rng = np.random.default_rng(0)
    shape = (10, 20)

    def normal(mean, spread, *width):
        return rng.normal(mean, spread, (*shape, *width)).astype(np.float32)

    quat = normal([1, 0, 0, 0], 0.2, 4)
    moves = (rng.random((*shape, 1)) < 0.7).astype(np.float32)
    # Most balls are on their way to the goal line, so that keeper, defenders, window and posts all matter.
    s = Situation(
        normal(0, 0.3, 12), normal(0, 2, 12), normal([-8, 0, 0.6], 1, 3),
        quat / np.linalg.norm(quat, axis=-1, keepdims=True), normal(0, 1, 3), normal(0, 0.1, 3),
        normal([-9, 0, 0.1], 0.5, 3), normal([-9, 0, 0.1], 0.5, 3), normal([-3, 0, 1], [2, 1, 1], 3) * moves,
        rng.integers(0, 3, shape), normal([-11, 0, 0.8], [0.1, 1, 0.3], 3), normal([-11, 0, 0.6], [0, 1, 0], 3, 3),
        rng.integers(0, 500, shape),
    )  # fmt: skip
    before = Memory(normal(0, 0.3, 12), normal(0, 1), normal(2, 1), normal(3, 1))
    events = Events(*(rng.random(shape) < 0.1 for _ in Events._fields))
    action = normal(0, 0.3, 12)

    def everything(s, before, events, action, xp):
        after = dense.next_memory(s, before, action, xp)
        distances = dense.approach_distance_m(s, xp), dense.aim_distance_m(s, xp)
        return dense.dense_terms(s, before, after, events, action, xp), privileged(s, after, *distances, xp)

    one = jax.vmap(jax.vmap(lambda *lane: everything(*lane, jnp)))
    expected_terms, expected_seen = one(s, before, events, action)
    as_float64 = jax.tree.map(lambda x: x.astype(float) if x.dtype == np.float32 else x, (s, before, events, action))
    raw, seen = everything(*as_float64, np)
    assert seen.shape == (*shape, 22) and seen.dtype == np.float64 and expected_seen.dtype == jnp.float32
    np.testing.assert_allclose(seen, expected_seen, rtol=1e-5, atol=1e-5)
    for name, values in raw.items():
        # New ground is a difference of metres over 20 ms.
        tolerance = 2e-4 if name in ("approach", "dribble") else 1e-5
        np.testing.assert_allclose(values, expected_terms[name], rtol=1e-5, atol=tolerance, err_msg=name)
        assert np.ptp(values) > 0 or name == "alive", name
