"""The learner on problems with known answers, checkpoint round trips, and the script on both engines."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_mjx_sac as train
from booster_soccer.agents import sac_networks as nets
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.agents.sac import Batch, Sac, gaussian_kl, policy_arrays, teachers_from
from booster_soccer.envs import constants as c
from booster_soccer.envs.tasks import Tasks
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.rollout.collect import MjxLoop, NativeLoop, Statistics
from booster_soccer.store import checkpoints


def _config(tmp_path, **changes):
    defaults = dict(out=tmp_path / "pretrain", num_envs=8, total_steps=400, batch_size=32, updates_per_iteration=2,
                    buffer_size=1024, learning_starts=160, evaluation_lanes=3, evaluation_every=10**9, log_every=200)  # fmt: skip
    return train.Config(**defaults | changes)


def test_log_probability_matches_numerical_density():
    """Samples of one state: the mean of -log p equals the entropy estimated from a histogram, per joint."""
    params = nets.init_actor(jax.random.key(0), OBS_SIZE)
    obs = jnp.zeros((50_000, OBS_SIZE))
    action, log_prob = nets.sample_action(params, obs, jax.random.key(1))
    entropy = 0.0
    for joint in range(c.NUM_JOINTS):
        density, edges = np.histogram(np.asarray(action[:, joint]), bins=100, range=(-1, 1), density=True)
        p = density[density > 0]
        entropy -= np.sum(p * np.log(p)) * (edges[1] - edges[0])
    assert float(-log_prob.mean()) == pytest.approx(entropy, abs=0.1)


def test_normalizer_gives_mean_and_variance():
    rng = np.random.default_rng(0)
    data = rng.normal(3.0, 2.0, (5000, OBS_SIZE)).astype(np.float32)
    normalizer = nets.Normalizer.create(OBS_SIZE)
    for chunk in np.split(data, 10):
        normalizer = normalizer.update(jnp.asarray(chunk))
    np.testing.assert_allclose(normalizer.mean, data.mean(0), atol=1e-3)
    np.testing.assert_allclose(normalizer.std, data.std(0), rtol=1e-3)
    raised = SLICES["ball_pos_rel_robot_h"].start
    by_hand = (data[0] - data.mean(0)) / data.std(0)
    by_hand[raised : raised + 2] *= 4.0
    np.testing.assert_allclose(normalizer(data[0])[:raised], by_hand[:raised], atol=1e-3)
    np.testing.assert_allclose(normalizer(data[0])[raised : raised + 3], by_hand[raised : raised + 3], atol=1e-2)
    constant = nets.Normalizer.create(OBS_SIZE).update(jnp.ones((100, OBS_SIZE)))
    np.testing.assert_allclose(constant.std, nets.Normalizer.MIN_STD)


def test_bandit_actor_finds_the_best_action(tmp_path):
    """One-step episodes with reward -|a - 0.5|^2: the mean action goes to 0.5 and Q to zero."""
    sac = Sac(_config(tmp_path, learning_rate=(1e-3, 1e-3), mirror=False))
    state = sac.init(jax.random.key(0))
    update = jax.jit(sac.update_many)
    rng = np.random.default_rng(0)
    for _ in range(80):
        action = rng.uniform(-1, 1, (10, 128, c.NUM_JOINTS)).astype(np.float32)
        reward = -((action - 0.5) ** 2).sum(-1)
        obs = np.zeros((10, 128, CRITIC_OBS_SIZE), np.float32)
        state, metrics = update(state, Batch(obs, action, reward, obs, np.ones_like(reward)), 1.0)
    mean = nets.mean_action(state.actor, state.normalizer(jnp.zeros(OBS_SIZE)))
    np.testing.assert_allclose(mean, 0.5, atol=0.2)


@pytest.mark.parametrize("terminated, expected", [(0.0, 1.0 / (1 - 0.5)), (1.0, 1.0)])
def test_only_termination_stops_the_bootstrap(tmp_path, terminated, expected):
    """Reward 1 for ever at discount 0.5: Q is 2; if every step terminates, Q is 1."""
    sac = Sac(_config(tmp_path, discount=(0.5, 0.5), target_tau=0.1, learning_rate=(1e-3, 1e-3), mirror=False))
    state = sac.init(jax.random.key(0))
    update = jax.jit(sac.update_many)
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape = (10, 32)
        action = rng.uniform(-1, 1, (*shape, c.NUM_JOINTS)).astype(np.float32)
        obs = np.zeros((*shape, CRITIC_OBS_SIZE), np.float32)
        ones = np.ones(shape, np.float32)
        state, metrics = update(state, Batch(obs, action, ones, obs, ones * terminated), 1.0)
    assert float(metrics["q"]) == pytest.approx(expected, abs=0.1)


def test_the_policy_is_a_running_average_of_the_actor_and_is_what_a_checkpoint_holds(tmp_path):
    sac = Sac(_config(tmp_path, policy_tau=0.25))
    before = sac.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(32, CRITIC_OBS_SIZE)), rng.uniform(-1, 1, (32, c.NUM_JOINTS))
    batch = jax.tree.map(jnp.float32, Batch(obs, action, np.ones(32), obs, np.zeros(32)))
    after, _ = jax.jit(sac.update)(before, batch, 0.0)
    kernels = [np.asarray(params["output"]["kernel"]) for params in (before.policy, after.actor, after.policy)]
    assert np.abs(kernels[1] - kernels[0]).max() > 1e-5
    np.testing.assert_allclose(kernels[2], 0.75 * kernels[0] + 0.25 * kernels[1], atol=1e-7)
    np.testing.assert_array_equal(policy_arrays(after)["actor.output.kernel"], kernels[2])


def test_kl_of_gaussians_by_hand():
    """One joint: equal 0; a mean one (student's) sigma off 1/2; twice the teacher's sigma ln 2 - 3/8; joints add up."""
    mean, log_std = jnp.zeros((4, 2)), jnp.zeros((4, 2))
    student_mean = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    student_log_std = jnp.array([[0.0, 0.0], [0.0, 0.0], [jnp.log(2.0), 0.0], [0.0, 0.0]])
    divergence = gaussian_kl((mean, log_std), (student_mean, student_log_std))
    np.testing.assert_allclose(divergence, [0.0, 0.5, np.log(2) - 0.375, 0.5 + 2.0], atol=1e-6)


def _teachers(means: tuple[float, ...]) -> dict:
    """A policy for each task that always does the same, whatever it sees; with normalisers of their own."""
    arrays = []
    for index, mean in enumerate(means):
        actor = jax.tree.map(jnp.zeros_like, nets.init_actor(jax.random.key(index), OBS_SIZE))
        raw = np.full(c.NUM_JOINTS, np.arctanh(mean))
        actor["output"]["bias"] = jnp.asarray(np.concatenate([raw, np.full(c.NUM_JOINTS, -2.0)]), jnp.float32)
        normalizer = {"normalizer.mean": np.full(OBS_SIZE, 0.1 * index), "normalizer.std": np.full(OBS_SIZE, 2.0)}
        arrays.append(nets.flatten("actor", actor) | {k: v.astype(np.float32) for k, v in normalizer.items()})
    return teachers_from(arrays)


def test_each_task_has_its_own_teacher_who_sees_what_it_is_used_to():
    params = [nets.init_actor(jax.random.key(i), OBS_SIZE) for i in range(3)]
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(3, OBS_SIZE)), rng.uniform(0.5, 2.0, (3, OBS_SIZE))
    arrays = [nets.flatten("actor", p) | {"normalizer.mean": m.astype(np.float32), "normalizer.std": s.astype(np.float32)}
              for p, m, s in zip(params, mean, std)]  # fmt: skip
    obs = rng.normal(size=(5, OBS_SIZE)).astype(np.float32)
    task = np.array([2, 0, 1, 1, 2])
    obs[:, SLICES["task_one_hot"]] = np.eye(3)[task]
    got, log_std = teachers_from(arrays)(jnp.asarray(obs))
    for row, index in enumerate(task):
        expected, raw_log_std = nets.actor_output(params[index], (obs[row] - mean[index]) / std[index])
        np.testing.assert_allclose(got[row], expected, atol=1e-6)
        np.testing.assert_allclose(log_std[row], np.clip(raw_log_std, -5.0, 0.0), atol=1e-6)


@pytest.mark.parametrize("ramp, expected", [(0.0, (-0.6, -0.3, 0.2)), (1.0, (0.5, 0.5, 0.5))])
def test_the_actor_first_does_as_its_teachers_and_then_as_the_critics_say(tmp_path, ramp, expected):
    """The bandit whose best action is 0.5, in three tasks whose teachers do something else."""
    config = _config(tmp_path, learning_rate=(1e-3, 1e-3), mirror=False, imitation=(1.0, 0.0))
    sac = Sac(config, _teachers((-0.6, -0.3, 0.2)))
    state = sac.init(jax.random.key(0))
    update = jax.jit(sac.update_many)
    rng = np.random.default_rng(0)
    for _ in range(80):
        action = rng.uniform(-1, 1, (10, 128, c.NUM_JOINTS)).astype(np.float32)
        obs = np.zeros((10, 128, CRITIC_OBS_SIZE), np.float32)
        obs[..., SLICES["task_one_hot"]] = np.eye(3)[rng.integers(0, 3, (10, 128))]
        reward = -((action - 0.5) ** 2).sum(-1)
        state, metrics = update(state, Batch(obs, action, reward, obs, np.ones_like(reward)), ramp)
    for task, wanted in enumerate(expected):
        obs = jnp.zeros(OBS_SIZE).at[SLICES["task_one_hot"].start + task].set(1.0)
        np.testing.assert_allclose(nets.mean_action(state.actor, state.normalizer(obs)), wanted, atol=0.2)
    assert (float(metrics["teacher_kl"]) < 0.2) == (ramp == 0.0)
    assert (float(state.log_alpha) == pytest.approx(np.log(config.initial_temperature))) == (ramp == 0.0)


def test_a_run_with_teachers_names_them_and_goes_on_only_with_the_same(tmp_path):
    small = dict(engine="native", total_steps=240)
    first = checkpoints.load(train.main(_config(tmp_path, **small)))
    other = checkpoints.load(train.main(_config(tmp_path, out=tmp_path / "other", seed=1, **small)))
    changes = small | dict(out=tmp_path / "taught", teachers=(first.path, first.path, other.path))
    taught = checkpoints.load(train.main(_config(tmp_path, **changes)))
    assert [teacher["hash"] for teacher in taught.manifest["config"]["teachers"]] == [
        first.hash,
        first.hash,
        other.hash,
    ]
    changes["total_steps"] = 320
    with pytest.raises(UserError, match="was run with teachers"):
        train.main(_config(tmp_path, **changes | dict(teachers=(first.path,) * 3, resume=True)))
    train.main(_config(tmp_path, **changes | dict(resume=True)))
    assert checkpoints.load_latest(tmp_path / "taught.resume").manifest["steps"] == 320


def test_native_run_writes_a_loadable_checkpoint_and_resumes(tmp_path):
    config = _config(tmp_path, engine="native", dr_level=3)
    path = train.main(config)
    checkpoint = checkpoints.load(path, ("pretrained",))
    assert checkpoint.golden_obs.shape == (16, OBS_SIZE)
    actions = policy_from_arrays(checkpoint.arrays)(checkpoint.golden_obs)
    np.testing.assert_allclose(actions, checkpoint.golden_actions, atol=1e-5)
    latest = checkpoints.load_latest(tmp_path / "pretrain.resume")
    assert latest.manifest["steps"] == 400
    resumed = train.main(_config(tmp_path, engine="native", dr_level=3, total_steps=600, resume=True))
    assert resumed == path
    assert checkpoints.load_latest(tmp_path / "pretrain.resume").manifest["steps"] == 600


def test_pairs_of_settings_go_from_the_first_to_the_last(tmp_path):
    """At the start of the ramp a gradient step has the first learning rate, at its end the last."""
    sac = Sac(_config(tmp_path, learning_rate=(1e-3, 1e-4), weight_decay=0.0))
    before = sac.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(32, CRITIC_OBS_SIZE)), rng.uniform(-1, 1, (32, c.NUM_JOINTS))
    batch = jax.tree.map(jnp.float32, Batch(obs, action, np.ones(32), obs, np.zeros(32)))
    moved = []
    for ramp in (0.0, 0.5, 1.0):
        after, _ = jax.jit(sac.update)(before, batch, ramp)
        moved.append(float(jnp.abs(after.critic["output"]["bias"] - before.critic["output"]["bias"]).max()))
    np.testing.assert_allclose(moved, [1e-3, 5.5e-4, 1e-4], rtol=1e-3)  # Adam's first step is the learning rate


def test_a_run_from_another_policy_starts_with_it_and_names_it(tmp_path):
    first = checkpoints.load(train.main(_config(tmp_path, engine="native", total_steps=240)))
    changes = dict(out=tmp_path / "next", engine="native", total_steps=160, learning_starts=10**6)
    second = checkpoints.load(train.main(_config(tmp_path, init=first.path, **changes)))
    np.testing.assert_array_equal(second.arrays["actor.output.kernel"], first.arrays["actor.output.kernel"])
    assert second.manifest["parent"] == {"stage": "pretrained", "hash": first.hash}
    with pytest.raises(UserError, match="started from another checkpoint"):
        train.main(_config(tmp_path, **changes | {"total_steps": 320}, resume=True))


def test_episodes_run_to_their_full_length(tmp_path):
    """After each lane's first episode, cut to stagger the lanes, episodes last `max_actions`."""
    config = train.resolve(_config(tmp_path, num_envs=16, max_actions=12, engine="native"))
    sac = Sac(config)
    loop = NativeLoop(config, sac, Tasks())
    state, statistics = sac.init(jax.random.key(0)), Statistics()
    for _ in range(config.max_actions):
        state, _ = loop.iterate(state, False, statistics)
    statistics.take()
    for _ in range(2 * config.max_actions):
        state, _ = loop.iterate(state, False, statistics)
    loop.close()
    # Nobody falls in 0.24 s, so every episode is cut by time.
    assert statistics.take()["episode/length"] == config.max_actions


def test_same_seed_same_result(tmp_path):
    arrays = []
    for name in ("a", "b"):
        path = train.main(_config(tmp_path, out=tmp_path / name, engine="native"))
        arrays.append(checkpoints.load(path, verify=False).arrays)
    for key, value in arrays[0].items():
        np.testing.assert_array_equal(value, arrays[1][key], err_msg=key)


def test_a_diverged_run_says_so_before_it_is_scored_and_keeps_what_is_good(tmp_path, monkeypatch):
    """NaN rewards from the second half on: an evaluation that is due then does not see the broken policy."""
    good = train.main(_config(tmp_path, engine="native", total_steps=240))
    before = checkpoints.load(good).hash
    iterate = NativeLoop.iterate

    def broken(self, state, learn, statistics):
        state, metrics = iterate(self, state, learn, statistics)
        return state, {name: value * np.nan for name, value in metrics.items()}

    def evaluated(*_):
        raise AssertionError("a diverged policy was evaluated")

    monkeypatch.setattr(NativeLoop, "iterate", broken)
    monkeypatch.setattr(train.Evaluator, "__call__", evaluated)
    changes = dict(engine="native", total_steps=320, evaluation_every=8, log_every=10**9, resume=True)
    with pytest.raises(UserError, match="diverged before step 248"):
        train.main(_config(tmp_path, **changes))
    assert checkpoints.load(good).hash == before
    assert checkpoints.load_latest(tmp_path / "pretrain.resume").manifest["steps"] == 240


def test_a_policy_under_which_the_physics_breaks_is_not_the_best(tmp_path, monkeypatch):
    """A broken lane's score is 0, more than standing brings; such an evaluation is recorded, its policy not kept."""
    original = train.Evaluator.__init__

    def init(self, config, tasks):
        original(self, config, tasks)
        step = self.engine.step

        def breaking(target_rad):
            step(target_rad)
            self.engine.state[1, 12] = np.nan
            self.engine.sensordata[1] = np.nan

        self.engine.step = breaking

    monkeypatch.setattr(train.Evaluator, "__init__", init)
    train.main(_config(tmp_path, engine="native", total_steps=240))
    records = [json.loads(line) for line in (tmp_path / "pretrain.metrics.jsonl").read_text().splitlines()]
    assert [row["eval/diverged"] for row in records if "eval/score" in row] == [1.0]
    assert not (tmp_path / "pretrain").exists()
    checkpoints.load_latest(tmp_path / "pretrain.resume")


def test_mjx_resets_a_broken_lane_and_counts_it(tmp_path):
    config = train.resolve(_config(tmp_path, engine="mjx", num_envs=2, buffer_size=64))
    sac = Sac(config)
    loop, statistics, state = MjxLoop(config, sac, Tasks()), Statistics(), sac.init(jax.random.key(0))
    data = loop.loop.data
    loop.loop = loop.loop._replace(data=data.replace(qvel=data.qvel.at[1, 3].set(jnp.nan)))
    loop.iterate(state, False, statistics)
    assert statistics.take()["diverged"] == 1
    assert np.isfinite(loop.obs).all() and np.isfinite(loop.loop.data.qpos).all()
    assert all(np.isfinite(rows).all() for rows in loop.loop.buffer)


def test_mjx_run_on_cpu(tmp_path):
    """The GPU path (one jitted loop) for a few steps."""
    config = _config(tmp_path, engine="mjx", total_steps=320, learning_starts=160, dr_level=1)
    checkpoint = checkpoints.load(train.main(config), ("pretrained",))
    assert all(np.isfinite(value).all() for value in checkpoint.arrays.values())


@pytest.mark.parametrize("bad, words", [({"preset": "huge"}, "huge"), ({"dr_level": 7}, "dr-level 7"), ({"num_envs": 0}, "num-envs"),
                                         ({"seed": -1}, "seed"), ({"buffer_size": 4}, "buffer-size"),
                                         ({"ramp_steps": (9, 9)}, "ramp-steps"), ({"teachers": (Path("a"),)}, "takes 3")])  # fmt: skip
def test_bad_flags_are_refused(tmp_path, bad, words):
    with pytest.raises(UserError, match=words):
        train.main(_config(tmp_path, **bad))


def test_foreign_output_directory_is_refused(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError):
        train.main(_config(tmp_path))
    assert (tmp_path / "pretrain" / "thesis.txt").read_text() == "mine"


def test_presets_fill_only_what_was_not_given(tmp_path):
    config = train.resolve(train.Config(out=tmp_path, preset="l4", num_envs=64))
    assert config.num_envs == 64 and config.batch_size == train.PRESETS["l4"]["batch_size"]


@pytest.mark.parametrize("preset", ["cpu", "l4", "h200"])
def test_the_ramp_takes_the_last_six_tenths_of_a_run(tmp_path, preset):
    config = train.resolve(train.Config(out=tmp_path, preset=preset))
    assert config.ramp_steps == (0.4 * config.total_steps, config.total_steps)
    assert config.updates_per_iteration * config.batch_size / config.num_envs == 16  # samples per transition
