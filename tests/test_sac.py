"""The learner on problems with known answers, and the script: checkpoints, parents, divergence, flags."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_mjx_sac as train
from booster_soccer.agents import sac
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.agents.sac import Batch, Sac, SacConfig, gaussian_kl, policy_arrays, teachers_from
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE, SLICES
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.store import checkpoints
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.store.run import Run
from tests import metric_names
from tests.small_pretraining import CALL, COLLECT, LANES, LEARNER, RECORDS, Still, config, no_judge

# --- the learner ------------------------------------------------------------------------------------------


def optimised(update):
    """Compiled with what `conftest.py` switches off: here hundreds of updates follow."""
    return jax.jit(update, compiler_options={"xla_backend_optimization_level": 1})


def test_log_probability_matches_numerical_density():
    """Samples of one state: the mean of -log p equals the entropy estimated from a histogram, per joint."""
    params = sac.init_actor(jax.random.key(0))
    obs = jnp.zeros((50_000, OBS_SIZE))
    action, log_prob = sac.sample_action(params, obs, jax.random.key(1))
    entropy = 0.0
    for joint in range(c.NUM_JOINTS):
        density, edges = np.histogram(np.asarray(action[:, joint]), bins=100, range=(-1, 1), density=True)
        p = density[density > 0]
        entropy -= np.sum(p * np.log(p)) * (edges[1] - edges[0])
    assert float(-log_prob.mean()) == pytest.approx(entropy, abs=0.1)


def test_normalizer_gives_mean_and_variance():
    rng = np.random.default_rng(0)
    data = rng.normal(3.0, 2.0, (5000, OBS_SIZE)).astype(np.float32)
    normalizer = sac.Normalizer.create()
    for chunk in np.split(data, 10):
        normalizer = normalizer.update(jnp.asarray(chunk))
    np.testing.assert_allclose(normalizer.mean, data.mean(0), atol=1e-3)
    np.testing.assert_allclose(normalizer.std, data.std(0), rtol=1e-3)
    raised = SLICES["ball_pos_rel_robot_h"].start
    by_hand = (data[0] - data.mean(0)) / data.std(0)
    by_hand[raised : raised + 2] *= 4.0
    np.testing.assert_allclose(normalizer(data[0])[:raised], by_hand[:raised], atol=1e-3)
    np.testing.assert_allclose(normalizer(data[0])[raised : raised + 3], by_hand[raised : raised + 3], atol=1e-2)
    constant = sac.Normalizer.create().update(jnp.ones((100, OBS_SIZE)))
    np.testing.assert_allclose(constant.std, 0.05)


def test_a_fresh_learner_has_the_types_of_one_that_has_learned():
    """A weak type would make a run's first call another program than all that follow: MJX's is compiled for minutes."""
    state = Sac(SacConfig()).init(jax.random.key(0))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state._replace(key=None)))


def test_bandit_actor_finds_the_best_action():
    """One-step episodes with reward -|a - 0.5|^2: the mean action goes to 0.5 and Q to zero."""
    learner = Sac(SacConfig(learning_rate=(1e-3, 1e-3), mirror=False))
    state = learner.init(jax.random.key(0))
    update = optimised(learner.update_many)
    rng = np.random.default_rng(0)
    for _ in range(80):
        action = rng.uniform(-1, 1, (10, 128, c.NUM_JOINTS)).astype(np.float32)
        reward = -((action - 0.5) ** 2).sum(-1)
        obs = np.zeros((10, 128, CRITIC_OBS_SIZE), np.float32)
        state, metrics = update(state, Batch(obs, action, reward, obs, np.ones_like(reward)), 1.0)
    mean = sac.mean_action(state.actor, state.normalizer(jnp.zeros(OBS_SIZE)))
    np.testing.assert_allclose(mean, 0.5, atol=0.2)


@pytest.mark.parametrize("terminated, expected", [(0.0, 1.0 / (1 - 0.5)), (1.0, 1.0)])
def test_only_termination_stops_the_bootstrap(terminated, expected):
    """Reward 1 for ever at discount 0.5: Q is 2; if every step terminates, Q is 1."""
    learner = Sac(SacConfig(discount=(0.5, 0.5), target_tau=0.1, learning_rate=(1e-3, 1e-3), mirror=False))
    state = learner.init(jax.random.key(0))
    update = optimised(learner.update_many)
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape = (10, 32)
        action = rng.uniform(-1, 1, (*shape, c.NUM_JOINTS)).astype(np.float32)
        obs = np.zeros((*shape, CRITIC_OBS_SIZE), np.float32)
        ones = np.ones(shape, np.float32)
        state, metrics = update(state, Batch(obs, action, ones, obs, ones * terminated), 1.0)
    assert float(metrics["q"]) == pytest.approx(expected, abs=0.1)


def test_the_policy_is_a_running_average_of_the_actor_and_is_what_a_checkpoint_holds():
    learner = Sac(SacConfig(policy_tau=0.25))
    before = learner.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(32, CRITIC_OBS_SIZE)), rng.uniform(-1, 1, (32, c.NUM_JOINTS))
    batch = jax.tree.map(jnp.float32, Batch(obs, action, np.ones(32), obs, np.zeros(32)))
    after, _ = jax.jit(learner.update)(before, batch, 0.0)
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
        actor = jax.tree.map(jnp.zeros_like, sac.init_actor(jax.random.key(index)))
        raw = np.full(c.NUM_JOINTS, np.arctanh(mean))
        actor["output"]["bias"] = jnp.asarray(np.concatenate([raw, np.full(c.NUM_JOINTS, -2.0)]), jnp.float32)
        normalizer = {"normalizer.mean": np.full(OBS_SIZE, 0.1 * index), "normalizer.std": np.full(OBS_SIZE, 2.0)}
        arrays.append(sac.flatten("actor", actor) | {k: v.astype(np.float32) for k, v in normalizer.items()})
    return teachers_from(arrays)


def test_each_task_has_its_own_teacher_who_sees_what_it_is_used_to():
    params = [sac.init_actor(jax.random.key(i)) for i in range(c.NUM_TASKS)]
    rng = np.random.default_rng(0)
    shape = (c.NUM_TASKS, OBS_SIZE)
    mean, std = rng.normal(size=shape), rng.uniform(0.5, 2.0, shape)
    normalizers = [{"normalizer.mean": np.float32(m), "normalizer.std": np.float32(s)} for m, s in zip(mean, std)]
    arrays = [sac.flatten("actor", p) | normalizer for p, normalizer in zip(params, normalizers)]
    obs = rng.normal(size=(5, OBS_SIZE)).astype(np.float32)
    task = np.array([2, 0, 1, 1, 2])
    obs[:, SLICES["task_one_hot"]] = np.eye(c.NUM_TASKS)[task]
    got, log_std = teachers_from(arrays)(jnp.asarray(obs))
    for row, index in enumerate(task):
        expected, raw_log_std = sac.actor_output(params[index], (obs[row] - mean[index]) / std[index])
        np.testing.assert_allclose(got[row], expected, atol=1e-6)
        np.testing.assert_allclose(log_std[row], np.clip(raw_log_std, -5.0, 0.0), atol=1e-6)


@pytest.mark.parametrize("ramp, expected", [(0.0, (-0.6, -0.3, 0.2)), (1.0, (0.5, 0.5, 0.5))])
def test_the_actor_first_does_as_its_teachers_and_then_as_the_critics_say(ramp, expected):
    """The bandit whose best action is 0.5, in three tasks whose teachers do something else."""
    settings = SacConfig(learning_rate=(1e-3, 1e-3), mirror=False, imitation=(1.0, 0.0))
    learner = Sac(settings, _teachers((-0.6, -0.3, 0.2)))
    state = learner.init(jax.random.key(0))
    update = optimised(learner.update_many)
    rng = np.random.default_rng(0)
    for _ in range(80):
        action = rng.uniform(-1, 1, (10, 128, c.NUM_JOINTS)).astype(np.float32)
        obs = np.zeros((10, 128, CRITIC_OBS_SIZE), np.float32)
        obs[..., SLICES["task_one_hot"]] = np.eye(3)[rng.integers(0, 3, (10, 128))]
        reward = -((action - 0.5) ** 2).sum(-1)
        state, metrics = update(state, Batch(obs, action, reward, obs, np.ones_like(reward)), ramp)
    for task, wanted in enumerate(expected):
        obs = jnp.zeros(OBS_SIZE).at[SLICES["task_one_hot"].start + task].set(1.0)
        np.testing.assert_allclose(sac.mean_action(state.actor, state.normalizer(obs)), wanted, atol=0.2)
    assert (float(metrics["teacher_kl"]) < 0.2) == (ramp == 0.0)
    assert (float(state.log_alpha) == pytest.approx(np.log(settings.initial_temperature))) == (ramp == 0.0)


def test_pairs_of_settings_go_from_the_first_to_the_last():
    """At the start of the ramp a gradient step has the first learning rate, at its end the last."""
    learner = Sac(SacConfig(learning_rate=(1e-3, 1e-4), weight_decay=0.0))
    before = learner.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(32, CRITIC_OBS_SIZE)), rng.uniform(-1, 1, (32, c.NUM_JOINTS))
    batch = jax.tree.map(jnp.float32, Batch(obs, action, np.ones(32), obs, np.zeros(32)))
    moved = []
    for ramp in (0.0, 0.5, 1.0):
        after, _ = jax.jit(learner.update)(before, batch, ramp)
        moved.append(float(jnp.abs(after.critic["output"]["bias"] - before.critic["output"]["bias"]).max()))
    np.testing.assert_allclose(moved, [1e-3, 5.5e-4, 1e-4], rtol=1e-3)  # Adam's first step is the learning rate


# --- the script -------------------------------------------------------------------------------------------


class Killed(Exception):
    """The machine was taken away."""


def test_a_run_writes_a_checkpoint_and_one_killed_on_the_way_ends_with_the_same_bits(tmp_path, monkeypatch):
    """The first one judged by the real judge."""
    first = checkpoints.load(train.main(config(tmp_path / "a")), ("pretrained",))
    monkeypatch.setattr(train, "judge", no_judge)
    # Its state is saved in the middle of learning, when rows have been drawn from its buffer.
    often = replace(RECORDS, checkpoint_every=3 * CALL // 2 * LANES)
    killed, save = config(tmp_path / "b", records=often), train.Run.save

    def save_and_die(run, subject):
        save(run, subject)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Run, "save", save_and_die)
        train.main(killed)
    second = checkpoints.load(train.main(replace(killed, resume=True)))
    for name, values in first.arrays.items():
        np.testing.assert_array_equal(values, second.arrays[name], err_msg=name)
    actions = policy_from_arrays(first.arrays)(first.golden_obs)
    np.testing.assert_allclose(actions, first.golden_actions, rtol=0, atol=1e-5)
    metrics = first.manifest["metrics"]
    assert first.manifest["steps"] == metrics["best_step"] == metrics["steps"] == config(tmp_path).total_steps
    assert set(metrics["scores"]) == set(c.TASKS)
    assert metrics["best_score"] == pytest.approx(np.mean(list(metrics["scores"].values())))
    assert metrics["scores"]["goalie"] < -2.0  # it falls at once
    metric_names.check(tmp_path / "a.metrics.jsonl", "pretrained")


def _pretrained(path: Path, seed: int) -> Checkpoint:
    """A checkpoint with a fresh learner's networks."""
    arrays = policy_arrays(Sac(LEARNER).init(jax.random.key(seed)))
    obs = np.random.default_rng(seed).normal(size=(checkpoints.GOLDEN_PAIRS, OBS_SIZE)).astype(np.float32)
    return checkpoints.load(checkpoints.save(path, "pretrained", arrays, obs, {}, seed, 100, [], {}))


