"""Stage 1: SAC pre-training of one policy for the three tasks, on MJX (GPU) or native MuJoCo threads (CPU).

    python train_mjx_sac.py --preset cpu --out runs/cpu/pretrain
    python train_mjx_sac.py --preset l4 --out runs/l4/pretrain --resume

Input: nothing but the scene. Output: a "pretrained" checkpoint directory at `--out`, holding the policy
with the best evaluation score. Next to it `<out>.resume` with the latest training state, `<out>.replay` with
the replay buffer's rows (both only for `--resume`), and `<out>.metrics.jsonl` with every log line's numbers.

A run that was killed and is started again with `--resume` goes on where its last state was saved; on a CPU it
ends with the very bits of a run that was never killed. SIGTERM: the state is saved, and the process ends
within 10 s with status 143. A diverged run ends with status 2; the last good state stays.

The learner is in `booster_soccer/agents/sac.py`, the loops that collect in `booster_soccer/rollout/collect.py`. One step is one policy action
(50 Hz) in one lane.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

# These count only if set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from booster_soccer import errors
from booster_soccer.agents import sac, sac_networks
from booster_soccer.agents.sac import Sac, SacState
from booster_soccer.arrays import check_like
from booster_soccer.envs import constants as c
from booster_soccer.envs.cores import usable_cores
from booster_soccer.envs.native_engine import NativeEngine
from booster_soccer.envs.pd import joint_target_rad
from booster_soccer.envs.randomization import level
from booster_soccer.envs.tasks import StartMix, Tasks
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.collect import ROW_SHAPES, MjxLoop, NativeLoop, Statistics, named
from booster_soccer.rollout.episode import advance, observe
from booster_soccer.store import checkpoints, resume
from booster_soccer.store.replay import Replay, Segments


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The command line sets the first group; a preset sets the rest."""

    out: Path  # checkpoint directory to write
    preset: str = "cpu"  # demo, cpu, l4 or h200
    engine: Literal["auto", "mjx", "native"] = "auto"  # auto: MJX where JAX sees a GPU, else native
    num_envs: int | None = None  # lanes; None takes the preset's
    total_steps: int | None = None  # one step = one action in one lane; None takes the preset's
    seed: int = 0
    dr_level: int = 0  # domain randomisation, 0 (none) to 3
    resume: bool = False  # go on from <out>.resume, if it is there
    # Whether the buffer and the lanes are saved too, or start afresh with the restored policy. A GPU's buffer
    # is gigabytes, filled again in seconds. auto: saved with the native engine, refill with MJX.
    resume_buffer: Literal["auto", "saved", "refill"] = "auto"
    init: Path | None = None  # start from another run's pre-trained checkpoint (networks and normaliser)
    teachers: tuple[Path, ...] = ()  # whom to imitate at first: a pre-trained checkpoint for each of the three tasks
    time_limit_s: float = 0.0  # stop cleanly after this much wall time; 0: no limit

    # --- learning: the reasons are in docs/experiments.md
    # None takes the preset's value, also for ramp_steps and evaluation_every below.
    batch_size: int | None = None
    updates_per_iteration: int | None = None  # gradient steps per action of all lanes: 16 samples per transition (g4)
    buffer_size: int | None = None  # transitions: the last tenth of `cpu`, 1 GB
    learning_starts: int | None = None  # steps with the untrained policy before the first update
    # First to walk and shoot, then to aim: pairs go from the first to the last value between these two steps.
    ramp_steps: tuple[int, int] | None = None
    learning_rate: tuple[float, float] = (3e-4, 1e-4)
    adam_b2: float = 0.95  # this, the next and target_tau: as in the trial that this began with, not varied
    weight_decay: float = 1e-3
    discount: tuple[float, float] = (0.97, 0.99)  # later it pays to take one's time before a kick
    target_tau: float = 0.01  # of the target critics
    policy_tau: float = 0.0003  # of the average that is evaluated and shipped: 3,300 gradient steps, 0.1 M of `cpu`
    target_entropy: tuple[float, float] = (-6.0, -14.0)  # half the number of joints, then a steady hand
    fall_share: tuple[float, float] = (0.1, 1.0)  # of the fall penalty: in full from the start, no step is dared
    initial_temperature: float = 0.01  # small, or noise drowns the first gait
    imitation: tuple[float, float] = (1.0, 0.0)  # of the teachers in the actor's loss; the rest is the critics'
    mirror: bool = True  # mirror half of each batch: the robot's legs are alike to 0.5 %

    # --- episodes
    first_task_share: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)  # before the ramp; starts.task_share after it
    max_actions: int = 300  # training episodes are cut (not ended) after this many actions
    starts: StartMix = field(default_factory=StartMix)
    weights: DenseWeights = field(default_factory=DenseWeights)

    # --- evaluation and checkpoints
    evaluation_every: int | None = None  # steps
    evaluation_lanes: int = 96
    checkpoint_every: int = 200_000  # steps between saved states ...
    checkpoint_interval_s: float = 120.0  # ... and the least time between them
    log_every: int = 50_000  # steps


