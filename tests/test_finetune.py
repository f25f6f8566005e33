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
from booster_soccer.rollout.rounds import Round
from booster_soccer.store import checkpoints
from booster_soccer.store.run import RecordConfig
from tests import metric_names

MEAN, SCALE = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
SMALL = replace(
    stage.PRESETS["scratch"], total_steps=240, num_lanes=c.NUM_TASKS, round_actions=20, warmup_rounds=2,
    validation_episodes=2, confirmation_episodes=2, device="cpu",
    ddpg=DdpgConfig(freeze_hidden_until=80, freeze_input_until=160, batch_size=16, actor_learning_rate=3e-4),
    records=RecordConfig(log_every=60, judge_every=240),
)  # fmt: skip


def batch(subject: Ddpg, size: int = 32, seed: int = 0) -> Batch:
    """A round of the subject's own policy, with random returns."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(size, CRITIC_OBS_SIZE)).astype(np.float32)
    rows = seen, subject.act(seen[:, :OBS_SIZE]), rng.normal(size=(size, c.NUM_JOINTS)), *rng.normal(size=(2, size))
    return Batch(*(torch.as_tensor(row, dtype=torch.float32) for row in rows))


def learn(subject: Ddpg, rows: Batch, layers: tuple[str, ...] = LAYERS, seed: int = 0) -> dict[str, float]:
    return subject.learn(rows, layers, np.random.default_rng(seed))


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
        learn(subject, batch(subject, seed=seed), trained)
    after, learning = subject.arrays(), subject.state()
    for layer in LAYERS:
        for kind in ("weight", "bias"):
            for now in (after[f"actor.{layer}.{kind}"], learning[f"learning_actor.{layer}.{kind}"]):
                assert np.array_equal(before[f"actor.{layer}.{kind}"], now) == (layer not in trained), (layer, kind)
    assert not np.array_equal(before["critic.0.input.weight"], after["critic.0.input.weight"])


def test_thawing_later_leaves_no_trace_of_freezing():
    """A layer that thaws starts with fresh optimiser moments: its first step has Adam's full length."""
    subject = learner(epochs=1, batch_size=32, kl_per_round=0.0)
    for seed in range(3):
        learn(subject, batch(subject, seed=seed), LAYERS[2:])
    before = subject.state()["learning_actor.hidden.weight"]
    learn(subject, batch(subject, seed=9), LAYERS)
    moved = np.abs(subject.state()["learning_actor.hidden.weight"] - before)
    assert np.median(moved) == pytest.approx(3e-4, rel=0.01)


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


def test_advantages_by_hand():
    """Three actions of two lanes at discount 0.5; after two, one ends by its rules, the other by time."""
    reward = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    value = np.array([[10.0, 10.0], [20.0, 20.0], [40.0, 40.0]])
    next_value = np.array([[20.0, 20.0], [30.0, 30.0], [8.0, 8.0]])
    terminated, ended = np.array([[0, 0], [1, 0], [0, 0]]), np.array([[0, 0], [1, 1], [0, 0]])
    surprise = [[1.0, 1.0], [2.0 - 20.0, 2.0 + 15.0 - 20.0], [4.0 + 4.0 - 40.0] * 2]
    arguments = reward, value, next_value, terminated, ended, 0.5
    np.testing.assert_allclose(ddpg.lambda_advantages(*arguments, 0.0), surprise)
    traced = [[1.0 + 0.25 * -18.0, 1.0 + 0.25 * -3.0], *surprise[1:]]
    np.testing.assert_allclose(ddpg.lambda_advantages(*arguments, 0.5), traced)
    # To the end: the Monte-Carlo return above the value, bootstrapped only where time ended the episode.
    whole = ddpg.lambda_advantages(*arguments, 1.0)[0]
    np.testing.assert_allclose(whole, [1.0 + 0.5 * 2.0 - 10.0, 1.0 + 0.5 * (2.0 + 0.5 * 30.0) - 10.0])


