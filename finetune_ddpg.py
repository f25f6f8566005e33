"""Stage 3: DDPG fine-tuning in the official environments, from the dense reward to the official score.

    python finetune_ddpg.py --checkpoint runs/converted --out runs/finetuned [--preset demo|cpu|l4|h200]
    python finetune_ddpg.py --preset scratch --out runs/scratch

Input: a "converted" checkpoint (or a "finetuned" one, to go on from it), or nothing with the preset `scratch`. Output:
a "finetuned" checkpoint; until it is there, `<out>.resume` and `<out>.replay`, from which `--resume` goes on after a
kill: on a CPU to the very bits of a run never killed; `<out>.metrics.jsonl` has the numbers of every log line, and at
the end `<out>.html` is a report with curves and verdict. SIGTERM: the state is saved, and the process ends within 10 s
with status 143 (in the warm-up nothing is saved: it begins again). The environments are played by their twin
(`envs/twin.py`, the same numbers to the bit) or, with `--backend official`, by themselves, one process a lane.

The learner is in `booster_soccer/agents/ddpg.py`, the life of a run in `booster_soccer/store/run.py`. What keeps a
good policy from being unlearned: the pre-trained critics come along and first learn on roll-outs of the frozen policy
(WSRL, arXiv 2412.07762); the actor's layers thaw from the last to the first; and at the end the best candidate must
beat the start on episodes that no choice was made on, or the start is the result.

One step is one policy action (50 Hz) in one lane, counted after the critics' warm-up. Rewards are stored in two parts
and mixed when sampled: alpha * dense + beta * score, annealed over the whole run (`rewards/annealing.py`). The score is
paid when an episode ends, by its rules or by time, as on the platform; only the first stops the bootstrap.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the lanes' processes need the cores

import numpy as np
import torch
from tqdm import tqdm

from booster_soccer import errors
from booster_soccer.agents.ddpg import Batch, Ddpg, DdpgConfig, one_thread, random_arrays, trainable_layers
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.arrays import check_like, restore_rng, rng_array
from booster_soccer.cli import parse
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, mirror_critic_observation
from booster_soccer.preprocess.symmetry import mirror_action
from booster_soccer.rewards.annealing import anneal
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.judge import START_NOISE_RAD, Scores, gain, judge
from booster_soccer.rollout.play import episode_seed
from booster_soccer.rollout.workers import WorkerLanes, check_num_lanes
from booster_soccer.store import checkpoints
from booster_soccer.store.atomic import beside
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.store.entry import guarded
from booster_soccer.store.replay import Replay
from booster_soccer.store.run import Candidate, RecordConfig, Run, State, of_training
from booster_soccer.store.signals import Stopped, StopSignal
from booster_soccer.tracking import stage_pages
from booster_soccer.tracking.record import Recorder, Result, TrackConfig
from booster_soccer.tracking.video import Films

# One stream of episode seeds for each purpose; none is that of `evaluate.py`.
_TRAINING, _VALIDATION, _CONFIRMATION = 1, 2, 3
_MIN_OBS_SCALE = 0.1  # features that hardly vary in the warm-up must not get huge steps
# Of one transition: the two parts of its reward are kept apart, and mixed when sampled.
_ROW_SHAPES = {"critic_obs": (CRITIC_OBS_SIZE,), "action": (c.NUM_JOINTS,), "dense": (), "score": (),
               "next_critic_obs": (CRITIC_OBS_SIZE,), "terminated": ()}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A fine-tuning run; one step is one policy action in one lane. `--preset` chooses all the defaults."""

    out: Path  # new directory for the "finetuned" checkpoint
    preset: str  # demo, cpu, l4, h200 or scratch
    checkpoint: Path | None = None  # "converted" or "finetuned" checkpoint to start from
    from_scratch: bool = False  # start from random networks instead: the preset scratch
    total_steps: int = 1_200_000
    num_lanes: int = 24  # a multiple of three; with the official backend each is a process
    warmup_steps: int = 12_000  # of the frozen policy, before the first update
    warmup_updates: int = 4_000  # of the critics only, after these
    updates_per_round: int = 2  # gradient steps per action of all lanes
    batch_size: int = 256
    buffer_size: int = 400_000
    exploration_std: float = 0.05  # of the noise on actions in [-1, 1]
    mirror: bool = True  # mirror half of each batch
    ddpg: DdpgConfig = DdpgConfig()
    weights: DenseWeights = DenseWeights(idle=-0.05)  # idling is a way to collapse
    records: RecordConfig = RecordConfig(log_every=20_000, judge_every=100_000)
    tracking: TrackConfig = TrackConfig()
    validation_episodes: int = 20  # per task, the same for the start and every candidate
    confirmation_episodes: int = 50  # per task, for the last comparison, on other seeds
    start_noise: float = START_NOISE_RAD  # standard deviation of the noise on each joint's start position, rad
    backend: Literal["twin", "official"] = "twin"  # what trains; the same numbers, the twin about ten times faster
    device: Literal["auto", "cpu", "cuda"] = (
        "auto"  # auto: the GPU where there is one; only the CPU repeats bit for bit
    )
    seed: int = 0
    resume: bool = False  # go on from <out>.resume, if it is there


