"""DDPG fine-tuning: the learner's arithmetic, freezing, judging, and small runs from end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import finetune_ddpg as stage
from booster_soccer.agents.policy import LAYERS, policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.symmetry import mirror_action, mirror_observation
from booster_soccer.store import checkpoints

MEAN, SCALE = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
SMALL = {
    "total_steps": 60, "num_lanes": 3, "warmup_steps": 30, "warmup_updates": 2, "freeze_hidden_until": 20,
    "freeze_input_until": 40, "updates_per_round": 1, "batch_size": 16, "buffer_size": 64, "actor_every": 1,
    "validation_episodes": 2, "confirmation_episodes": 2, "validate_every": 60, "log_every": 15, "device": "cpu",
}  # fmt: skip


def config(out, **changes) -> stage.Config:
    return stage.resolve(stage.Config(out, **({"from_scratch": True} | SMALL | changes)))


def batch(size: int = 32, seed: int = 0) -> stage.Batch:
    rng = np.random.default_rng(seed)
    rows = (
        rng.normal(size=(size, OBS_SIZE)),
        rng.uniform(-1, 1, (size, c.NUM_JOINTS)),
        rng.normal(size=size),
        rng.normal(size=(size, OBS_SIZE)),
        rng.integers(2, size=size),
    )
    return stage.Batch(*(torch.as_tensor(row, dtype=torch.float32) for row in rows))


def learner(tmp_path, mean=MEAN, scale=SCALE, **changes) -> stage.Learner:
    arrays = stage.random_arrays(0, mean, scale)
    return stage.Learner(config(tmp_path / "out", **changes), arrays, mean, scale)


# --- the learner --------------------------------------------------------------------------------------


def test_freeze_schedule():
    schedule = stage.Config(None, freeze_hidden_until=20_000, freeze_input_until=50_000)
    expected = {0: 1, 19_999: 1, 20_000: 2, 49_999: 2, 50_000: 3, 10**6: 3}
    for step, layers in expected.items():
        assert stage.trainable_layers(step, schedule) == LAYERS[-layers:]
    for preset in ("cpu", "l4"):
        resolved = stage.resolve(stage.Config(None, checkpoint="x", preset=preset))
        assert (resolved.freeze_hidden_until, resolved.freeze_input_until) == (20_000, 50_000)


@pytest.mark.parametrize("trained", [(), LAYERS[2:], LAYERS[1:], LAYERS])
def test_frozen_layers_do_not_change_by_a_bit(tmp_path, trained):
    rng = np.random.default_rng(3)
    subject = learner(tmp_path, rng.normal(size=OBS_SIZE), rng.uniform(0.1, 5, OBS_SIZE))
    before = subject.arrays()
    for seed in range(4):
        subject.update(batch(seed=seed), trained)
    after = subject.arrays()
    for layer in LAYERS:
        for kind in ("weight", "bias"):
            name = f"actor.{layer}.{kind}"
            assert np.array_equal(before[name], after[name]) == (layer not in trained), name
    assert not np.array_equal(before["critic.0.input.weight"], after["critic.0.input.weight"])


def test_thawing_later_leaves_no_trace_of_freezing(tmp_path):
    """A layer that thaws starts with fresh optimiser moments: its first step has Adam's full length."""
    subject = learner(tmp_path)
    for seed in range(3):
        subject.update(batch(seed=seed), LAYERS[2:])
    before = subject.arrays()["actor.hidden.weight"]
    subject.update(batch(seed=9), LAYERS)
    moved = np.abs(subject.arrays()["actor.hidden.weight"] - before)
    assert np.median(moved) == pytest.approx(subject.config.actor_learning_rate, rel=0.01)


