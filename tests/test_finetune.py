"""DDPG fine-tuning: the learner's arithmetic, freezing, judging, and small runs from end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import finetune_ddpg as stage
from booster_soccer.agents import ddpg
from booster_soccer.agents.ddpg import Batch, Ddpg, DdpgConfig
from booster_soccer.agents.policy import LAYERS, policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, mirror_critic_observation
from booster_soccer.preprocess.symmetry import mirror_action
from booster_soccer.rollout.judge import Scores, gain
from booster_soccer.store import checkpoints
from booster_soccer.store.replay import Replay
from booster_soccer.store.run import RecordConfig
from tests import metric_names

MEAN, SCALE = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
SMALL = replace(
    stage.PRESETS["scratch"], total_steps=60, num_lanes=3, warmup_steps=30, warmup_updates=2, updates_per_round=1,
    batch_size=16, buffer_size=64, validation_episodes=2, confirmation_episodes=2, device="cpu",
    ddpg=DdpgConfig(freeze_hidden_until=20, freeze_input_until=40, actor_every=1, actor_learning_rate=3e-4),
    records=RecordConfig(log_every=15, judge_every=60),
)  # fmt: skip


def batch(size: int = 32, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    rows = (
        rng.normal(size=(size, CRITIC_OBS_SIZE)),
        rng.uniform(-1, 1, (size, c.NUM_JOINTS)),
        rng.normal(size=size),
        rng.normal(size=(size, CRITIC_OBS_SIZE)),
        rng.integers(2, size=size),
    )
    return Batch(*(torch.as_tensor(row, dtype=torch.float32) for row in rows))


def learner(mean=MEAN, scale=SCALE, **changes) -> Ddpg:
    return Ddpg(replace(SMALL.ddpg, **changes), ddpg.random_arrays(0, mean, scale), mean, scale)


# --- the learner --------------------------------------------------------------------------------------


def test_freeze_schedule():
    expected = {0: 1, 19_999: 1, 20_000: 2, 49_999: 2, 50_000: 3, 10**6: 3}
    for preset in ("cpu", "l4", "h200"):
        for step, layers in expected.items():
            assert ddpg.trainable_layers(step, stage.PRESETS[preset].ddpg) == LAYERS[-layers:]


@pytest.mark.parametrize("trained", [(), LAYERS[2:], LAYERS[1:], LAYERS])
def test_frozen_layers_do_not_change_by_a_bit(trained):
    rng = np.random.default_rng(3)
    subject = learner(rng.normal(size=OBS_SIZE), rng.uniform(0.1, 5, OBS_SIZE))
    before = subject.arrays()
    for seed in range(4):
        subject.update(batch(seed=seed), trained)
    after = subject.arrays()
    for layer in LAYERS:
        for kind in ("weight", "bias"):
            name = f"actor.{layer}.{kind}"
            assert np.array_equal(before[name], after[name]) == (layer not in trained), name
    assert not np.array_equal(before["critic.0.input.weight"], after["critic.0.input.weight"])


def test_thawing_later_leaves_no_trace_of_freezing():
    """A layer that thaws starts with fresh optimiser moments: its first step has Adam's full length."""
    subject = learner()
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
                ddpg.step_as_if_normalized(optimizer, [layer], mean, scale)
            else:
                optimizer.step()
        torch.testing.assert_close(raw(x), normalized((x - mean) / scale), rtol=0, atol=1e-9)


def test_only_a_true_end_stops_the_bootstrap():
    subject = learner(discount=0.9)
    rows = batch(size=2)._replace(reward=torch.tensor([1.0, 1.0]), terminated=torch.tensor([1.0, 0.0]))
    with torch.no_grad():
        action = subject.target_actor(rows.next_critic_obs[:, :OBS_SIZE])
        both = (critic(rows.next_critic_obs, action) for critic in subject.target_critics)
        next_value = torch.minimum(*both)[1].item()
    value = subject.update(rows, ())["value"].item()
    assert value == pytest.approx((1.0 + (1.0 + 0.9 * next_value)) / 2, abs=1e-6)


def test_updates_fit_the_values_and_climb_them():
    """On a one-step problem whose reward is the first action, the critics find it and the actor follows."""
    subject = learner(actor_learning_rate=1e-3, critic_learning_rate=1e-3)
    for seed in range(400):
        rows = batch(64, seed)
        rows = rows._replace(reward=rows.action[:, 0], terminated=torch.ones(64))
        loss = subject.update(rows, LAYERS)["critic_loss"].item()
    assert loss < 0.05  # it starts near 0.7
    assert subject.act(batch(seed=999).critic_obs[:, :OBS_SIZE].numpy())[:, 0].mean() > 0.5


def test_critics_learn_what_the_policy_cannot_see():
    """The reward is a privileged number: the critics find it, though the policy's observation says nothing of it."""
    subject = learner(critic_learning_rate=1e-3)
    for seed in range(300):
        rows = batch(64, seed)
        rows = rows._replace(reward=rows.critic_obs[:, OBS_SIZE], terminated=torch.ones(64))
        loss = subject.update(rows, ())["critic_loss"].item()
    assert loss < 0.2  # of two critics, for a reward of variance 1