# Measured times and scores: docs/experiments.md. The GPU presets have not been measured.
_CPU = Config(out=Path("runs/cpu/finetuned"), preset="cpu")
_L4 = replace(
    _CPU, out=Path("runs/l4/finetuned"), preset="l4", total_steps=5_000_000, num_lanes=96, warmup_steps=30_000,
    warmup_updates=10_000, updates_per_round=4, batch_size=1024, buffer_size=1_000_000, confirmation_episodes=100,
    records=RecordConfig(log_every=50_000, judge_every=250_000, video_every_s=600.0),
)  # fmt: skip
PRESETS = {
    "demo": replace(
        _CPU, out=Path("runs/demo/finetuned"), preset="demo", total_steps=36_000, warmup_steps=3_000,
        warmup_updates=500, buffer_size=40_000, validation_episodes=4, confirmation_episodes=8,
        ddpg=DdpgConfig(freeze_hidden_until=3_600, freeze_input_until=9_000),
        records=RecordConfig(log_every=6_000, judge_every=12_000)),
    "cpu": _CPU,
    "l4": _L4,
    "h200": replace(_L4, out=Path("runs/h200/finetuned"), preset="h200"),
    # There is nothing to protect: no freezing, wide noise.
    "scratch": replace(
        _CPU, out=Path("runs/scratch/finetuned"), preset="scratch", from_scratch=True, exploration_std=0.3,
        ddpg=DdpgConfig(actor_learning_rate=3e-4, freeze_hidden_until=0, freeze_input_until=0)),
}  # fmt: skip


def check(config: Config) -> None:
    """Everything that can be told before anything runs."""
    if (config.checkpoint is None) != config.from_scratch:
        raise UserError("give either --checkpoint DIR, or --preset scratch to start from random networks")
    check_num_lanes(config.num_lanes)
    settings = vars(config) | vars(config.ddpg)
    at_least = {
        0: ("seed", "warmup_updates", "freeze_hidden_until", "freeze_input_until", "updates_per_round", "start_noise",
            "exploration_std"),
        1: ("total_steps", "batch_size", "actor_every", "warmup_steps"),
        2: ("validation_episodes", "confirmation_episodes"),  # a spread needs two
    }  # fmt: skip
    for least, names in at_least.items():
        for name in names:
            if settings[name] < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {settings[name]}")
    for name, other in (("warmup_steps", "batch_size"), ("buffer_size", "warmup_steps")):
        if settings[name] < settings[other]:
            raise UserError(f"--{name.replace('_', '-')} must be at least {other} ({settings[other]})")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here (torch.cuda.is_available()): use auto or cpu")
    if not 0.0 < config.ddpg.discount < 1.0:
        raise UserError(f"--discount must lie between 0 and 1, got {config.ddpg.discount}")


