"""The submitted module's lane state: the same torques in any mode, order and thread, and no trace in what is saved."""

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from booster_soccer.agents.ddpg import Actor
from booster_soccer.agents.submission_model import scripted
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES

Model = torch.jit.ScriptModule


@pytest.fixture(scope="module")
def actor() -> Actor:
    torch.manual_seed(0)
    return Actor()


def episode(calls: int, lanes: int, seed: int) -> torch.Tensor:
    """Observations (calls, lanes, 87) of lanes that all start at the first call."""
    obs = torch.randn(calls, lanes, OBS_SIZE, generator=torch.Generator().manual_seed(seed))
    obs[0, :, SLICES["joint_vel"]] = 0.0
    return obs


def saved_and_loaded(model: Model) -> Model:
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    return torch.jit.load(file)


def in_a_thread(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def inference(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return call()


def without_gradients(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return call()


MODES = (
    inference,
    lambda call: call(),
    without_gradients,
    in_a_thread,
    lambda call: in_a_thread(lambda: inference(call)),
)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("first", range(len(MODES)))
def test_any_order_of_modes_and_threads_gives_the_same_torques(actor, hold, first):
    """After a first call under `inference_mode` a plain one raised."""
    plain, mixed = scripted(actor, hold), scripted(actor, hold)
    for number, obs in enumerate(episode(25, 3, seed=1)):
        expected = plain(obs)
        given = MODES[(first + number) % len(MODES)](lambda: mixed(obs))  # noqa: B023
        assert torch.equal(given, expected)


def test_any_order_of_batch_sizes_gives_the_torques_of_a_new_module(actor):
    used = scripted(actor)
    for number, lanes in enumerate((2, 1, 3, 0, 2, 2, 1)):
        new = scripted(actor)
        for call, obs in enumerate(episode(13, lanes, seed=number)):
            mode = MODES[(number + call) % len(MODES)]
            assert torch.equal(mode(lambda: used(obs)), new(obs))  # noqa: B023


@pytest.mark.parametrize("hold", [True, False])
def test_no_lane_at_all_is_a_batch_too(actor, hold):
    assert scripted(actor, hold)(torch.zeros(0, OBS_SIZE)).shape == (0, 12)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(actor, number):
    before, model, other = torch.get_num_threads(), scripted(actor), scripted(actor)
    try:
        for obs in episode(25, 4, seed=2):
            torch.set_num_threads(number)
            given = model(obs)
            torch.set_num_threads(before)
            assert torch.equal(given, other(obs))
    finally:
        torch.set_num_threads(before)


def test_a_module_that_has_played_saves_and_loads_like_a_new_one(actor):
    """Its `state_dict` no longer loaded; and the platform may copy, save or freeze it at any time."""
    played = scripted(actor)
    for obs in episode(7, 3, seed=3):
        played(obs)
    state = played.state_dict()
    new = scripted(actor)
    assert state.keys() == new.state_dict().keys() and not {"target_rad", "age"} & state.keys()
    new.load_state_dict(state)
    for other in (new, copy.deepcopy(played), saved_and_loaded(played), scripted(actor)):
        reference = scripted(actor)
        for obs in episode(15, 3, seed=4):
            assert torch.equal(other(obs), reference(obs))


def test_a_copy_in_the_middle_of_an_episode_holds_on(actor):
    model, reference = scripted(actor), scripted(actor)
    for number, obs in enumerate(episode(40, 2, seed=5)):
        if number % 7 == 3:
            model = copy.deepcopy(model) if number % 2 else saved_and_loaded(model)
        assert torch.equal(model(obs), reference(obs))


def test_freezing_keeps_the_hold(actor):
    frozen, reference = torch.jit.freeze(scripted(actor)), scripted(actor)
    for obs in episode(25, 2, seed=6):
        assert torch.equal(frozen(obs), reference(obs))


def test_what_it_gives_is_not_its_memory(actor):
    """Whoever writes into the torques, or into the observations afterwards, changes nothing."""
    model, reference = scripted(actor), scripted(actor)
    for obs in episode(25, 2, seed=7):
        theirs = obs.clone()
        model(theirs).fill_(9.0)
        theirs.fill_(9.0)
        torques = reference(obs)
    assert torch.equal(model(obs), reference(obs)) and torques.shape == (2, 12)


def test_lanes_in_another_order_from_the_start_give_the_same(actor):
    order = torch.tensor([2, 0, 1])
    model, reference = scripted(actor), scripted(actor)
    for obs in episode(25, 3, seed=8):
        assert torch.equal(model(obs[order]), reference(obs)[order])


def test_one_velocity_that_is_not_zero_is_no_first_step(actor):
    """The target of the first call is held, although eleven joints stand still and the inputs changed."""
    model, obs = scripted(actor), episode(2, 1, seed=1)
    model(obs[0])
    obs[1, :, SLICES["joint_vel"]], obs[1, :, SLICES["joint_vel"].start] = 0.0, 1e-9
    held = model.target_rad.clone()
    model(obs[1])
    assert torch.equal(model.target_rad, held)
    obs[1, :, SLICES["joint_vel"]] = 0.0
    model(obs[1])
    assert not torch.equal(model.target_rad, held)


def test_no_graph_grows(actor):
    """The SDK calls the model with autograd on; even an input that asks for gradients gets none."""
    model = scripted(actor)
    for obs in episode(25, 2, seed=1):
        unit_torque = model(obs.requires_grad_())
        assert not unit_torque.requires_grad
        assert all(buffer.grad_fn is None and not buffer.requires_grad for buffer in model.buffers())
    assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in model.parameters())
