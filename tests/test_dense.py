"""The dense terms, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs.tasks import Events, Readings, StartMix, Tasks, TaskState
from booster_soccer.preprocess.privileged import TABLE as PRIVILEGED_TABLE
from booster_soccer.rewards import dense
from booster_soccer.rollout import episode


@pytest.fixture(scope="module")
def tasks():
    return Tasks()


def _state(tasks: Tasks, task: str, **changes) -> TaskState:
    mix = StartMix(task_share=tuple(np.eye(3)[c.TASKS.index(task)]), official_place=1.0)
    state = tasks.reset(jax.random.key(0), mix)[2]
    return state._replace(**{k: jnp.asarray(v) for k, v in changes.items()})


def _readings(ball=(0.0, 0.0), ball_vel=(0.0, 0.0, 0.0), robot=(-2.0, 0.0), yaw=0.0) -> Readings:
    zeros = {name: jnp.zeros(3) for name in Readings._fields}
    zeros |= {"joint_pos": jnp.asarray(c.DEFAULT_POSE_RAD), "joint_vel": jnp.zeros(12)}
    zeros |= {
        "imu_pos_w": jnp.array([*robot, 0.65]),
        "imu_quat_wxyz": jnp.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]),
        "ball_center_pos_w": jnp.array([*ball, c.BALL_RADIUS_M]),
        "ball_center_vel_w": jnp.asarray(ball_vel, jnp.float32),
        "foot_pos_w": jnp.zeros((2, 3)),
        "foot_vel_w": jnp.zeros((2, 3)),
        "foot_on_ground": jnp.array([True, True]),
    }
    return Readings(**zeros)


def _transition(tasks, task="goalie", events=None, action=None, shot=(0.0, 0.0), **readings):
    state = _state(tasks, task, shot_value=shot[0])
    none = jnp.array(False)
    events = Events(none, none, none, none, none)._replace(**(events or {}))
    action = jnp.zeros(12) if action is None else jnp.asarray(action)
    return dense.Transition(_readings(**readings), state, state, events, action, jnp.array(shot[1]))


def test_every_term_has_a_weight_and_the_sum_is_weighted(tasks):
    terms = dense.dense_terms(_transition(tasks, shot=(1.0, 3.0)))
    assert list(terms) == list(dense.TERMS)
    weights = dense.DenseWeights(**{name: 0.0 for name in terms} | {"shot": 2.0, "alive": 0.5})
    assert float(dense.dense_reward(terms, weights)) == pytest.approx(2.0 * 2.0 + 0.5)


def test_shot_is_the_change_of_value(tasks):
    assert float(dense.dense_terms(_transition(tasks, shot=(1.5, 4.0)))["shot"]) == pytest.approx(2.5)


def test_approach_pays_new_ground_only_and_a_constant_while_a_penalty_is_under_way(tasks):
    def approach(before, now, task="goalie", **changes):
        t = _transition(tasks, task, **changes)
        t = t._replace(before=t.before._replace(nearest_approach_m=jnp.array(before)),
                       after=t.after._replace(nearest_approach_m=jnp.array(now)))  # fmt: skip
        return float(dense.dense_terms(t)["approach"])

    assert approach(2.0, 1.99) == pytest.approx(0.5, abs=1e-4)  # 10 mm in 20 ms
    assert approach(2.0, 1.9) == 1.0 and approach(2.0, 2.0) == 0.0
    assert approach(-1.0, 2.0) == 0.0  # first action
    assert approach(2.0, 2.0, ball_vel=(0.31, 0.0, 0.0), shot=(0.0, 0.1)) == 0.5
    assert approach(2.0, 2.0, ball_vel=(0.31, 0.0, 0.0), shot=(0.0, -0.1)) == 0.0
    assert approach(2.0, 2.0, "target", ball_vel=(0.31, 0.0, 0.0), shot=(0.0, 0.1)) == 0.0


def test_dribbling_pays_new_ground_of_the_ball_and_following_it_in_the_target_task_only(tasks):
    def terms(task, before, now, robot=(-2.0, 0.0)):
        t = _transition(tasks, task, robot=robot)
        aim = jnp.array([4.0, 0.0, 0.0])
        t = t._replace(before=t.before._replace(nearest_aim_m=jnp.array(before)),
                       after=t.after._replace(nearest_aim_m=jnp.array(now), target_pos_w=aim))  # fmt: skip
        raw = dense.dense_terms(t)
        return float(raw["dribble"]), float(raw["follow"])

    assert terms("target", 2.0, 1.99) == pytest.approx((0.5, np.exp(-2.0)), abs=1e-4)  # 10 mm in 20 ms, 2 m behind
    assert terms("target", 2.0, 1.9)[0] == 1.0 and terms("target", 2.0, 2.0)[0] == 0.0
    assert terms("target", -1.0, 2.0)[0] == 0.0  # first action
    assert terms("target", 2.0, 2.0, robot=(0.0, 0.5))[1] == pytest.approx(np.exp(-0.5 - 1.2), abs=1e-4)  # beside it
    assert terms("goalie", 2.0, 1.99) == (0.0, 0.0)


def test_least_distances_only_shrink(tasks):
    nearest = [episode._least(jnp.array(before), jnp.array(1.5)) for before in (-1.0, 2.0, 1.0)]
    assert [float(x) for x in nearest] == [1.5, 1.5, 1.0]


def test_the_kicking_position_is_behind_the_ball(tasks):
    state = _state(tasks, "target", target_pos_w=[4.0, 0.0, 0.0])

    def distance(x, y):
        return float(dense.approach_distance_m(_readings(robot=(x, y)), state))

    assert distance(-1.0, 0.0) == pytest.approx(1.0, abs=1e-4)
    assert distance(0.0, 1.0) == pytest.approx(1.0 + 1.2, abs=1e-4)
    assert distance(1.0, 0.0) == pytest.approx(1.0 + 2.4, abs=1e-4)


def test_posture_terms_by_hand(tasks):
    t = _transition(tasks, action=np.full(12, 0.1), events={"fallen": jnp.array(True)})
    terms = {k: float(v) for k, v in dense.dense_terms(t).items()}
    assert terms["tilt"] == 0 and terms["trunk_angvel"] == 0 and terms["alive"] == 1 and terms["fallen"] == 1
    assert terms["action_rate"] == pytest.approx(12 * 0.01)
    torque = c.KP_NM_PER_RAD * 0.1 * c.ACTION_SCALE_RAD / c.TORQUE_LIMIT_NM
    assert terms["torque"] == pytest.approx(np.sum(torque**2), rel=1e-5)


def test_ball_done_is_an_end_without_a_fall_or_a_lost_ball(tasks):
    def ball_done(task="goalie", **events):
        t = _transition(tasks, task, events={name: jnp.array(value) for name, value in events.items()})
        return float(dense.dense_terms(t)["ball_done"])

    assert ball_done() == 0.0
    assert ball_done(success=True) == ball_done(out_of_field=True) == ball_done(blocked=True) == 1.0
    assert ball_done("target", out_of_field=True) == 0.0 and ball_done("target", success=True) == 1.0
    assert ball_done(fallen=True) == ball_done(diverged=True) == ball_done(fallen=True, success=True) == 0.0


def test_facing(tasks):
    assert float(dense.dense_terms(_transition(tasks))["face_ball"]) == pytest.approx(1.0)
    assert float(dense.dense_terms(_transition(tasks, yaw=np.pi / 2))["face_ball"]) == pytest.approx(0.0, abs=1e-6)


def test_target_value_rewards_direction(tasks):
    """On target: near the 8.1 points of a sure hit; across: little; still: zero."""
    state = _state(tasks, "target", target_pos_w=[4.0, 0.0, 0.0], action_count=0)

    def value(velocity):
        return float(dense.shot_value(_readings(ball_vel=(*velocity, 0.0)), state))

    assert value((0, 0)) == 0
    assert value((1.2, 0)) == pytest.approx(3 * (2.0 + 0.7), abs=0.05)
    by_angle = [value((1.2 * np.cos(a), 1.2 * np.sin(a))) for a in (0.0, 0.25, 0.8, 3.0)]
    assert by_angle == sorted(by_angle, reverse=True) and len(set(by_angle)) == 4


def test_target_value_knows_when_the_ball_is_lost_or_late(tasks):
    """Backwards at 1.2 m/s from the centre the line at 10.97 m is 9.1 s away."""

    def value(speed, actions):
        state = _state(tasks, "target", target_pos_w=[4.0, 0.0, 0.0], action_count=actions)
        return float(dense.shot_value(_readings(ball_vel=(speed, 0.0, 0.0)), state))

    assert value(-1.2, 200) == pytest.approx(0.0, abs=0.05)  # 6 s left: still in the field
    assert value(-2.4, 200) == pytest.approx(-3.0, abs=0.05)  # 4.6 s to the line
    assert value(1.2, 450) == pytest.approx(3 * 0.7, abs=0.1)  # 1 s left, 3.3 s to the target


def test_goalie_value_rewards_speed_and_the_free_side(tasks):
    """At 2.5 s after the start the keeper is at y = sin(2 pi 0.3 2.5) = -1.0 m: the middle and the left are free."""
    state = _state(tasks, "goalie", action_count=100)  # 2 s; the ball needs 0.5 s

    def value(velocity):
        return float(dense.shot_value(_readings(ball=(-8.77, 0.0), ball_vel=(*velocity, 0.0)), state))

    toward = 2 * (10.97 - 8.77 - c.BALL_RADIUS_M)  # above the 3.3 m/s at which the end counts in full
    assert value((-toward, 0.5)) - 1.5 * toward == pytest.approx(2.5, abs=0.15)  # past the keeper
    assert value((-toward, -2.0)) - 1.5 * toward == pytest.approx(
        -0.5 - 0.2 * 1.5 * toward, abs=0.1
    )  # into its hands: a fifth slower
    assert value((-toward, 6.0)) - 1.5 * toward == pytest.approx(-3.0, abs=0.1)  # wide
    assert value((-2 * toward, 6.0)) > value((-toward, 6.0))


def test_a_weak_kick_is_never_worse_than_none(tasks):
    """Straight at the raised window a rolling ball ends at -3, yet any faster ball is worth more."""
    state = _state(tasks, "obstacle", target_pos_w=[-c.FIELD_HALF_LENGTH_M, 0.0, 1.2])
    state = state._replace(defender_pos_w=state.defender_pos_w.at[:, 1].set(jnp.asarray([-1.5, 1.5, 1.5])))
    values = [
        float(dense.shot_value(_readings(ball=(-8.77, 0.0), ball_vel=(-speed, 0.0, 0.0)), state))
        for speed in np.arange(0.0, 5.0, 0.25)
    ]
    assert np.all(np.diff(values) > 0)


def test_obstacle_value_prefers_a_defender_to_the_gap_for_a_rolling_ball(tasks):
    state = _state(tasks, "obstacle")
    toward = 2 * (10.97 - 8.77 - c.BALL_RADIUS_M)  # 0.5 s

    def value(y, vz=0.0):
        velocity = (-toward, 2 * y, vz)
        return float(dense.shot_value(_readings(ball=(-8.77, 0.0), ball_vel=velocity), state)) - 1.5 * toward

    defender_y, window = float(state.defender_pos_w[0, 1]), np.asarray(state.target_pos_w)
    assert value(defender_y) == pytest.approx(-0.5 - 0.2 * 1.5 * toward, abs=0.2)
    assert value(float(window[1])) < -2.0
    rise = 2 * (window[2] - c.BALL_RADIUS_M) + 0.25 * 9.81  # vertical speed that reaches the window after 0.5 s
    assert value(float(window[1]), rise) == pytest.approx(2.5, abs=0.05)


def test_what_only_the_critics_see(tasks):
    """Robot at (-2, 0) facing +y, ball at the origin rolling along +x, its site beside it; target 4 m beyond."""
    state = _state(tasks, "target", target_pos_w=[4.0, 0.0, 0.0], shot_value=2.5, action_count=100,
                   prev_action=np.arange(12.0), nearest_approach_m=1.5, nearest_aim_m=1.0)  # fmt: skip
    r = _readings(ball_vel=(1.0, 0.0, 0.0), yaw=np.pi / 2)
    r = r._replace(ball_site_pos_w=r.ball_center_pos_w + jnp.array([0.0, c.BALL_RADIUS_M, 0.0]))
    values = np.asarray(episode.privileged(r, state))
    found = dict(zip((row.name for row in PRIVILEGED_TABLE),
                     np.split(values, np.cumsum([row.width for row in PRIVILEGED_TABLE])[:-1])))  # fmt: skip
    np.testing.assert_allclose(found["ball_center_rel_site_h"], [-1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found["ball_center_vel_h"], [0.0, -0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(found["shot_value"], 0.5)
    np.testing.assert_allclose(found["approach_above_least"], 0.5, atol=1e-4)  # straight behind: no detour
    np.testing.assert_allclose(found["aim_above_least"], 2.0)  # 3 m, clipped
    np.testing.assert_allclose(found["time_left"], 1 - 100 / c.EPISODE_ACTIONS)
    np.testing.assert_array_equal(found["prev_action"], np.arange(12.0))
    first = state._replace(nearest_approach_m=jnp.array(-1.0), nearest_aim_m=jnp.array(-1.0))
    assert float(episode.privileged(r, first)[7:9].sum()) == 0.0
