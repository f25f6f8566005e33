"""Stage 1: SAC pre-training of one policy for the three tasks, on MJX (GPU) or native MuJoCo threads (CPU).

    python train_mjx_sac.py --preset cpu --out runs/cpu/pretrain
    python train_mjx_sac.py --preset l4 --out runs/l4/pretrain --resume

Input: nothing but the scene. Output: a "pretrained" checkpoint directory at `--out`, when the run is finished, with
the policy that the judge liked best (its official score on the twin, always on the same starts), or the last one if
that scores more on other starts. Until then `<out>.resume` holds the latest state (and the policy at that step),
`<out>.replay` its buffer; `<out>.metrics.jsonl` has every log line's numbers, and at the end `<out>.html` is a report
of them; `<out>.videos` the policy on its way.
MJX's compiled programs are kept in `compiled` beside `--out`: the next start takes seconds instead of two minutes.

A run that was killed and is started again with `--resume` goes on where its last state was saved; on a CPU it
ends with the very bits of a run that was never killed. SIGTERM: the state is saved, and the process ends
within 10 s with status 143. A diverged run ends with what was best before.

The learner is in `booster_soccer/agents/sac.py`, the loops that collect in `booster_soccer/rollout/collect.py`, the
life of a run in `booster_soccer/store/run.py`.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from booster_soccer import runtime

runtime.prepare()  # before JAX is imported, or at least before it is used

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from booster_soccer import errors
from booster_soccer.agents import sac
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.agents.sac import Sac, SacConfig
from booster_soccer.arrays import named
from booster_soccer.cli import parse
from booster_soccer.envs import constants as c
from booster_soccer.envs.randomization import level
from booster_soccer.envs.tasks import Tasks
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.rollout.collect import ROW_SHAPES, CollectConfig, MjxLoop, NativeLoop, Statistics
from booster_soccer.rollout.engines import ENGINES, SLOW_ON_A_CPU, Engine, faster
from booster_soccer.rollout.judge import best_or_last, judge
from booster_soccer.store import checkpoints
from booster_soccer.store.atomic import beside
from booster_soccer.store.checkpoints import Checkpoint, WrongRun
from booster_soccer.store.entry import guarded
from booster_soccer.store.replay import Replay
from booster_soccer.store.run import Candidate, RecordConfig, Run, State, recorded
from booster_soccer.store.signals import Stopped, StopSignal
from booster_soccer.store.watchdog import LONG_S, Watchdog
from booster_soccer.tracking import stage_pages
from booster_soccer.tracking.record import Recorder, Result, TrackConfig, score_columns
from booster_soccer.tracking.video import Films

_JUDGE_SEED = 12345  # always the same starts, so that policies and runs compare
_CHOICE_SEED = 54321  # of the starts on which the best and the last policy are held against each other
_CHOICE_EPISODES = 3  # times a judgement's


@dataclass(frozen=True)
class Config:
    """A pre-training run. `--preset` chooses all the defaults."""

    out: Path  # checkpoint directory to write
    preset: str  # demo, cpu, l4 or h200
    # Native MuJoCo threads (CPU), or MJX (a GPU; it runs on a CPU too); the learner is on the GPU with both. auto: the
    # faster one, where JAX sees a GPU both are timed for 20 s at the start, elsewhere it is native.
    engine: Literal["native", "mjx", "auto"]
    total_steps: int  # one step = one action in one lane
    collect: CollectConfig = CollectConfig()
    sac: SacConfig = SacConfig()
    records: RecordConfig = RecordConfig()
    tracking: TrackConfig = TrackConfig()
    judge_episodes: int = 32  # per task
    seed: int = 0  # of networks, starts and noise
    resume: bool = False  # go on from <out>.resume, if it is there
    # Whether the buffer and the lanes are saved too, or start afresh with the restored policy, on the other engine if
    # you like: a GPU's buffer is gigabytes, filled again in seconds.
    resume_buffer: Literal["saved", "refill"] = "saved"
    init: Path | None = None  # start from another run's pre-trained checkpoint (networks and normaliser)
    teachers: tuple[Path, ...] = ()  # whom to imitate at first: a pre-trained checkpoint for each of the three tasks
    time_limit_s: float = 0.0  # end, as if finished, after this much wall time; 0: no limit


# One recipe at four sizes: a gradient step of 512 for every 32 transitions, the ramp at the same share of the run
# (`demo` ends before). Half as many steps of twice the batch learn more slowly (docs/experiments.md, la and lb).
# Measured: `cpu`, and `l4` on an H100 with another observation (docs/results.md); `h200` has not been measured.
_CPU = Config(out=Path("runs/cpu/pretrain"), preset="cpu", engine="native", total_steps=10_000_000)
_L4 = Config(
    out=Path("runs/l4/pretrain"),
    preset="l4",
    engine="mjx",
    total_steps=10_000_000,
    collect=CollectConfig(num_envs=2048, updates_per_iteration=64, buffer_size=1_024_000, learning_starts=81_920),
    # A judgement took 12 s on the H100's machine, during which the GPU waits.
    records=RecordConfig(log_every=200_000, judge_every=2_000_000, video_every_s=600.0),
    resume_buffer="refill",
)  # fmt: skip
PRESETS = {
    "demo": replace(_CPU, out=Path("runs/demo/pretrain"), preset="demo", total_steps=1_000_000,
                    records=RecordConfig(judge_every=250_000), judge_episodes=10),
    "cpu": _CPU,
    "l4": _L4,
    "h200": replace(
        _L4, out=Path("runs/h200/pretrain"), preset="h200", total_steps=20_000_000,
        collect=replace(_L4.collect, num_envs=4096, updates_per_iteration=128, buffer_size=2_048_000,
                        learning_starts=163_840, ramp_steps=(8_000_000, 20_000_000)),
        records=replace(_L4.records, log_every=400_000, judge_every=4_000_000)),
}  # fmt: skip


def check(config: Config) -> None:
    """Everything that can be told before anything runs."""
    level(config.collect.dr_level)
    positive = {name: getattr(config.collect, name)
                for name in ("num_envs", "devices", "batch_size", "updates_per_iteration", "max_actions")}  # fmt: skip
    for name, value in (positive | {"total_steps": config.total_steps}).items():
        if value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if config.judge_episodes < 2:
        raise UserError(f"--judge-episodes must be at least 2, got {config.judge_episodes}: one has no spread")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2^32), of which JAX keeps all bits; got {config.seed}")
    ramp = config.collect.ramp_steps
    if not 0 <= ramp[0] < ramp[1]:
        raise UserError(f"--ramp-steps must be two steps, the first before the second, got {ramp}")
    if config.teachers and len(config.teachers) != c.NUM_TASKS:
        raise UserError(
            f"--teachers takes {c.NUM_TASKS} checkpoints ({', '.join(c.TASKS)}), got {len(config.teachers)}"
        )
    if config.collect.buffer_size < config.collect.num_envs:
        raise UserError(
            f"--buffer-size {config.collect.buffer_size} is less than one action of {config.collect.num_envs} lanes"
        )
    if platform() == "cpu" and config.engine == "mjx":
        print(f"warning: JAX sees no GPU: {SLOW_ON_A_CPU}; {More.NO_GPU}", file=sys.stderr)
    if config.collect.devices > 1:
        check_devices(config)


def check_devices(config: Config) -> None:
    """Whether this machine has the devices, and lanes and batches can be split over them."""
    devices, there = config.collect.devices, jax.device_count()
    if config.engine != "mjx":
        raise UserError(f"--devices {devices} is for MJX, and the engine is {config.engine}: give --engine mjx too")
    if devices > there:
        raise UserError(f"--devices {devices}: JAX sees {there} ({jax.default_backend()}): give at most {there}")
    for name in ("num_envs", "batch_size"):
        if (size := getattr(config.collect, name)) % devices:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {size} cannot be split over --devices {devices}: give {option} a multiple of it")


def platform() -> str:
    """Where JAX computes, `cpu` or a GPU's name; `UserError` if nowhere."""
    try:
        return jax.default_backend()
    except RuntimeError as error:
        where = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}"
        raise UserError(
            f"JAX finds no device with {where}: {error}; unset it, or set it to cpu; {More.NO_GPU}"
        ) from error