def test_steps_are_those_of_a_network_on_normalized_inputs():
    rng = np.random.default_rng(4)
    mean = torch.tensor(rng.normal(0, 10, 5))
    scale = torch.tensor(rng.uniform(0.1, 8, 5))
    raw, normalized = (torch.nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        normalized.weight.copy_(raw.weight * scale)
        normalized.bias.copy_(raw.bias + raw.weight @ mean)
    ours, theirs = (torch.optim.Adam(layer.parameters(), lr=0.01) for layer in (raw, normalized))
    for _ in range(20):
        x = mean + scale * torch.tensor(rng.normal(size=(8, 5)))
        for layer, optimizer, inputs in ((raw, ours, x), (normalized, theirs, (x - mean) / scale)):
            optimizer.zero_grad()
            (layer(inputs).sin() ** 2).sum().backward()
            if layer is raw:
                stage.step_as_if_normalized(optimizer, [layer], mean, scale)
            else:
                optimizer.step()
        torch.testing.assert_close(raw(x), normalized((x - mean) / scale), rtol=0, atol=1e-9)


def test_only_a_true_end_stops_the_bootstrap(tmp_path):
    subject = learner(tmp_path, discount=0.9)
    rows = batch(size=2)._replace(reward=torch.tensor([1.0, 1.0]), terminated=torch.tensor([1.0, 0.0]))
    with torch.no_grad():
        action = subject.target_actor(rows.next_obs)
        next_value = torch.minimum(*(critic(rows.next_obs, action) for critic in subject.target_critics))[1].item()
    value = subject.update(rows, ())["value"].item()
    assert value == pytest.approx((1.0 + (1.0 + 0.9 * next_value)) / 2, abs=1e-6)


def test_updates_fit_the_values_and_climb_them(tmp_path):
    """On a one-step problem whose reward is the first action, the critics find it and the actor follows."""
    subject = learner(tmp_path, actor_learning_rate=1e-3, critic_learning_rate=1e-3)
    for seed in range(400):
        rows = batch(64, seed)
        rows = rows._replace(reward=rows.action[:, 0], terminated=torch.ones(64))
        loss = subject.update(rows, LAYERS)["critic_loss"].item()
    assert loss < 0.05  # it starts near 0.7
    assert subject.act(batch(seed=999).obs.numpy())[:, 0].mean() > 0.5


def test_targets_follow_slowly(tmp_path):
    subject = learner(tmp_path, target_tau=0.25)
    before = subject.arrays()
    subject.update(batch(), ())
    after = subject.arrays()
    for name in (name for name in before if name.startswith("critic")):
        expected = 0.75 * before[f"target_{name}"] + 0.25 * after[name]
        np.testing.assert_allclose(after[f"target_{name}"], expected, rtol=0, atol=1e-6)


def test_random_networks_see_normalized_observations():
    rng = np.random.default_rng(5)
    mean, scale = rng.normal(0, 10, OBS_SIZE), rng.uniform(0.1, 8, OBS_SIZE)
    x = rng.normal(size=(4, OBS_SIZE))
    plain, folded = (policy_from_arrays(stage.random_arrays(1, *how)) for how in ((MEAN, SCALE), (mean, scale)))
    np.testing.assert_allclose(plain(x), folded(mean + scale * x), rtol=0, atol=1e-5)
    assert np.abs(plain(x)).max() < 0.02


# --- the buffer ---------------------------------------------------------------------------------------


def rows(count: int, first: int = 0) -> dict[str, np.ndarray]:
    number = np.arange(first, first + count, dtype=np.float32)
    return {
        "obs": np.tile(number[:, None], OBS_SIZE),
        "action": np.zeros((count, c.NUM_JOINTS)),
        "dense": number,
        "score": 10 * number,
        "next_obs": np.tile(number[:, None] + 1, OBS_SIZE),
        "terminated": number % 2,
    }


def test_the_ring_forgets_the_oldest():
    replay = stage.Replay(4, stage._ROW_SHAPES)
    replay.add(**rows(3))
    assert len(replay) == 3
    replay.add(**rows(3, first=3))
    assert len(replay) == 4
    assert sorted(replay.arrays["dense"]) == [2, 3, 4, 5]


def test_rewards_are_mixed_when_sampled():
    replay = stage.Replay(8, stage._ROW_SHAPES)
    replay.add(**rows(8))
    sample = stage.sample(replay, np.random.default_rng(0), 64, 0.3, 0.7, mirror=False)
    number = sample["obs"][:, 0]
    assert set(sample) == set(stage.Batch._fields)
    np.testing.assert_allclose(sample["reward"], 0.3 * number + 0.7 * 10 * number, rtol=1e-6)
    np.testing.assert_array_equal(sample["next_obs"][:, 5], number + 1)
    np.testing.assert_array_equal(sample["terminated"], number % 2)


def test_half_of_a_sample_is_mirrored():
    rng = np.random.default_rng(1)
    row = rows(1) | {name: rng.normal(size=(1, OBS_SIZE)).astype(np.float32) for name in ("obs", "next_obs")}
    row["action"] = rng.normal(size=(1, c.NUM_JOINTS)).astype(np.float32)
    replay = stage.Replay(1, stage._ROW_SHAPES)
    replay.add(**row)
    sample = stage.sample(replay, rng, 4, 1.0, 1.0, mirror=True)
    for name, mirror in (("obs", mirror_observation), ("next_obs", mirror_observation), ("action", mirror_action)):
        np.testing.assert_array_equal(sample[name], np.concatenate([*2 * [mirror(row[name])], *2 * [row[name]]]))


# --- judging ------------------------------------------------------------------------------------------


def test_a_gain_must_exceed_its_standard_error():
    start = np.zeros((3, 4))
    assert not stage.is_better(start, start)
    assert stage.is_better(start + 0.1, start)
    assert not stage.is_better(start - 0.1, start)
    lucky = start.copy()
    lucky[0, 0] = 3.0  # one episode of twelve
    # Variance of (3, 0, 0, 0) is 2.25; its mean's is 2.25 / 4; of the mean of three tasks, a ninth of that.
    assert stage.gain(lucky, start) == pytest.approx((0.25, 0.25))
    assert not stage.is_better(lucky, start)


# --- runs ---------------------------------------------------------------------------------------------


def test_a_tiny_run_from_a_checkpoint(tmp_path, capsys):
    """Its end is never below its start, and the start's actor comes back untouched if nothing was better."""
    arrays = stage.random_arrays(2, MEAN, SCALE)
    obs = np.random.default_rng(0).normal(size=(checkpoints.GOLDEN_PAIRS, OBS_SIZE)).astype(np.float32)
    actions = policy_from_arrays(arrays)(obs).astype(np.float32)
    start = tmp_path / "converted"
    checkpoints.save(start, "converted", arrays, obs, actions, {}, 0, 500, None, {})
    path = stage.main(stage.Config(tmp_path / "out", checkpoint=start, backend="official", **SMALL))
    assert capsys.readouterr().out.rstrip().endswith(str(path))
    result = checkpoints.load(path, ("finetuned",))
    assert result.manifest["parent"]["hash"] == checkpoints.load(start).hash
    assert result.manifest["steps"] == 560
    metrics = result.manifest["metrics"]
    validation = metrics["validation"]
    if metrics["result"] == "start":
        for name in (name for name in arrays if name.startswith("actor")):
            np.testing.assert_array_equal(result.arrays[name], arrays[name])
    else:
        assert metrics["confirmation"]["gain"] > metrics["confirmation"]["standard_error"]
        assert validation["candidate"]["mean"] > validation["start"]["mean"]
    with pytest.raises(UserError, match="already holds a checkpoint"):
        stage.main(stage.Config(path, checkpoint=start, **SMALL))
    assert stage.main(stage.Config(path, checkpoint=start, resume=True, **SMALL)) == path


class Killed(Exception):
    """The machine was taken away."""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = checkpoints.load(stage.main(stage.Config(tmp_path / "whole", from_scratch=True, **SMALL)))

    save = stage.Run.save

    def save_and_die(run, *arguments):
        save(run, *arguments)
        if run.step >= 45:  # in the middle of episodes
            raise Killed

    often = {"checkpoint_every": 15, "checkpoint_interval_s": 0.0}
    killed = stage.Config(tmp_path / "killed", from_scratch=True, **SMALL, **often)
    with monkeypatch.context() as patch:
        patch.setattr(stage.Run, "save", save_and_die)
        with pytest.raises(Killed):
            stage.main(killed)
    assert not killed.out.exists()
    with pytest.raises(UserError, match="unfinished run: give --resume"):
        stage.main(killed)
    with pytest.raises(UserError, match="run with discount = 0.995, not 0.9"):
        stage.main(replace(killed, resume=True, discount=0.9))
    resumed = checkpoints.load(stage.main(replace(killed, resume=True)))

    # The history holds losses, values and rewards of every line: equal to the last digit.
    assert len(whole.manifest["metrics"]["history"]) == 1 + 4 + 1  # warm-up, lines, validation
    for name in ("history", "result", "validation", "finetune_steps"):
        assert resumed.manifest["metrics"][name] == whole.manifest["metrics"][name], name
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_bad_input(tmp_path):
    out = tmp_path / "out"
    for wrong, message in (
        ({}, "give either --checkpoint DIR or --from-scratch"),
        ({"checkpoint": tmp_path, "from_scratch": True}, "give either --checkpoint DIR or --from-scratch"),
        ({"from_scratch": True, "preset": "huge"}, "--preset huge is unknown: use one of demo, cpu, l4"),
        ({"from_scratch": True, "num_lanes": 4}, "multiple of 3"),
        ({"from_scratch": True, "batch_size": 0}, "--batch-size must be at least 1"),
        ({"from_scratch": True, "warmup_steps": 10, "batch_size": 20}, "--warmup-steps must be at least batch_size"),
        ({"from_scratch": True, "discount": 1.0}, "--discount must lie between 0 and 1"),
        ({"checkpoint": tmp_path / "nowhere"}, "is not there"),
        ({"checkpoint": tmp_path}, "is no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            stage.main(stage.Config(out, **wrong))
    out.mkdir()
    (out / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="holds something else"):
        stage.main(stage.Config(out, from_scratch=True, **SMALL))
    assert (out / "thesis.txt").read_text() == "do not touch"