def test_outcomes_pull_along_the_noise_that_did_well_until_the_ratio_is_clipped():
    rows = batch(learner(), 2)._replace(advantage=torch.tensor([2.0, -3.0]))
    move = torch.zeros(2, c.NUM_JOINTS, requires_grad=True)
    ddpg.outcome_loss(move, rows, 0.2).backward()
    np.testing.assert_allclose(move.grad, -rows.noise * rows.advantage[:, None] / 2, rtol=1e-6)
    # Far along the noise of the good action, far from that of the bad one: nothing more to gain.
    far = (0.5 * rows.noise * torch.tensor([[1.0], [-1.0]])).requires_grad_(True)
    ddpg.outcome_loss(far, rows, 0.2).backward()
    np.testing.assert_array_equal(far.grad, np.zeros((2, c.NUM_JOINTS)))


@pytest.mark.parametrize("gradient", ["outcomes", "critics"])
def test_critics_find_the_values_and_the_actor_climbs_them(gradient):
    """On a one-step problem whose reward is the first action."""
    settings = {"actor_learning_rate": 3e-4, "critic_learning_rate": 1e-3, "kl_per_round": 0.0}
    subject = learner(actor_gradient=gradient, **settings)
    for seed in range(40):
        rows = batch(subject, 128, seed)
        first = (rows.mean + subject.config.exploration_std * rows.noise)[:, 0].clamp(-1, 1)
        loss = learn(subject, rows._replace(returns=first, advantage=rows.noise[:, 0]), seed=seed)["critic_loss"]
    assert loss < 0.05  # it starts near 0.7
    probe = np.random.default_rng(999).normal(size=(64, OBS_SIZE)).astype(np.float32)
    assert subject.act(probe)[:, 0].mean() > 0.3


def test_critics_learn_what_the_policy_cannot_see():
    """The return is a privileged number: the critics find it, though the policy's observation says nothing of it."""
    subject = learner(critic_learning_rate=1e-3)
    for seed in range(40):
        rows = batch(subject, 128, seed)
        loss = learn(subject, rows._replace(returns=rows.critic_obs[:, OBS_SIZE]), (), seed)["critic_loss"]
    assert loss < 0.2  # of two critics, for returns of variance 1


def test_what_is_shipped_follows_slowly():
    subject = learner(policy_tau=0.25)
    before = subject.arrays()
    learn(subject, batch(subject))
    after, learning = subject.arrays(), subject.state()
    for name in (name for name in before if name.startswith("actor")):
        expected = 0.75 * before[name] + 0.25 * learning[f"learning_{name}"]
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-6)


def test_a_round_moves_the_policy_by_the_divergence_that_was_asked_for():
    """From a learning rate ten times too small and ten times too large."""
    for start in (1e-6, 1e-4):
        subject = learner(kl_per_round=0.01, actor_learning_rate=start)
        moved = [learn(subject, batch(subject, 256, seed), seed=seed)["kl"] for seed in range(20)]
        assert 0.004 < np.mean(moved[-5:]) < 0.025, start
        assert max(moved) < 0.08, start  # it stops early


def test_half_of_what_is_learned_is_mirrored():
    subject = learner()
    rows = batch(subject, 4)
    both = subject._with_mirror_image(rows)
    for name, mirror in (("critic_obs", mirror_critic_observation), ("noise", mirror_action)):
        plain = getattr(rows, name).numpy()
        np.testing.assert_array_equal(getattr(both, name), np.concatenate([plain, mirror(plain)]))
    np.testing.assert_allclose(both.mean[4:], subject.act(both.critic_obs[4:, :OBS_SIZE].numpy()), rtol=0, atol=1e-6)
    for name in ("returns", "advantage"):
        np.testing.assert_array_equal(getattr(both, name), torch.cat([getattr(rows, name)] * 2))


def test_critics_of_a_smaller_reward_predict_as_much_less():
    subject, seen = learner(), np.random.default_rng(0).normal(size=(4, CRITIC_OBS_SIZE)).astype(np.float32)
    arrays = subject.arrays()
    smaller = Ddpg(subject.config, ddpg.rescale_critics(arrays, 0.1), MEAN, SCALE)
    np.testing.assert_allclose(smaller.value(seen), 0.1 * subject.value(seen), rtol=1e-5)
    assert np.array_equal(smaller.arrays()["actor.output.weight"], arrays["actor.output.weight"])