def test_targets_follow_slowly():
    subject = learner(target_tau=0.25)
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
    plain, folded = (policy_from_arrays(ddpg.random_arrays(1, *how)) for how in ((MEAN, SCALE), (mean, scale)))
    np.testing.assert_allclose(plain(x), folded(mean + scale * x), rtol=0, atol=1e-5)
    assert np.abs(plain(x)).max() < 0.02


# --- the buffer ---------------------------------------------------------------------------------------


class Somewhere:
    """Just enough of a run for `Finetuning` to sample."""

    def __init__(self, steps: int):
        self.steps = steps


def sampling(row: dict[str, np.ndarray], steps: int, **changes) -> Batch:
    config = replace(SMALL, **changes)
    subject = stage.Finetuning(config, Somewhere(steps), None, None)
    subject.learner = learner()
    subject.replay = Replay(64, stage._ROW_SHAPES)
    subject.replay.add(**row)
    return subject.sample()


def rows(count: int) -> dict[str, np.ndarray]:
    number = np.arange(count, dtype=np.float32)
    return {
        "critic_obs": np.tile(number[:, None], CRITIC_OBS_SIZE),
        "action": np.zeros((count, c.NUM_JOINTS)),
        "dense": number,
        "score": 10 * number,
        "next_critic_obs": np.tile(number[:, None] + 1, CRITIC_OBS_SIZE),
        "terminated": number % 2,
    }


@pytest.mark.parametrize(("steps", "alpha", "beta"), [(0, 1.0, 0.1), (30, 0.55, 0.55), (60, 0.1, 1.0)])
def test_rewards_are_mixed_when_sampled(steps, alpha, beta):
    sample = sampling(rows(8), steps, mirror=False, batch_size=64)
    number = sample.critic_obs[:, 0].numpy()
    np.testing.assert_allclose(sample.reward, alpha * number + beta * 10 * number, rtol=1e-5)
    np.testing.assert_array_equal(sample.next_critic_obs[:, 5], number + 1)
    np.testing.assert_array_equal(sample.terminated, number % 2)


def test_half_of_a_sample_is_mirrored():
    rng, names = np.random.default_rng(1), ("critic_obs", "next_critic_obs")
    row = rows(1) | {name: rng.normal(size=(1, CRITIC_OBS_SIZE)).astype(np.float32) for name in names}
    row["action"] = rng.normal(size=(1, c.NUM_JOINTS)).astype(np.float32)
    sample = sampling(row, 0, mirror=True, batch_size=4)
    mirrors = dict.fromkeys(names, mirror_critic_observation) | {"action": mirror_action}
    for name, mirror in mirrors.items():
        expected = np.concatenate([*2 * [mirror(row[name])], *2 * [row[name]]])
        np.testing.assert_array_equal(getattr(sample, name), expected)


# --- judging ------------------------------------------------------------------------------------------


def test_a_gain_and_its_standard_error_by_hand():
    start = np.zeros((3, 4))
    assert gain(start + 0.1, start) == pytest.approx((0.1, 0.0))
    lucky = start.copy()
    lucky[0, 0] = 3.0  # one episode of twelve
    # Variance of (3, 0, 0, 0) is 2.25; its mean's is 2.25 / 4; of the mean of three tasks, a ninth of that.
    assert gain(lucky, start) == pytest.approx((0.25, 0.25))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> checkpoints.Checkpoint:
    path = tmp_path_factory.mktemp("start") / "converted"
    obs = np.random.default_rng(0).normal(size=(checkpoints.GOLDEN_PAIRS, OBS_SIZE)).astype(np.float32)
    checkpoints.save(path, "converted", ddpg.random_arrays(2, MEAN, SCALE), obs, {}, 0, 500, [], {})
    return checkpoints.load(path)


class Judge:
    """Stands in for the twin: the start scores 0 on any seeds, a candidate what is given for each purpose."""

    def __init__(self, start: checkpoints.Checkpoint, validation: float, fresh: float):
        self.start = policy_from_arrays(start.arrays)
        self.by_purpose, self.first_seeds = (validation, fresh), None

    def __call__(self, policy, seeds, start_noise_rad) -> Scores:
        self.first_seeds = self.first_seeds or seeds
        is_start = all(np.array_equal(a, b) for a, b in zip(policy.kernels, self.start.kernels))
        score = 0.0 if is_start else self.by_purpose[seeds != self.first_seeds]
        table = np.full((c.NUM_TASKS, len(seeds)), score)
        return Scores(table, table, table, table)


