"""The lanes of fine-tuning: the control loop, what critics see, episode ends, and playing an episode again."""

import numpy as np
import pytest

from booster_soccer.envs import constants as c
from booster_soccer.envs import official, pd
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.play import episode_seed
from booster_soccer.rollout.workers import EndlessLanes, WorkerLanes, check_num_lanes

NOISE_RAD = 0.02
WEIGHTS = DenseWeights()
ZEROS, ONES = np.zeros((1, c.NUM_JOINTS), np.float32), np.ones((1, c.NUM_JOINTS), np.float32)


@pytest.fixture
def player() -> EndlessLanes:
    return EndlessLanes("official", "obstacle", [(7,)], NOISE_RAD, WEIGHTS)


def test_an_action_is_ten_physics_steps_of_the_official_control(player):
    """Against the loop written out on an environment of its own."""
    critic_obs = player.start()
    env = official.make("obstacle")
    obs, info = official.reset(env, episode_seed(7, 0), NOISE_RAD)
    np.testing.assert_array_equal(critic_obs[0, :OBS_SIZE], Preprocessor().modify_state(obs, info)[0])
    action = np.linspace(-0.5, 0.5, c.NUM_JOINTS).astype(np.float32)
    for count in (10, 20, 30):
        step = player.step(action[None])
        for _ in range(10):
            torque_nm = pd.platform_torque_nm(action, obs[:12], obs[12:24])
            obs, _, _, _, info = env.step(torque_nm)
        np.testing.assert_array_equal(step.critic_obs[0, :OBS_SIZE], Preprocessor().modify_state(obs, info)[0])
        assert step.physics_steps == [count] and step.score == [0.0]
        assert not step.terminated[0] and not step.truncated[0]
    # Of what only the critics see: the ball's centre from its site, in radii (it lies still), and the last action.
    data, privileged = env.unwrapped.sim.data._data, step.critic_obs[0, OBS_SIZE:]
    lift_w = (data.geom("ball").xpos - data.site("ball").xpos) / c.BALL_RADIUS_M
    np.testing.assert_allclose(privileged[2], lift_w[2], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(privileged[-c.NUM_JOINTS :], action)
    assert privileged[-c.NUM_JOINTS - 1] == pytest.approx(1.0 - 3 / c.EPISODE_ACTIONS)  # time left


def test_the_end_pays_the_score_and_keeps_the_final_observation(player):
    player.start()
    step = player.step(ONES)
    while not step.terminated[0]:
        assert step.score == [0.0]
        np.testing.assert_array_equal(step.critic_obs, step.next_critic_obs)
        step = player.step(ONES)
    assert step.fell[0] and not step.truncated[0] and not step.success[0]
    # Fallen, no touch: -1.5 - 1.0, and 0.25 (1 - tanh d) of about two metres of distance.
    assert step.score[0] == pytest.approx(-2.5 + 0.01, abs=0.01)
    obs, info = official.reset(official.make("obstacle"), episode_seed(7, 1), NOISE_RAD)
    np.testing.assert_array_equal(step.next_critic_obs[0, :OBS_SIZE], Preprocessor().modify_state(obs, info)[0])
    assert not np.array_equal(step.critic_obs, step.next_critic_obs)
    assert step.dense_terms["fallen"] == [1.0] and step.dense[0] < -5.0
    assert not step.next_critic_obs[0, -c.NUM_JOINTS :].any()  # a fresh episode remembers no action


def test_an_episode_is_its_seed_and_its_actions(player):
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (20, 1, c.NUM_JOINTS)).astype(np.float32)
    player.start()
    steps, states = [], []
    for action in actions:
        steps.append(player.step(action))
        states.append(player.state())
    np.testing.assert_array_equal(player.restore(states[14]), steps[14].critic_obs)
    again = player.step(actions[15])
    np.testing.assert_array_equal(again.critic_obs, steps[15].critic_obs)
    np.testing.assert_array_equal(again.dense, steps[15].dense)


def test_a_broken_simulation_ends_its_episode_without_a_trace(player):
    """MuJoCo starts again by itself, which looks like an ordinary step from outside."""
    player.start()
    player.step(ZEROS)
    player.lanes.env.env.unwrapped.sim.data._data.qvel[:] = np.nan
    step = player.step(ZEROS)
    assert step.terminated[0] and not step.truncated[0] and step.score == [0.0]
    assert not step.critic_obs.any() and step.dense == [WEIGHTS.fallen]
    assert not any(values.any() for values in step.dense_terms.values())
    assert np.isfinite(step.next_critic_obs).all()
    assert not player.step(ZEROS).terminated[0]