def test_random_networks_see_normalized_observations():
    rng = np.random.default_rng(5)
    mean, scale = rng.normal(0, 10, OBS_SIZE), rng.uniform(0.1, 8, OBS_SIZE)
    x = rng.normal(size=(4, OBS_SIZE))
    plain, folded = (policy_from_arrays(ddpg.random_arrays(1, *how)) for how in ((MEAN, SCALE), (mean, scale)))
    np.testing.assert_allclose(plain(x), folded(mean + scale * x), rtol=0, atol=1e-5)
    assert np.abs(plain(x)).max() < 0.02


# --- rounds -------------------------------------------------------------------------------------------


class Somewhere:
    """Just enough of a run, and of lanes, for `Finetuning` to look at a round."""

    def __init__(self, steps: int):
        self.steps, self.tasks = steps, list(c.TASKS)


def with_a_round(steps: int) -> stage.Finetuning:
    subject = stage.Finetuning(replace(SMALL, round_actions=5), Somewhere(steps), Somewhere(steps), None)
    subject.learner = learner()
    rng = np.random.default_rng(0)
    while not subject.round.full:
        shapes = {name: array.shape[1:] for name, array in subject.round.arrays.items()}
        subject.round.add(**{name: rng.normal(size=shape) for name, shape in shapes.items()})
    for name in ("terminated", "ended"):
        subject.round.arrays[name][:] = np.eye(5, 3, k=-2)  # after three, four and five actions
    return subject


@pytest.mark.parametrize(("steps", "alpha", "beta"), [(0, 1.0, 0.1), (120, 0.55, 0.55), (240, 0.1, 1.0)])
def test_rewards_are_mixed_when_a_round_is_learned_from(steps, alpha, beta):
    subject = with_a_round(steps)
    advantage, value = subject.returns(1.0)
    played, last = subject.round.arrays, [2, 3, 4]
    expected = alpha * 0.1 * played["dense"][last, range(3)] + beta * played["score"][last, range(3)]
    np.testing.assert_allclose((advantage + value)[last, range(3)], expected, rtol=1e-4, atol=1e-5)


def test_the_critics_are_judged_on_episodes_that_came_to_an_end(monkeypatch):
    subject = with_a_round(0)
    returns = np.random.default_rng(1).normal(size=(5, 3))
    value = 0.5 * returns
    value[3:, 0], value[4:, 1] = 1e6, 1e6  # of episodes that go on
    monkeypatch.setattr(subject, "returns", lambda trace_decay: (returns - value, value))
    seen = [returns[:length, lane] for lane, length in enumerate((3, 4, 5))]
    expected = [1.0 - np.mean((0.5 * part) ** 2) / part.var() for part in seen]
    np.testing.assert_allclose(subject.explained(), expected)
    subject.round.arrays["ended"][:, 1] = 0.0
    np.testing.assert_allclose(subject.explained(), [expected[0], np.nan, expected[2]])


def test_a_round_goes_on_where_it_was_saved():
    subject = with_a_round(0).round
    subject.filled = 3
    again = Round(5, 3)
    again.restore(subject.state(), "the saved state")
    assert again.filled == 3 and not again.full
    for name, array in again.arrays.items():
        np.testing.assert_array_equal(array[:3], subject.arrays[name][:3])
    with pytest.raises(UserError, match="the saved state: 'critic_obs' is"):
        Round(5, 6).restore(subject.state(), "the saved state")
    for filled in (np.zeros(2, int), np.array(np.nan), np.array(1.0)):  # found by fuzzing
        with pytest.raises(UserError, match="the saved state: '"):
            Round(5, 3).restore(subject.state() | {"filled": filled}, "the saved state")


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

    def __call__(self, policy, seeds, start_noise_rad, backend) -> Scores:
        self.first_seeds = self.first_seeds or seeds
        assert backend == ("twin" if seeds == self.first_seeds else "official")
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
    metrics, before = finetuned.manifest["metrics"], converted.manifest["steps"]
    assert metrics["result"] == result
    assert finetuned.manifest["steps"] == before + (0 if result == "start" else metrics["candidate_step"])
    for name in (name for name in converted.arrays if name.startswith("actor")):
        same = np.array_equal(finetuned.arrays[name], converted.arrays[name])
        assert same == (result == "start"), name
    if validation > 0:
        assert metrics["gain"] == pytest.approx(fresh) and metrics["candidate_step"] == 240
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.html", "out.metrics.jsonl"]