_CPU = {"num_envs": 256, "total_steps": 10_000_000, "batch_size": 512, "updates_per_iteration": 8,
        "buffer_size": 1_000_000, "learning_starts": 20_000, "evaluation_every": 500_000,
        "ramp_steps": (4_000_000, 10_000_000)}  # fmt: skip
# Measured times and scores: docs/results.md. The GPU presets have not been measured yet: they take as many samples per
# transition as `cpu`, in fewer and larger batches, and put the ramp at the same share of the run. `demo` ends before it.
PRESETS: dict[str, dict] = {
    "demo": _CPU | {"total_steps": 1_500_000, "evaluation_every": 250_000},
    "cpu": _CPU,
    "l4": {"num_envs": 2048, "total_steps": 100_000_000, "batch_size": 8192, "updates_per_iteration": 4,
           "buffer_size": 4_000_000, "learning_starts": 200_000, "evaluation_every": 5_000_000,
           "ramp_steps": (40_000_000, 100_000_000)},
    "h200": {"num_envs": 4096, "total_steps": 200_000_000, "batch_size": 16384, "updates_per_iteration": 4,
             "buffer_size": 8_000_000, "learning_starts": 400_000, "evaluation_every": 10_000_000,
             "ramp_steps": (80_000_000, 200_000_000)},
}  # fmt: skip


# What may differ between a run and its continuation; everything else decides the numbers.
_FREE = ("out", "preset", "resume", "resume_buffer", "init", "total_steps", "time_limit_s", "evaluation_every",
         "evaluation_lanes", "checkpoint_every", "checkpoint_interval_s", "log_every")  # fmt: skip


def resolve(config: Config) -> Config:
    """Apply the preset (explicit values win) and check what can be checked without running."""
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset} is unknown: use one of {', '.join(PRESETS)}")
    level(config.dr_level)
    chosen = {name: value for name, value in PRESETS[config.preset].items() if getattr(config, name) is None}
    config = replace(config, **chosen)
    for name in ("num_envs", "total_steps", "batch_size", "updates_per_iteration", "max_actions", "evaluation_lanes"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(config, name)}")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2^32), of which JAX keeps all bits; got {config.seed}")
    if not 0 <= config.ramp_steps[0] < config.ramp_steps[1]:
        raise UserError(f"--ramp-steps must be two steps, the first before the second, got {config.ramp_steps}")
    if config.teachers and len(config.teachers) != c.NUM_TASKS:
        raise UserError(
            f"--teachers takes {c.NUM_TASKS} checkpoints ({', '.join(c.TASKS)}), got {len(config.teachers)}"
        )
    if config.buffer_size < config.num_envs:
        raise UserError(f"--buffer-size {config.buffer_size} is less than one action of {config.num_envs} lanes")
    engine = config.engine
    if engine == "auto":
        engine = "mjx" if jax.default_backend() == "gpu" else "native"
    resume_buffer = config.resume_buffer
    if resume_buffer == "auto":
        resume_buffer = "saved" if engine == "native" else "refill"
    return replace(config, engine=engine, resume_buffer=resume_buffer)


# --- evaluation in our own scene ---------------------------------------------------------------------------