def known_engine(config: Config) -> Config:
    """The configuration with an engine for `auto`, where none must be timed: a run keeps its own, a CPU is native's."""
    if config.engine != "auto":
        return config
    own = recorded(config.out, "engine") if config.resume else None
    if own in ENGINES:
        return replace(config, engine=own)
    if platform() == "cpu":
        print(f"--engine auto: native is taken, JAX sees no GPU: {SLOW_ON_A_CPU}", flush=True)
        return replace(config, engine="native")
    return config


@contextlib.contextmanager
def jax_as_trained() -> Iterator[None]:
    """JAX as these presets are measured, whatever a notebook has set before."""
    precision = os.environ["JAX_DEFAULT_MATMUL_PRECISION"]
    with jax.enable_x64(False), jax.default_matmul_precision(precision), jax.debug_nans(False):
        yield


def keep_programs(directory: Path) -> None:
    """Let JAX keep compiled programs in a directory, unless the user has named one: MJX's take minutes to compile.

    Where JAX has compiled something in this process before, it may go on without.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory.resolve()))


def _seeds(master: int, episodes: int) -> list[int]:
    return np.random.SeedSequence(master).generate_state(episodes, np.uint64).tolist()


def new_loop(
    config: Config, init: Checkpoint | None, teachers: list[Checkpoint]
) -> tuple[NativeLoop | MjxLoop, sac.SacState]:
    """The loop of the configuration's engine and the learner's state, both as a run begins."""
    learner = Sac(config.sac, sac.teachers_from([teacher.arrays for teacher in teachers]) if teachers else None)
    state = learner.init(jax.random.key(config.seed))
    if init is not None:
        state = sac.warm_start(state, init.arrays)
    kind = NativeLoop if config.engine == "native" else MjxLoop
    return kind(config.collect, learner, Tasks(), config.seed, state), state


def timed_engine(config: Config, init: Checkpoint | None, teachers: list[Checkpoint], stop: StopSignal) -> Engine:
    """The engine that is faster with the run's own settings; a signal ends the process."""
    try:
        with Watchdog("the timing of both engines", LONG_S), stop.interrupting():
            return faster(lambda engine: new_loop(replace(config, engine=engine), init, teachers))
    except Stopped:
        print(f"{stop.name}: nothing was learned yet", flush=True)
        raise SystemExit(stop.status) from None