class Statistics:
    """Means since the last line of the log."""

    def __init__(self, state: dict[str, np.ndarray]):
        """What `state` gave; empty at first."""
        self._sums = {name: float(value[0]) for name, value in state.items()}
        self._counts = {name: int(value[1]) for name, value in state.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Sum and count (2,) float64 of each quantity."""
        return {name: np.array([self._sums[name], self._counts[name]], np.float64) for name in self._sums}

    def add(self, name: str, values: np.ndarray) -> None:
        """Add values (B,) of one quantity."""
        self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values))
        self._counts[name] = self._counts.get(name, 0) + np.size(values)

    def take(self) -> dict[str, float]:
        """The means, and start again."""
        means = {name: self._sums[name] / self._counts[name] for name in self._sums if self._counts[name]}
        self._sums, self._counts = {}, {}
        return means


class Finetuning:
    """What fine-tuning brings to its run: the learner, its lanes, and their state (`store.run.Stage`)."""

    def __init__(self, config: Config, run: Run, lanes: WorkerLanes, parent: Checkpoint | None):
        self.config, self.run, self.lanes, self.parent = config, run, lanes, parent
        self.device = config.device
        if config.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rng = np.random.default_rng(config.seed)
        self.replay = Replay(config.buffer_size, _ROW_SHAPES)
        self.statistics = Statistics({})
        self.learner: Ddpg
        self.critic_obs: np.ndarray  # (lanes, 109) what comes next
        self.loss = torch.zeros((), device="cpu")
        self.films = Films(beside(config.out, "videos"), config.records.video_every_s)

    # --- one iteration ----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Fill the buffer with the frozen start policy (random networks from scratch), then train the critics on it."""
        config = self.config
        self.critic_obs = self.lanes.start()
        unit = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
        arrays = random_arrays(config.seed, *unit) if self.parent is None else self.parent.arrays
        policy, rounds = policy_from_arrays(arrays), -(-config.warmup_steps // config.num_lanes)
        for _ in tqdm(range(rounds), desc="warm-up", unit="round", disable=not sys.stderr.isatty()):
            self.receive(self.send(policy(self.critic_obs[:, :OBS_SIZE])))
        met = self.replay.arrays["critic_obs"][: len(self.replay), :OBS_SIZE]
        mean, scale = met.mean(axis=0), np.maximum(met.std(axis=0), _MIN_OBS_SCALE)
        if self.parent is None:
            arrays = random_arrays(config.seed, mean, scale)
        self.learner = Ddpg(config.ddpg, arrays, mean, scale, self.device)
        for _ in tqdm(range(config.warmup_updates), desc="critics", unit="update", disable=not sys.stderr.isatty()):
            self.update(1, layers=())
        self.run.record(of_training(self.log(0.0)))
        # The same actor, with critics that know the official environments.
        arrays = self.learner.arrays()
        scores = self.validate(arrays, _VALIDATION)
        self.keep("start", arrays, scores)
        print(f"start policy in validation: {scores}", flush=True)

    def send(self, mean_action: np.ndarray) -> np.ndarray:
        """Add exploration noise, set the lanes going; returns the actions (B, 12)."""
        noise = self.config.exploration_std * self.rng.standard_normal(mean_action.shape)
        action = np.clip(mean_action + noise, -1.0, 1.0).astype(np.float32)
        self.lanes.send(action)
        return action

    def receive(self, action: np.ndarray) -> None:
        """Wait for the lanes and store what they bring."""
        after = self.lanes.receive()
        self.replay.add(
            critic_obs=self.critic_obs,
            action=action,
            dense=after.dense,
            score=after.score,
            next_critic_obs=after.critic_obs,
            terminated=after.terminated,
        )
        self.critic_obs = after.next_critic_obs
        ended = after.terminated | after.truncated
        for name, values in after.dense_terms.items():
            self.statistics.add(f"reward/{name}", values)
        self.statistics.add("reward/dense", after.dense)
        for name, field in (("physics_steps", "physics_steps"), ("fall_rate", "fell"), ("success", "success")):
            self.statistics.add(f"episode/{name}", getattr(after, field)[ended])
        for i, task in enumerate(self.lanes.tasks):
            self.statistics.add(f"episode/score_{task}", after.score[i][ended[i]])

    def sample(self) -> Batch:
        """Transitions, the reward mixed as it stands at this step; half of them mirrored."""
        config = self.config
        rows = self.replay.sample(self.rng, config.batch_size)
        if config.mirror:
            half = slice(config.batch_size // 2)
            for name in ("critic_obs", "next_critic_obs"):
                rows[name][half] = mirror_critic_observation(rows[name][half])
            rows["action"][half] = mirror_action(rows["action"][half])
        alpha, beta = anneal(self.run.steps, config.total_steps)
        rows["reward"] = alpha * rows.pop("dense") + beta * rows.pop("score")
        return Batch(**{name: self.learner.tensor(values) for name, values in rows.items()})

    def update(self, updates: int, layers: tuple[str, ...]) -> None:
        """Gradient steps on the buffer."""
        metrics: dict[str, torch.Tensor] = {}
        for _ in range(updates):
            metrics = self.learner.update(self.sample(), layers)
        for name, value in metrics.items():  # of the last one: reading a value makes a GPU wait
            self.statistics.add(name, value.item())
        self.loss = metrics.get("critic_loss", self.loss)

    def advance(self) -> int:
        """One action in every lane, and the updates that belong to it while the lanes move."""
        action = self.send(self.learner.act(self.critic_obs[:, :OBS_SIZE]))
        self.update(self.config.updates_per_round, trainable_layers(self.run.steps, self.config.ddpg))
        self.receive(action)
        return self.config.num_lanes

    def diverged(self) -> bool:
        """Whether the critic's loss, or a network, is no longer finite."""
        arrays = self.learner.arrays().values()
        return not (np.isfinite(self.loss.item()) and all(np.isfinite(values).all() for values in arrays))

    def log(self, steps_per_s: float) -> dict[str, float]:
        """One line to read, and its numbers."""
        line = self.statistics.take()
        alpha, beta = anneal(self.run.steps, self.config.total_steps)
        episodes = "no episode ended"
        if "episode/fall_rate" in line:
            scores = {task: line[f"episode/score_{task}"] for task in c.TASKS if f"episode/score_{task}" in line}
            episodes = " ".join(f"{task} {score:+.2f}" for task, score in scores.items())
            episodes += f", {line['episode/fall_rate']:.0%} fell, {line['episode/physics_steps']:.0f} physics steps"
        learning = f"value {line['value']:+.2f} loss {line['critic_loss']:.3f}" if "value" in line else ""
        tqdm.write(
            f"step {self.run.steps:>7,} alpha {alpha:.2f} beta {beta:.2f} | {episodes} | "
            f"dense {line['reward/dense']:+.3f} {learning}"
        )
        return {"steps_per_s": steps_per_s, "weight_dense": alpha, "weight_official": beta} | line

    # --- judging ----------------------------------------------------------------------------------------

    @property
    def start(self) -> Candidate:
        """The policy that it began with."""
        return self.run.kept["start"]

    def validate(self, arrays: dict[str, np.ndarray], purpose: int) -> Scores:
        """Score a policy on the seeds of a purpose in each task."""
        config = self.config
        episodes = config.validation_episodes if purpose == _VALIDATION else config.confirmation_episodes
        seeds = [episode_seed(config.seed, purpose, i) for i in range(episodes)]
        return judge(policy_from_arrays(arrays), seeds, config.start_noise)

    def keep(self, name: str, arrays: dict[str, np.ndarray], scores: Scores) -> None:
        """Remember a judged policy."""
        self.run.kept[name] = Candidate(arrays, self.run.steps, scores.score)

    def judge(self) -> dict[str, float]:
        """Validate the present policy; keep it if it is the best so far and above the start."""
        arrays = self.learner.arrays()
        scores = self.validate(arrays, _VALIDATION)
        mean, standard_error = gain(scores.score, self.start.scores)
        tqdm.write(
            f"  validation at {self.run.steps:,}: {scores} | start {self.start.scores.mean():+.3f}, "
            f"gain {mean:+.3f} +- {standard_error:.3f}"
        )
        if scores.mean > self.run.kept.get("best", self.start).scores.mean():
            self.keep("best", arrays, scores)
        self.films.take(policy_from_arrays(arrays), self.run.steps, episode_seed(self.config.seed, _VALIDATION, 0))
        return scores.numbers("eval") | {"eval/gain": mean}

    def choose(self) -> tuple[dict[str, np.ndarray], dict]:
        """The networks to hand on, and why: the best candidate if it beats the start on fresh seeds, else the start."""
        verdict: dict = {"result": "start", "validation_start": float(self.start.scores.mean())}
        best = self.run.kept.get("best")
        if best is None:
            print("no candidate scored above the start in validation: the result is the start policy")
            return self.start.arrays, verdict
        start, candidate = (self.validate(policy.arrays, _CONFIRMATION) for policy in (self.start, best))
        mean, standard_error = gain(candidate.score, start.score)
        print(f"fresh seeds: start {start}; candidate of step {best.steps:,} {candidate}")
        verdict |= {
            "validation_candidate": float(best.scores.mean()),
            "candidate_step": best.steps,
            "confirmation": start.numbers("start") | candidate.numbers("candidate"),
            "gain": mean,
            "standard_error": standard_error,
        }
        if mean > standard_error:
            print(f"gain {mean:+.3f} +- {standard_error:.3f}: the result is the candidate")
            return best.arrays, verdict | {"result": "candidate"}
        print(f"gain {mean:+.3f} +- {standard_error:.3f} is not above its standard error: the result is the start")
        return self.start.arrays, verdict

    # --- state --------------------------------------------------------------------------------------------

    def golden_obs(self) -> np.ndarray:
        """The parent's golden observations (16, 87), or the first that were met."""
        if self.parent is not None:
            return self.parent.golden_obs
        return self.replay.arrays["critic_obs"][: checkpoints.GOLDEN_PAIRS, :OBS_SIZE]

    def state(self) -> State:
        """Learner, lanes, random generator and statistics."""
        tables = {
            "learner": self.learner.state(),
            "lanes": self.lanes.state() | {"critic_obs": self.critic_obs, "rng": rng_array(self.rng)},
            "statistics": self.statistics.state(),
        }
        return State(self.learner.arrays(), self.golden_obs(), tables, self.replay)

    def take_up(self, saved: Checkpoint, fill: Callable[[Replay], None]) -> None:
        """Go on from a saved state."""
        learner, lanes, statistics = (
            checkpoints.load_extra(saved, name) for name in ("learner", "lanes", "statistics")
        )
        what = f"{saved.path}: the saved state"
        now = {"critic_obs": np.zeros((len(self.lanes.tasks), CRITIC_OBS_SIZE), np.float32), "rng": rng_array(self.rng)}
        check_like(lanes, self.lanes.state() | now, what)
        lengths = lanes["lane_length"]
        if min(lanes["lane_episode"].min(), lengths.min()) < 0 or lengths.max() > c.EPISODE_ACTIONS:
            raise UserError(f"{what} holds impossible episodes: use an older one")
        if any(value.shape != (2,) or value.dtype != np.float64 for value in statistics.values()):
            raise UserError(f"{what}: its statistics are no sums: use the code that wrote it")
        with _as_user_error(what):
            self.learner = Ddpg.restore(self.config.ddpg, saved.arrays, learner, self.device)
        replay = Replay(self.config.buffer_size, _ROW_SHAPES)
        fill(replay)
        self.replay, self.statistics = replay, Statistics(statistics)
        restore_rng(self.rng, lanes["rng"])
        self.critic_obs = self.lanes.restore(lanes)
        if not np.array_equal(self.critic_obs, lanes["critic_obs"]):
            print("warning: the running episodes did not repeat exactly (another machine?): going on all the same")


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Arrays with wrong names or shapes, as PyTorch reports them, in one line."""
    try:
        yield
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
        message = str(error).replace("\n", " ")[:100]
        raise UserError(f"{what} does not fit these networks ({message}): use the code that wrote it") from error


@guarded("out")
def main(config: Config) -> Path:
    """Fine-tune; returns the output directory."""
    check(config)
    parent = None if config.checkpoint is None else checkpoints.load(config.checkpoint, ("converted", "finetuned"))
    parents, steps_before = ([], 0) if parent is None else ([parent], parent.manifest["steps"])
    run = Run(config.out, "finetuned", config, parents, ("checkpoint", "device", "track"), steps_before)
    if config.resume and run.is_finished():
        print(config.out)
        return config.out
    goes_on = run.goes_on(config.resume)
    lane_seed = episode_seed(config.seed, _TRAINING)
    lanes = WorkerLanes(config.backend, config.num_lanes, lane_seed, config.start_noise, config.weights)
    with StopSignal() as stop, lanes, one_thread():
        stage = Finetuning(config, run, lanes, parent)
        try:
            if goes_on:
                run.restore(stage)
                print(f"resuming at step {run.steps:,}", flush=True)
            with Recorder(run.out, run.stage, config, parents, goes_on, watch_gpu=True) as recorder:
                run.watch, stage.films.taken = recorder.at, recorder.artifact
                if not goes_on:
                    with stop.interrupting():
                        stage.warm_up()
                    run.save(stage)  # the warm-up is long
                run.train(stage, config.total_steps, stop)
                with stop.interrupting():
                    arrays, verdict = stage.choose()
                path = run.finish(arrays, stage.golden_obs(), verdict | {"finetune_steps": run.steps})
                numbers = {f"result/{name}": verdict[name] for name in ("gain", "standard_error") if name in verdict}
                recorder.result(Result(numbers, [path, *stage_pages.of_run(path)], checkpoints.load(path)))
        except Stopped:
            where = f"--resume goes on from step {run.last['save']:,}" if run.resume_path.exists() else "start over"
            print(f"{stop.name}: {where}", flush=True)
            raise SystemExit(stop.status) from None
        return path


if __name__ == "__main__":
    errors.run(main, errors.run(parse, PRESETS, __doc__, "cpu"))