def test_a_run_starts_with_another_policy_has_teachers_and_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "judge", no_judge)
    first, *teachers = (_pretrained(tmp_path / str(i), seed=i + 1) for i in range(1 + c.NUM_TASKS))
    paths = tuple(teacher.path for teacher in teachers)
    taught = config(tmp_path / "taught", init=first.path, teachers=paths, sac=SacConfig(learning_rate=(0.0, 0.0)))
    result = checkpoints.load(train.main(taught))
    for name in (name for name in first.arrays if not name.startswith("normalizer")):
        np.testing.assert_allclose(result.arrays[name], first.arrays[name], rtol=0, atol=1e-5, err_msg=name)
    named = [(parent["stage"], parent["hash"]) for parent in result.manifest["parents"]]
    assert named == [("pretrained", parent.hash) for parent in (first, *teachers)]
    assert '"train/teacher_kl"' in (tmp_path / "taught.metrics.jsonl").read_text()
    metric_names.check(tmp_path / "taught.metrics.jsonl", "pretrained")
    train.main(replace(taught, resume=True))  # it knows its own
    for other in ({"teachers": (paths[0], paths[0], *paths[2:])}, {"teachers": ()}, {"init": None}):
        with pytest.raises(UserError, match="started from other checkpoints"):
            train.main(replace(taught, resume=True, **other))