class Pretraining:
    """What pre-training brings to its run: the learner, its lanes, and their state (`store.run.Stage`)."""

    def __init__(self, config: Config, run: Run, init: Checkpoint | None, teachers: list[Checkpoint]):
        self.config, self.run = config, run
        self.loop, self.learner_state = new_loop(config, init, teachers)
        self.statistics = Statistics()
        self.learn_from = config.collect.learning_starts  # no update before this step
        self.learned: dict[str, jax.Array] = {}
        self.films = Films(beside(config.out, "videos"), config.records.video_every_s)

    def close(self) -> None:
        """Stop the threads."""
        self.loop.close()

    def advance(self) -> int:
        """One call of the collecting loop."""
        self.learner_state, new = self.loop.iterate(
            self.learner_state, self.run.steps >= self.learn_from, self.statistics
        )
        self.learned = new or self.learned
        return self.config.collect.num_envs * self.loop.ITERATIONS_PER_CALL

    def diverged(self) -> bool:
        """Whether the critic's loss is no longer finite."""
        return not np.isfinite(float(self.learned.get("critic_loss", 0.0)))

    def log(self, steps_per_s: float) -> dict[str, float]:
        """One line to read, and its numbers."""
        line = self.statistics.take() | {name: float(value) for name, value in self.learned.items()}
        scores = " ".join(f"{line[f'episode/score_{task}']:+.2f}" for task in c.TASKS)
        successes = " ".join(f"{line[f'episode/success_{task}']:.2f}" for task in c.TASKS)
        broken = f" diverged lanes {line['diverged']:.0f}" if line["diverged"] else ""
        tqdm.write(
            f"{self.run.steps / 1e6:6.2f}M {steps_per_s:6.0f}/s len {line['episode/length']:5.1f}"
            f" fall {line['episode/fall_rate']:.2f} score {scores} success {successes}"
            f" rew {line['reward/total']:+.3f} q {line.get('q', 0):+.2f} loss {line.get('critic_loss', 0):.3f}"
            f" H {line.get('entropy', 0):+.1f} alpha {line.get('alpha', 0):.4f}{broken}"
        )
        return {"steps_per_s": steps_per_s} | line

    def judge(self) -> dict[str, float]:
        """Official score of the policy on the twin; the best so far is kept."""
        arrays = sac.policy_arrays(self.learner_state)
        seeds = _seeds(_JUDGE_SEED, self.config.judge_episodes)
        scores = judge(policy_from_arrays(arrays), seeds)
        tqdm.write(f"  judged at {self.run.steps:,}: {scores}")
        best = self.run.kept.get("best")
        if best is None or scores.mean > best.scores.mean():
            self.run.kept["best"] = Candidate(arrays, self.run.steps, scores.score)
        self.films.take(policy_from_arrays(arrays), self.run.steps, seeds[0])
        return scores.numbers("eval")

    def choose(self) -> Candidate:
        """The policy to hand on: the best in judgement, or the last one if that scores more on other seeds."""
        best = self.run.kept["best"]
        if self.run.diverged_at is not None or best.steps == self.run.steps:
            return best
        seeds = _seeds(_CHOICE_SEED, _CHOICE_EPISODES * self.config.judge_episodes)
        last = sac.policy_arrays(self.learner_state)
        return best_or_last(best, last, self.run.steps, lambda arrays: judge(policy_from_arrays(arrays), seeds))

    # --- state --------------------------------------------------------------------------------------------

    def golden_obs(self) -> np.ndarray:
        """Present observations (16, 87); fewer lanes repeat."""
        return np.resize(
            np.asarray(self.loop.lanes.critic_obs[:, :OBS_SIZE], np.float32), (checkpoints.GOLDEN_PAIRS, OBS_SIZE)
        )

    def state(self) -> State:
        """Learner and, with a saved buffer, lanes and statistics."""
        tables, replay = {"learner": sac.state_arrays(self.learner_state)}, None
        sums = {f"sum.{name}": np.asarray(value) for name, value in self.statistics.sums.items()}
        if self.config.resume_buffer == "saved":
            replay = self.loop.replay
            tables["lanes"] = self.loop.arrays() | sums
        else:
            tables["statistics"] = sums
        return State(sac.policy_arrays(self.learner_state), self.golden_obs(), tables, replay)

    def take_up(self, saved: Checkpoint, fill: Callable[[Replay], None]) -> None:
        """Go on from a saved state."""
        self.learner_state = sac.restore(self.learner_state, checkpoints.load_extra(saved, "learner"))
        tables = [name for name in ("lanes", "statistics") if f"{name}.safetensors" in saved.manifest["files"]]
        lanes = {name: value for table in tables for name, value in checkpoints.load_extra(saved, table).items()}
        sums = named(lanes, "sum.")
        if any(value.shape for value in sums.values()):
            raise UserError(
                f"{saved.path}: the saved state of the lanes is another code's: use the code that wrote it; "
                f"{More.CHECKPOINT}"
            )
        self.statistics.sums = {name: jnp.array(value) for name, value in sums.items()}
        if self.config.resume_buffer == "refill":
            steps, collect = self.run.steps, self.config.collect
            self.learn_from = steps + collect.learning_starts
            self.loop.begin(self.learner_state, steps // collect.num_envs)
            return
        if "lanes" not in tables:
            raise WrongRun(
                f"{saved.path} was saved without its lanes: give --resume-buffer refill for new ones; {More.RUN}"
            )
        replay = Replay(self.loop.replay.capacity, ROW_SHAPES)
        fill(replay)
        self.loop.restore({name: value for name, value in lanes.items() if not name.startswith("sum.")}, replay)


@guarded("out")
def main(config: Config) -> Path:
    """Train; returns the checkpoint directory."""
    config = known_engine(config)
    check(config)
    init = None if config.init is None else checkpoints.load(config.init, ("pretrained",))
    teachers = [checkpoints.load(path, ("pretrained",)) for path in config.teachers]
    parents = ([] if init is None else [init]) + teachers
    steps_before = 0 if init is None else init.manifest["steps"]
    free = {"init", "teachers", "track", "devices"}
    if config.resume_buffer == "refill":
        free.add("engine")  # nothing of an engine's is taken up
    run = Run(config.out, "pretrained", config, parents, free, steps_before)
    if config.resume and run.is_finished():
        print(config.out)
        return config.out
    goes_on = run.goes_on(config.resume)
    if config.engine != "native":
        keep_programs(Path(config.out).with_name("compiled"))
    with StopSignal() as stop, jax_as_trained(), contextlib.ExitStack() as closed:
        if config.engine == "auto":
            config = replace(config, engine=timed_engine(config, init, teachers, stop))
            run.settings["engine"] = config.engine
        stage = closed.enter_context(contextlib.closing(Pretraining(config, run, init, teachers)))
        if goes_on:
            run.restore(stage)
            how = "exactly where it was" if config.resume_buffer == "saved" else "with a new replay buffer"
            print(f"resuming at step {run.steps:,} {how}", flush=True)
        print(
            f"{config.preset}: {config.engine} engine, {config.collect.num_envs} lanes, {config.total_steps:,} steps, "
            f"seed {config.seed}",
            flush=True,
        )
        with Recorder(run.out, run.stage, config, parents, goes_on, watch_gpu=True) as recorder:
            run.watch, stage.films.taken = recorder.at, recorder.artifact
            run.train(stage, config.total_steps, stop, config.time_limit_s)
            try:
                with Watchdog("the comparison at the end", LONG_S), stop.interrupting():
                    best = stage.choose()
            except Stopped:
                print(f"{stop.name}: --resume goes on from step {run.last['save']:,}", flush=True)
                raise SystemExit(stop.status) from None
            metrics = {"best_score": float(best.scores.mean()), "best_step": best.steps, "steps": run.steps}
            scores = dict(zip(c.TASKS, best.scores.mean(axis=1).tolist()))
            path = run.finish(best, stage.golden_obs(), metrics | {"scores": scores})
            judged = score_columns(scores, "twin", best.scores.shape[1], c.START_NOISE_RAD)
            files = [path, *stage_pages.of_run(path)]
            recorder.result(Result({"result/step": best.steps}, files, checkpoints.load(path), judged))
        return path


if __name__ == "__main__":
    errors.run(main, errors.run(parse, PRESETS, __doc__, "cpu"))