@pytest.mark.parametrize("task", c.TASKS)
def test_twin_lanes_are_official_lanes(task):
    """Two lanes of the twin, of which one falls on the way, against two official environments."""
    keys = [(3, 0), (3, 1)]
    twins = EndlessLanes("twin", task, keys, NOISE_RAD, WEIGHTS)
    officials = [EndlessLanes("official", task, [key], NOISE_RAD, WEIGHTS) for key in keys]
    np.testing.assert_array_equal(twins.start(), np.concatenate([player.start() for player in officials]))
    rng = np.random.default_rng(0)
    ended = 0
    for i in range(58):
        actions = rng.uniform(-0.2, 0.2, (2, c.NUM_JOINTS)).astype(np.float32)
        actions[1] += 0.8  # falls soon
        if i == 52:  # play again episodes of different lengths
            state = twins.state()
            assert state["lane_length"][0] > state["lane_length"][1]
            twins.restore(state)
        theirs = _columns([player.step(action[None]) for player, action in zip(officials, actions)])
        ours = twins.step(actions)
        for their_value, our_value in zip(theirs, _flat(ours)):
            np.testing.assert_array_equal(our_value, their_value)
        ended += ours.terminated.sum()
    assert ended == 2


def test_time_running_out_pays_the_score_and_is_no_end():
    player = EndlessLanes("twin", "target", [(5,)], NOISE_RAD, WEIGHTS)
    player.start()
    player.lanes.env.steps[:] = c.EPISODE_PHYSICS_STEPS - 15
    for physics_steps, over in ((4995, False), (5000, True)):
        step = player.step(ZEROS)
        assert step.physics_steps == [physics_steps]
        assert step.truncated[0] == over and not step.terminated[0] and not step.fell[0]
        assert (step.score[0] != 0.0) == over and np.array_equal(step.critic_obs, step.next_critic_obs) != over
    assert step.score[0] == pytest.approx(-0.3, abs=0.1)  # no target hit; far from it, exp(-d) is small


def _flat(step) -> list[np.ndarray]:
    """The arrays of a step, its dictionary unpacked."""
    return [array for entry in step for array in (entry.values() if isinstance(entry, dict) else [entry])]


def _columns(steps: list) -> list[np.ndarray]:
    """The arrays of several lanes' steps, joined."""
    return [np.concatenate(arrays) for arrays in zip(*map(_flat, steps))]


@pytest.mark.parametrize(("backend", "number"), [("official", c.NUM_TASKS), ("twin", 2 * c.NUM_TASKS)])
def test_lanes_run_side_by_side_and_come_back(backend, number):
    actions = np.random.default_rng(1).uniform(-0.3, 0.3, (12, number, c.NUM_JOINTS)).astype(np.float32)
    with WorkerLanes(backend, number, 4, NOISE_RAD, WEIGHTS) as lanes:
        assert lanes.tasks == number // c.NUM_TASKS * list(c.TASKS)
        critic_obs = lanes.start()
        assert critic_obs.shape == (number, CRITIC_OBS_SIZE)
        one_hot = critic_obs[:, SLICES["task_one_hot"]]
        np.testing.assert_array_equal(one_hot, np.eye(c.NUM_TASKS)[[c.TASKS.index(task) for task in lanes.tasks]])
        for now in actions[:6]:
            lanes.send(now)
            lanes.receive()
        state = lanes.state()
        went_on = []
        for now in actions[6:]:
            lanes.send(now)
            went_on.append(lanes.receive())
        lanes.restore(state)
        for now, then in zip(actions[6:], went_on):
            lanes.send(now)
            again = lanes.receive()
            for value, before in zip(_flat(again), _flat(then)):
                np.testing.assert_array_equal(value, before)


def test_every_task_needs_as_many_lanes():
    for number in (0, 1, c.NUM_TASKS + 1):
        with pytest.raises(UserError, match=f"multiple of {c.NUM_TASKS}"):
            check_num_lanes(number)
    check_num_lanes(2 * c.NUM_TASKS)