_EVALUATION_SEED = 12345  # always the same starts, so that evaluations of a run compare
_EVALUATION_NOISE_RAD = 0.035  # uniform, about the spread of the 0.02 rad normal noise of evaluate.py


class Evaluator:
    """Deterministic policy from official starts with joint noise, in our scene under native MuJoCo.

    An estimate while training; the score that counts is taken in the official environment (`evaluate.py`).
    """

    def __init__(self, config: Config, tasks: Tasks):
        self.lanes = config.evaluation_lanes
        self.engine = NativeEngine(self.lanes, num_threads=usable_cores())
        mix = StartMix(
            task_share=(1 / 3, 1 / 3, 1 / 3),
            official_pose=1.0,
            official_place=1.0,
            joint_noise_rad=_EVALUATION_NOISE_RAD,
        )

        def reset_lane(key, task):
            # Draw until the lane's own task comes up: the first of 32 draws that fits.
            draws = jax.vmap(lambda k: tasks.reset(k, mix))(jax.random.split(key, 32))
            pick = jnp.argmax(draws[2].task == task)
            return jax.tree.map(lambda x: x[pick], draws)

        self._reset = jax.jit(jax.vmap(reset_lane))
        self._observe = jax.jit(jax.vmap(lambda v, s: observe(tasks, v, s)))
        self._act = jax.jit(lambda actor, normalizer, obs: sac_networks.mean_action(actor, normalizer(obs)))
        self._advance = jax.jit(jax.vmap(lambda v, s, a: advance(tasks, v, s, a, config.weights, c.EPISODE_ACTIONS)))

    def __call__(self, state: SacState, stop: resume.StopSignal) -> dict[str, float] | None:
        """Mean official score, success, fall rate and length per task, always on the same starts; None if stopped.

        `eval/diverged` counts the lanes whose physics broke; their score is 0 and means nothing.
        """
        task = np.arange(self.lanes) % c.NUM_TASKS
        qpos, qvel, task_state = self._reset(
            jax.random.split(jax.random.key(_EVALUATION_SEED), self.lanes), jnp.asarray(task)
        )
        self.engine.reset(np.arange(self.lanes), np.asarray(qpos), np.asarray(qvel))
        obs = self._observe(self.engine.view(), task_state)
        alive = np.ones(self.lanes, bool)
        score, length = np.zeros(self.lanes), np.zeros(self.lanes)
        fallen, success, diverged = (np.zeros(self.lanes, bool) for _ in range(3))
        for _ in range(c.EPISODE_ACTIONS):
            if stop.received:
                return None
            action = np.asarray(self._act(state.policy, state.normalizer, obs))
            self.engine.step(np.asarray(joint_target_rad(action)))
            task_state, outcome = self._advance(self.engine.view(), task_state, action)
            obs, outcome = outcome.obs, jax.device_get(outcome)
            ends = alive & (outcome.terminated | outcome.truncated)
            score[ends], fallen[ends], success[ends] = outcome.score[ends], outcome.fallen[ends], outcome.success[ends]
            diverged |= ends & outcome.diverged
            length += alive
            alive &= ~ends
            if not alive.any():
                break
        result = {"eval/diverged": diverged.sum()}
        for index, name in enumerate(c.TASKS):
            mine = task == index
            result |= {f"eval/score_{name}": score[mine].mean(), f"eval/success_{name}": success[mine].mean(),
                       f"eval/fall_rate_{name}": fallen[mine].mean(), f"eval/actions_{name}": length[mine].mean()}  # fmt: skip
        result["eval/score"] = float(np.mean([result[f"eval/score_{name}"] for name in c.TASKS]))
        return {name: float(value) for name, value in result.items()}

    def close(self) -> None:
        """Stop the threads."""
        self.engine.close()


# --- checkpoints ---------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """The counters of a run, in steps."""

    steps: int = 0
    learn_from: int = 0  # no update before this step
    last_log: int = 0
    last_eval: int = 0
    last_save: int = 0

    def arrays(self) -> dict[str, np.ndarray]:
        """For the saved state."""
        return {name: np.array(value) for name, value in asdict(self).items()}