def scores_of(value: float) -> Scores:
    return Scores(*np.full((4, c.NUM_TASKS, 2), value))


@pytest.mark.parametrize(("best_again", "diverged_at", "chosen"), [(0.3, None, 240), (0.5, None, 120), (0.3, 240, 120)])
def test_the_best_in_validation_and_the_last_are_compared_on_other_seeds(monkeypatch, best_again, diverged_at, chosen):
    subject = with_a_round(240)
    subject.run.diverged_at = diverged_at
    policies = {"start": {"step": 0}, "best": {"step": 120}}
    subject.run.kept = {name: stage.Candidate(arrays, arrays["step"], scores_of(0.9 if arrays["step"] else 0.0).score)
                        for name, arrays in policies.items()}  # fmt: skip
    monkeypatch.setattr(subject.learner, "arrays", lambda: {"step": 240})
    again = {120: best_again, 240: 0.4}

    def validate(arrays, purpose):
        return scores_of(again[arrays["step"]] if purpose == stage._SELECTION else float(arrays["step"] > 0))

    monkeypatch.setattr(subject, "validate", validate)
    policy, verdict = subject.choose()
    assert (
        policy.arrays == {"step": chosen}
        and policy.steps == chosen
        and verdict["result"] == "candidate"
        and verdict["candidate_step"] == chosen
    )


# --- runs ---------------------------------------------------------------------------------------------


def test_a_tiny_run_in_the_official_environments(converted, tmp_path, capsys, monkeypatch):
    """With its own judge, the twin, from end to end; a finished run is recognised, another is refused."""
    config = replace(SMALL, out=tmp_path / "out", checkpoint=converted.path, from_scratch=False, backend="official")
    watched, watchdog = [], stage.Watchdog
    monkeypatch.setattr(stage, "Watchdog", lambda what, limit_s: watched.append(what) or watchdog(what, limit_s))
    path = stage.main(config)
    assert watched == ["the critics' warm-up", "the comparison at the end"]
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
    lanes = replace(SMALL, num_lanes=3 * c.NUM_TASKS)  # more than numbers in a random generator's state
    whole = replace(lanes, out=tmp_path / "whole")
    result = checkpoints.load(stage.main(whole))

    save = stage.Run.save

    def save_and_die(run, subject):
        save(run, subject)
        if run.steps >= 180:  # in the middle of episodes
            raise Killed

    often = replace(SMALL.records, checkpoint_every=60, checkpoint_interval_s=0.0)
    killed = replace(lanes, out=tmp_path / "killed", records=often)
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
    assert len(lines[0]) == 1 + 4  # warm-up, and every 60 steps
    assert [line.partition("reward/")[2] for line in lines[0]] == [line.partition("reward/")[2] for line in lines[1]]


def test_a_diverged_run_ends_with_what_was_best_before(converted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "judge", Judge(converted, 0.0, 0.0))
    learn_from, rounds = Ddpg.learn, []

    def diverging(self, *arguments):
        rounds.append(1)
        return learn_from(self, *arguments) | {"critic_loss": np.nan if len(rounds) > 4 else 1.0}

    monkeypatch.setattr(Ddpg, "learn", diverging)
    config = replace(SMALL, out=tmp_path / "out", checkpoint=converted.path, from_scratch=False)
    result = checkpoints.load(stage.main(config))
    assert result.manifest["metrics"]["diverged_before_step"] == 180
    assert "warning: training diverged before step 180" in capsys.readouterr().err
    np.testing.assert_array_equal(result.arrays["actor.output.weight"], converted.arrays["actor.output.weight"])


def test_bad_input(tmp_path):
    fine = replace(SMALL, out=tmp_path / "out")
    for wrong, message in (
        ({"from_scratch": False}, "give either --checkpoint DIR, or --preset scratch"),
        ({"checkpoint": tmp_path}, "give either --checkpoint DIR, or --preset scratch"),
        ({"num_lanes": c.NUM_TASKS + 1}, f"multiple of {c.NUM_TASKS}"),
        ({"round_actions": 0}, "--round-actions must be at least 1"),
        ({"ddpg": DdpgConfig(batch_size=0)}, "--batch-size must be at least 1"),
        ({"ddpg": DdpgConfig(exploration_std=0.0)}, "--exploration-std must lie between 0 and 1"),
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