@pytest.mark.parametrize(
    ("validation", "fresh", "result"),
    [(-0.1, 1.0, "start"), (0.5, -0.1, "start"), (0.5, 0.0, "start"), (0.5, 0.2, "candidate")],
)
def test_the_result_is_never_below_the_start(converted, tmp_path, monkeypatch, validation, fresh, result):
    """A candidate must be better in validation, and again on seeds that chose nothing; else the start comes back."""
    monkeypatch.setattr(stage, "judge", Judge(converted, validation, fresh))
    config = replace(SMALL, out=tmp_path / "out", checkpoint=converted.path, from_scratch=False)
    finetuned = checkpoints.load(stage.main(config), ("finetuned",))
    assert finetuned.manifest["parents"] == [{"stage": "converted", "hash": converted.hash}]
    assert finetuned.manifest["steps"] == 560
    metrics = finetuned.manifest["metrics"]
    assert metrics["result"] == result
    for name in (name for name in converted.arrays if name.startswith("actor")):
        same = np.array_equal(finetuned.arrays[name], converted.arrays[name])
        assert same == (result == "start"), name
    if validation > 0:
        assert metrics["gain"] == pytest.approx(fresh) and metrics["candidate_step"] == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.html", "out.metrics.jsonl"]


# --- runs ---------------------------------------------------------------------------------------------


def test_a_tiny_run_in_the_official_environments(converted, tmp_path, capsys):
    """With its own judge, the twin, from end to end; a finished run is recognised, another is refused."""
    config = replace(SMALL, out=tmp_path / "out", checkpoint=converted.path, from_scratch=False, backend="official")
    path = stage.main(config)
    assert capsys.readouterr().out.rstrip().endswith(str(path))
    with pytest.raises(UserError, match="holds a run: give --resume"):
        stage.main(config)
    before = checkpoints.load(path).hash
    assert stage.main(replace(config, resume=True)) == path
    assert "is finished already" in capsys.readouterr().out
    assert checkpoints.load(path).hash == before


class Killed(Exception):
    """The machine was taken away."""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, converted):
    monkeypatch.setattr(stage, "judge", Judge(converted, 0.0, 0.0))
    whole = replace(SMALL, out=tmp_path / "whole")
    result = checkpoints.load(stage.main(whole))

    save = stage.Run.save

    def save_and_die(run, subject):
        save(run, subject)
        if run.steps >= 45:  # in the middle of episodes
            raise Killed

    often = replace(SMALL.records, checkpoint_every=15, checkpoint_interval_s=0.0)
    killed = replace(SMALL, out=tmp_path / "killed", records=often)
    with monkeypatch.context() as patch:
        patch.setattr(stage.Run, "save", save_and_die)
        with pytest.raises(Killed):
            stage.main(killed)
    assert not killed.out.exists()
    with pytest.raises(UserError, match="holds a run: give --resume"):
        stage.main(killed)
    with pytest.raises(UserError, match="run with ddpg.discount = 0.995, not 0.9"):
        stage.main(replace(killed, resume=True, ddpg=replace(killed.ddpg, discount=0.9)))
    resumed = checkpoints.load(stage.main(replace(killed, resume=True)))
    for name, value in result.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], value)
    assert resumed.manifest["metrics"] == result.manifest["metrics"]
    metric_names.check(tmp_path / "whole.metrics.jsonl", "finetuned")
    # Losses, values and rewards of every line: equal to the last digit written.
    lines = [[line for line in (tmp_path / f"{name}.metrics.jsonl").read_text().splitlines() if "reward/dense" in line]
             for name in ("whole", "killed")]  # fmt: skip
    assert len(lines[0]) == 1 + 4  # warm-up, and every 15 steps
    assert [line.partition("reward/")[2] for line in lines[0]] == [line.partition("reward/")[2] for line in lines[1]]


def test_a_diverged_run_ends_with_what_was_best_before(converted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "judge", Judge(converted, 0.0, 0.0))
    update = Ddpg.update

    def diverging(self, batch, layers):
        metrics = update(self, batch, layers)
        return metrics | {"critic_loss": metrics["critic_loss"] * (np.nan if self.updates > 8 else 1.0)}

    monkeypatch.setattr(Ddpg, "update", diverging)
    config = replace(SMALL, out=tmp_path / "out", checkpoint=converted.path, from_scratch=False)
    result = checkpoints.load(stage.main(config))
    assert result.manifest["metrics"]["diverged_before_step"] == 30
    assert "warning: training diverged before step 30" in capsys.readouterr().err
    np.testing.assert_array_equal(result.arrays["actor.output.weight"], converted.arrays["actor.output.weight"])


def test_bad_input(tmp_path):
    fine = replace(SMALL, out=tmp_path / "out")
    for wrong, message in (
        ({"from_scratch": False}, "give either --checkpoint DIR, or --preset scratch"),
        ({"checkpoint": tmp_path}, "give either --checkpoint DIR, or --preset scratch"),
        ({"num_lanes": 4}, "multiple of 3"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"warmup_steps": 10, "batch_size": 20}, "--warmup-steps must be at least batch_size"),
        ({"ddpg": DdpgConfig(discount=1.0)}, "--discount must lie between 0 and 1"),
        ({"from_scratch": False, "checkpoint": tmp_path / "nowhere"}, "is not there"),
        ({"from_scratch": False, "checkpoint": tmp_path}, "is no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            stage.main(replace(fine, **wrong))
    fine.out.mkdir()
    (fine.out / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="holds something else"):
        stage.main(fine)
    assert (fine.out / "thesis.txt").read_text() == "do not touch"