def beside(out: Path, suffix: str) -> Path:
    """`<out>.<suffix>`"""
    return out.with_name(f"{out.name}.{suffix}")


def record(out: Path, numbers: dict[str, float]) -> None:
    """Append one line of numbers to `<out>.metrics.jsonl`."""
    path = beside(out, "metrics.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({name: round(float(value), 6) for name, value in numbers.items()}) + "\n")


def check_start(config: Config) -> bool:
    """Whether there is a saved state to go on from; a new run never goes over an old one."""
    path = beside(config.out, "resume")
    exists = any(place.exists() for place in checkpoints.places(path))
    checkpoints.check_output_dir(config.out)
    checkpoints.check_output_dir(path)
    if config.resume and exists:
        return True
    if (config.out / checkpoints.MANIFEST).exists():
        if config.resume:
            raise UserError(
                f"{config.out} holds a policy but no state to resume from: move it away or name another --out"
            )
        exists = True
    if exists:
        raise UserError(f"{config.out} holds a run: give --resume to go on with it, or another --out")
    if config.resume:
        print(f"{path} is not there: starting from the beginning", flush=True)
    return False


class Run:
    """One training run: learner, lanes, buffer and counters, and their state on disk."""

    def __init__(self, config: Config, parent: checkpoints.Checkpoint | None = None,
                 teachers: Sequence[checkpoints.Checkpoint] = ()):  # fmt: skip
        self.config = config
        self.parent = parent  # whose policy it starts from
        self.settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        self.settings["teachers"] = [{"stage": teacher.stage, "hash": teacher.hash} for teacher in teachers]
        learner = Sac(config, sac.teachers_from([teacher.arrays for teacher in teachers]) if teachers else None)
        tasks = Tasks()
        self.segments = Segments(beside(config.out, "replay"))
        self.state = learner.init(jax.random.key(config.seed))
        if parent is not None:
            self.state = sac.warm_start(self.state, parent.arrays)
        self.loop = (NativeLoop if config.engine == "native" else MjxLoop)(config, learner, tasks)
        self.evaluator = Evaluator(config, tasks)
        self.statistics = Statistics()
        self.progress = Progress(learn_from=config.learning_starts)
        self.best_score = -np.inf

    def close(self) -> None:
        """Stop the threads."""
        self.loop.close()
        self.evaluator.close()

    def write(self, path: Path, metrics: dict, extra: dict | None = None) -> None:
        """Write the policy (and, for resuming, all the rest) with golden pairs taken from real observations."""
        golden_obs = np.resize(np.asarray(self.loop.obs, np.float32), (16, OBS_SIZE))  # fewer lanes repeat
        actions = sac_networks.mean_action(self.state.policy, self.state.normalizer(jnp.asarray(golden_obs)))
        checkpoints.save(path, "pretrained", sac.policy_arrays(self.state), golden_obs, np.asarray(actions, np.float32),
                         self.settings, self.config.seed, self.progress.steps, self.parent, metrics, extra or {},
                         overwrite=True)  # fmt: skip

    def save(self) -> None:
        """Write the state; the one before stays as it is until this one is whole, and as the previous one after."""
        path, started = beside(self.config.out, "resume"), time.monotonic()
        self.progress.last_save = self.progress.steps
        extra = {"learner": sac.state_arrays(self.state), "progress": self.progress.arrays()}
        tables = []
        if self.config.resume_buffer == "saved":
            tables.append(self.segments.write(self.loop.replay))
            lanes = self.loop.arrays() | {f"sum.{name}": np.asarray(v) for name, v in self.statistics.sums.items()}
            extra |= {"lanes": lanes | {"added": np.array(self.loop.replay.added)}, "replay": tables[0]}
        self.write(path, {"best_score": self.best_score}, extra)
        with contextlib.suppress(UserError):  # there is none before, or none that can be read
            previous = checkpoints.load(checkpoints.places(path)[1], ("pretrained",), verify=False)
            tables.append(checkpoints.load_extra(previous, "replay"))
        self.segments.delete_all_but(*tables)
        record(self.config.out, {"step": self.progress.steps, "checkpoint_s": time.monotonic() - started})

    def restore(self) -> None:
        """Go on from the newest state that is whole."""
        saved = checkpoints.load_latest(beside(self.config.out, "resume"), ("pretrained",), accept=self._take_up)
        resume.cut_records(beside(self.config.out, "metrics.jsonl"), self.progress.steps)
        best_score = saved.manifest["metrics"].get("best_score")  # not finite is written as null
        try:  # the policy may be newer than the state
            newer = checkpoints.load(self.config.out, ("pretrained",)).manifest["metrics"].get("best_score")
            scores = [score for score in (best_score, newer) if isinstance(score, float)]
            self.best_score = max(scores, default=-np.inf)
        except UserError as error:
            if best_score is not None:
                print(f"warning: {error}; the next policy that is evaluated is written", file=sys.stderr)

    def _take_up(self, saved: checkpoints.Checkpoint) -> None:
        config = self.config
        resume.check_parent(saved, self.parent)
        self.state = sac.restore(self.state, checkpoints.load_extra(saved, "learner"))
        if config.resume_buffer == "refill":
            steps = saved.manifest["steps"]
            self.progress = Progress(steps, steps + config.learning_starts, steps, steps, steps)
            return
        if not {"lanes.safetensors", "replay.safetensors"} <= saved.manifest["files"].keys():
            raise checkpoints.WrongRun(
                f"{saved.path} was saved without its replay buffer: give --resume-buffer refill to fill a new one"
            )
        resume.check_settings(saved, self.settings, _FREE)
        progress = checkpoints.load_extra(saved, "progress")
        check_like(progress, self.progress.arrays(), f"{saved.path}: the saved progress")
        lanes = checkpoints.load_extra(saved, "lanes")
        added, sums = lanes.pop("added", None), named(lanes, "sum.")
        if added is None or added.shape or any(value.shape for value in sums.values()):
            raise UserError(f"{saved.path}: the saved state of the lanes is another code's: use the code that wrote it")
        replay = Replay(self.loop.replay.capacity, ROW_SHAPES)
        self.segments.read(checkpoints.load_extra(saved, "replay"), replay, int(added))
        self.loop.restore({k: v for k, v in lanes.items() if not k.startswith("sum.")}, replay)
        self.statistics.sums = {name: jnp.array(value) for name, value in sums.items()}
        self.progress = Progress(**{name: int(value) for name, value in progress.items()})

    def log(self, learned: dict[str, jax.Array], elapsed_s: float, steps_per_s: float) -> None:
        """One line to read, and its numbers to the record."""
        line = self.statistics.take() | {name: float(value) for name, value in learned.items()}
        steps = self.progress.last_log = self.progress.steps
        record(self.config.out, {"step": steps, "wall_s": elapsed_s, "steps_per_s": steps_per_s} | line)
        scores = " ".join(f"{line[f'episode/score_{task}']:+.2f}" for task in c.TASKS)
        successes = " ".join(f"{line[f'episode/success_{task}']:.2f}" for task in c.TASKS)
        broken = f" diverged lanes {line['diverged']:.0f}" if line["diverged"] else ""
        tqdm.write(
            f"{elapsed_s:6.0f}s {steps / 1e6:6.2f}M {steps_per_s:6.0f}/s len {line['episode/length']:5.1f}"
            f" fall {line['episode/fall_rate']:.2f} score {scores} success {successes}"
            f" rew {line['reward/total']:+.3f} q {line.get('q', 0):+.2f} loss {line.get('critic_loss', 0):.3f}"
            f" H {line.get('entropy', 0):+.1f} alpha {line.get('alpha', 0):.4f}{broken}"
        )
        sys.stdout.flush()

    def evaluate(self, stop: resume.StopSignal, elapsed_s: float) -> None:
        """Score the policy, and write it if it is the best so far; if stopped, it stays due."""
        result = self.evaluator(self.state, stop)
        if result is None:
            return
        steps = self.progress.last_eval = self.progress.steps
        record(self.config.out, {"step": steps, "wall_s": elapsed_s} | result)
        tqdm.write(
            f"  eval at {steps:,}: score {result['eval/score']:+.3f} | "
            + " | ".join(
                f"{t} {result['eval/score_' + t]:+.2f} success {result['eval/success_' + t]:.2f}"
                f" fall {result['eval/fall_rate_' + t]:.2f} {result['eval/actions_' + t]:.0f} actions"
                for t in c.TASKS
            )
            + (f" | diverged lanes {result['eval/diverged']:.0f}" if result["eval/diverged"] else "")
        )
        sys.stdout.flush()
        if result["eval/score"] > self.best_score and not result["eval/diverged"]:
            self.best_score = result["eval/score"]
            self.write(self.config.out, result | {"best_score": self.best_score})


# --- main ----------------------------------------------------------------------------------------------------


def main(config: Config) -> Path:
    """Train; returns the checkpoint directory."""
    config = resolve(config)
    goes_on = check_start(config)
    parent = None if config.init is None else checkpoints.load(config.init, ("pretrained",))
    teachers = [checkpoints.load(path, ("pretrained",)) for path in config.teachers]
    with resume.StopSignal() as stop, contextlib.closing(Run(config, parent, teachers)) as run:
        if goes_on:
            run.restore()
            if run.progress.steps >= config.total_steps and run.progress.last_eval == run.progress.steps:
                print(f"{config.out} is finished already, at step {run.progress.steps:,}\n{config.out}")
                return config.out
            how = "with a new replay buffer, filled by the restored policy" if config.resume_buffer == "refill" else ""
            print(f"resuming at step {run.progress.steps:,} {how or 'exactly where it was'}", flush=True)
        print(
            f"{config.preset}: {config.engine} engine, {config.num_envs} lanes, {config.total_steps:,} steps, "
            f"seed {config.seed}",
            flush=True,
        )
        train(run, stop)
    print(config.out)
    return config.out


def train(run: Run, stop: resume.StopSignal) -> None:
    """To the last step, or until SIGTERM: then the state is saved and `SystemExit` raised."""
    config, progress = run.config, run.progress
    started = last_save_s = time.monotonic()
    first_step = progress.steps
    before_s = resume.last_recorded(beside(config.out, "metrics.jsonl"), "wall_s")  # of the run, before this start
    learned: dict[str, jax.Array] = {}
    bar = tqdm(total=config.total_steps, initial=first_step, unit="step", unit_scale=True, mininterval=5,
               disable=not sys.stderr.isatty())  # fmt: skip
    with bar:
        while True:
            # First what is due at this step, so that a run which goes on finds it due as well.
            elapsed_s = time.monotonic() - started
            finished = progress.steps >= config.total_steps or bool(
                config.time_limit_s and elapsed_s >= config.time_limit_s
            )
            ends = finished or stop.received
            log_due = progress.steps - progress.last_log >= config.log_every or finished
            save_due = ends or (
                progress.steps - progress.last_save >= config.checkpoint_every
                and time.monotonic() - last_save_s >= config.checkpoint_interval_s
            )
            eval_due = progress.steps - progress.last_eval >= config.evaluation_every or finished
            if (log_due or eval_due or save_due) and not np.isfinite(float(learned.get("critic_loss", 0.0))):
                raise UserError(
                    f"training diverged before step {progress.steps:,}: the critic loss is not finite; what "
                    f"{config.out} and {beside(config.out, 'resume')} hold is older and good: go on from there with "
                    "--init and another --seed or a lower learning rate"
                )
            if log_due and progress.steps > progress.last_log:
                run.log(learned, before_s + elapsed_s, (progress.steps - first_step) / max(elapsed_s, 1e-9))
            if eval_due:
                run.evaluate(stop, before_s + time.monotonic() - started)
            if save_due or stop.received:
                run.save()
                last_save_s = time.monotonic()
            if stop.received:
                tqdm.write(f"SIGTERM: the state of step {progress.steps:,} is saved, --resume goes on from it")
                raise SystemExit(resume.STOPPED)
            if finished:
                return
            run.state, new = run.loop.iterate(run.state, progress.steps >= progress.learn_from, run.statistics)
            learned = new or learned
            advance_by = config.num_envs * run.loop.ITERATIONS_PER_CALL
            progress.steps += advance_by
            bar.update(advance_by)


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config))