@pytest.mark.parametrize(("other_starts", "chosen"), [([0.3, 0.4], 20 * LANES), ([0.5, 0.4], 4 * LANES)])
def test_the_best_and_the_last_policy_are_compared_on_other_starts(tmp_path, monkeypatch, other_starts, chosen):
    judged, seeds = iter([0.9, 0.8, 0.7, 0.6, 0.5, *other_starts]), []

    def judge(policy, starts):
        seeds.append(starts)
        return no_judge()._replace(score=np.full((c.NUM_TASKS, 2), next(judged)))

    monkeypatch.setattr(train, "NativeLoop", type("Sound", (Still,), {"NAN_FROM": 1000}))
    monkeypatch.setattr(train, "judge", judge)
    often = config(tmp_path / "run", records=replace(RECORDS, judge_every=4 * LANES), total_steps=20 * LANES)
    metrics = checkpoints.load(train.main(often)).manifest["metrics"]
    assert metrics["best_step"] == chosen and metrics["best_score"] == pytest.approx(max(other_starts))
    assert len(seeds) == 7 and seeds[0] == seeds[4] and not set(seeds[5]) & set(seeds[0])


def test_with_a_new_buffer_all_but_the_buffer_comes_back(tmp_path, monkeypatch):
    """The iteration, on which the ramp and every draw depend, the learner, and the sums for the log."""
    monkeypatch.setattr(train, "NativeLoop", Still)
    settings = config(tmp_path / "run", resume_buffer="refill")
    before, after = (train.Pretraining(settings, Run(tmp_path / "run", "pretrained", settings), None, []) for _ in "12")
    before.run.steps, before.statistics.sums = 7 * LANES, {"reward": jnp.float32(3.0)}
    before.learner_state = before.learner_state._replace(log_alpha=jnp.float32(-7.0))
    before.run.save(before)
    after.run.restore(after)
    assert after.run.steps == 7 * LANES and after.loop.count == 7 and after.loop.log_alpha == -7.0
    assert after.statistics.sums == {"reward": 3.0}
    assert after.learn_from == 7 * LANES + settings.collect.learning_starts


def test_a_diverged_run_is_not_judged_again_and_ends_with_what_was_best_before(tmp_path, monkeypatch, capsys):
    judged = []
    monkeypatch.setattr(train, "NativeLoop", Still)
    monkeypatch.setattr(train, "judge", lambda *arguments: judged.append(arguments) or no_judge())
    often = config(tmp_path / "run", records=replace(RECORDS, judge_every=4 * LANES), total_steps=20 * LANES)
    result = checkpoints.load(train.main(often))
    metrics = result.manifest["metrics"]
    assert (metrics["best_step"], metrics["diverged_before_step"]) == (4 * LANES, 10 * LANES) and len(judged) == 2
    assert "warning: training diverged" in capsys.readouterr().err
    with pytest.raises(UserError, match="diverged before step 60, before any policy was judged"):
        train.main(config(tmp_path / "never", total_steps=20 * LANES))
    assert not (tmp_path / "never").exists() and len(judged) == 2


@pytest.mark.parametrize(("bad", "words"), [
    ({"collect": replace(COLLECT, dr_level=7)}, "dr-level 7"), ({"collect": replace(COLLECT, num_envs=0)}, "num-envs"),
    ({"seed": -1}, "seed"), ({"collect": replace(COLLECT, buffer_size=4)}, "buffer-size"),
    ({"collect": replace(COLLECT, ramp_steps=(9, 9))}, "ramp-steps"),
    ({"teachers": (Path("a"),)}, f"takes {c.NUM_TASKS}"),
    ({"total_steps": 0}, "total-steps"), ({"judge_episodes": 1}, "judge-episodes")])  # fmt: skip
def test_bad_flags_are_refused(tmp_path, bad, words):
    with pytest.raises(UserError, match=words):
        train.main(replace(config(tmp_path / "run"), **bad))


def test_foreign_output_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError):
        train.main(config(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_compiled_programs_are_kept_beside_the_run_unless_the_user_has_a_place(tmp_path):
    users = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        train.keep_programs(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path.resolve())
        train.keep_programs(tmp_path / "another")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path.resolve())
    finally:
        jax.config.update("jax_compilation_cache_dir", users)


def test_every_preset_is_valid_and_knows_its_name():
    for name, settings in train.PRESETS.items():
        train.check(settings)
        assert settings.preset == name
