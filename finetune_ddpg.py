"""Stage 4: DDPG fine-tuning in the official environments, from the dense reward to the official score.

    python finetune_ddpg.py --checkpoint runs/converted --out runs/finetuned [--preset demo|cpu|l4|h200]
    python finetune_ddpg.py --preset scratch --out runs/scratch

Input: a "converted" checkpoint (or a "finetuned" one, to go on from it), or nothing with the preset `scratch`. Output:
a "finetuned" checkpoint; until it is there, `<out>.resume`, from which `--resume` goes on after a kill: on a CPU to the
very bits of a run never killed; `<out>.metrics.jsonl` has the numbers of every log line, and at the end `<out>.html` is
a report with curves and verdict. SIGTERM: the state is saved, and the process ends within 10 s with status 143 (in the
warm-up nothing is saved: it begins again). The environments are played by their twin (`envs/twin.py`, the same numbers
to the bit) or, with `--backend official`, by themselves, one process a lane.

The learner is in `booster_soccer/agents/ddpg.py`, the life of a run in `booster_soccer/store/run.py`. What keeps a good
policy from being unlearned: the pre-trained critics come along and first learn on roll-outs of the frozen policy, until
they predict unseen episodes no better than before; the actor follows what its own noise brought, in small steps; its
layers thaw from the last to the first; and at the end the candidate (the best in validation, or the last policy if that
scores more on fresh seeds) must beat the start in the official environments, on episodes that no choice was made on, or
the start is the result.

One step is one policy action (50 Hz) in one lane, counted after the critics' warm-up. The reward is alpha * dense (at a
tenth of pre-training's size) + beta * score, annealed over the whole run (`rewards/annealing.py`). The score is paid
when an episode ends, by its rules or by time, as on the platform; only the first stops the bootstrap.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import contextlib
import functools
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
from booster_soccer.agents import ddpg
from booster_soccer.agents.ddpg import Batch, Ddpg, DdpgConfig, one_thread, trainable_layers
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.arrays import check_like, restore_rng, rng_array
from booster_soccer.cli import parse
from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE
from booster_soccer.rewards.annealing import anneal
from booster_soccer.rewards.dense import DenseWeights
from booster_soccer.rollout.judge import Scores, best_or_last, gain, judge
from booster_soccer.rollout.play import episode_seed
from booster_soccer.rollout.rounds import Round, RoundStatistics, explained_variance
from booster_soccer.rollout.workers import WorkerLanes, check_num_lanes
from booster_soccer.store import checkpoints
from booster_soccer.store.atomic import beside
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.store.entry import guarded
from booster_soccer.store.replay import Replay
from booster_soccer.store.run import Candidate, RecordConfig, Run, State, of_training
from booster_soccer.store.signals import Stopped, StopSignal
from booster_soccer.store.watchdog import LONG_S, Watchdog
from booster_soccer.tracking import stage_pages
from booster_soccer.tracking.record import Recorder, Result, TrackConfig
from booster_soccer.tracking.video import Films

# One stream of episode seeds for each purpose; none is that of `evaluate.py`.
_TRAINING, _VALIDATION, _CONFIRMATION, _SELECTION = 1, 2, 3, 4
_MIN_OBS_SCALE = 0.1  # features that hardly vary in the warm-up must not get huge steps
_MAX_ADVANTAGE = 4.0  # standard deviations
_WORTHWHILE = 0.01  # share of the returns' variance that two more rounds of the warm-up must explain


@dataclass(frozen=True)
class Config:
    """A fine-tuning run; one step is one policy action in one lane. `--preset` chooses all the defaults."""

    out: Path  # new directory for the "finetuned" checkpoint
    preset: str  # demo, cpu, l4, h200 or scratch
    checkpoint: Path | None = None  # "converted" or "finetuned" checkpoint to start from
    from_scratch: bool = False  # start from random networks instead: the preset scratch
    total_steps: int = 4_000_000  # without the warm-up; the reward goes over to the official score along them
    num_lanes: int = 192  # a multiple of three; with the official backend each is a process
    round_actions: int = 80  # of each lane between two updates of the learner
    warmup_rounds: int = 10  # of the frozen policy at most, for the critics; 0: they stay as they came
    ddpg: DdpgConfig = DdpgConfig()
    weights: DenseWeights = DenseWeights(idle=-0.05)  # idling is a way to collapse
    records: RecordConfig = RecordConfig(log_every=75_000, judge_every=300_000)
    tracking: TrackConfig = TrackConfig()
    validation_episodes: int = 40  # per task, the same for the start and every candidate
    confirmation_episodes: int = 100  # per task, in the official environments, on other seeds
    dense_scale: float = 0.1  # of the dense reward, where a kick pays twice its points and a fall costs ten
    start_noise: float = c.START_NOISE_RAD  # standard deviation of the noise on each joint's start position, rad
    backend: Literal["twin", "official"] = "twin"  # what trains; the same numbers, the twin about ten times faster
    # auto: the GPU where there is one; only the CPU repeats bit for bit
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0  # of starts and noise, and of networks from scratch
    resume: bool = False  # go on from <out>.resume, if it is there


# Measured: `cpu` (docs/results.md; o4). `l4` is `cpu` with videos: its lanes are played on the node's CPU cores.
_CPU = Config(out=Path("runs/cpu/finetuned"), preset="cpu")
_L4 = replace(_CPU, out=Path("runs/l4/finetuned"), preset="l4", records=replace(_CPU.records, video_every_s=600.0))
PRESETS = {
    "demo": replace(
        _CPU, out=Path("runs/demo/finetuned"), preset="demo", total_steps=250_000, num_lanes=96, warmup_rounds=4,
        validation_episodes=8, confirmation_episodes=10,
        records=RecordConfig(log_every=25_000, judge_every=125_000)),
    "cpu": _CPU,
    "l4": _L4,
    "h200": replace(_L4, out=Path("runs/h200/finetuned"), preset="h200", total_steps=8_000_000, num_lanes=384),
    # There is nothing to protect: no freezing, wide noise, long steps.
    "scratch": replace(
        _CPU, out=Path("runs/scratch/finetuned"), preset="scratch", from_scratch=True, warmup_rounds=1,
        ddpg=DdpgConfig(exploration_std=0.3, actor_learning_rate=1e-4, kl_per_round=0.02,
                        freeze_hidden_until=0, freeze_input_until=0)),
}  # fmt: skip


def check(config: Config) -> None:
    """Everything that can be told before anything runs."""
    if (config.checkpoint is None) != config.from_scratch:
        raise UserError("give either --checkpoint DIR, or --preset scratch to start from random networks")
    check_num_lanes(config.num_lanes)
    settings = vars(config) | vars(config.ddpg)
    at_least = {
        0: ("seed", "warmup_rounds", "freeze_hidden_until", "freeze_input_until", "start_noise", "kl_per_round",
            "dense_scale"),
        1: ("total_steps", "round_actions", "epochs", "batch_size"),
        2: ("validation_episodes", "confirmation_episodes"),  # a spread needs two
    }  # fmt: skip
    for least, names in at_least.items():
        for name in names:
            if settings[name] < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {settings[name]}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: PyTorch sees no GPU here: use auto or cpu; {More.NO_GPU}")
    for name in ("discount", "trace_decay", "exploration_std"):
        if not 0.0 < settings[name] < 1.0:
            raise UserError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {settings[name]}")


class Finetuning:
    """What fine-tuning brings to its run: the learner, its lanes, and their state (`store.run.Stage`)."""

    def __init__(self, config: Config, run: Run, lanes: WorkerLanes, parent: Checkpoint | None):
        self.config, self.run, self.lanes, self.parent = config, run, lanes, parent
        self.device = config.device
        if config.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rng = np.random.default_rng(config.seed)
        self.round = Round(config.round_actions, config.num_lanes)
        self.statistics = RoundStatistics({})
        self.learner: Ddpg
        self.critic_obs: np.ndarray  # (lanes, 109) what comes next
        self.loss = 0.0
        self.films = Films(beside(config.out, "videos"), config.records.video_every_s)

    # --- one iteration ----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Let the frozen start policy (random networks from scratch) play, and the critics learn from it.

        A round is predicted before it is learned from: its episodes are unseen. Two rounds without gain end it.
        """
        config = self.config
        self.critic_obs = self.lanes.start()
        unit = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
        arrays = ddpg.random_arrays(config.seed, *unit)
        if self.parent is not None:
            # What was pre-trained knows the dense reward in full, what was fine-tuned its own.
            factor = config.dense_scale if self.parent.stage == "converted" else 1.0
            arrays = ddpg.rescale_critics(self.parent.arrays, factor)
        self.learner = Ddpg(config.ddpg, arrays, *unit, self.device)
        explained: list[np.ndarray] = []
        for number in range(max(config.warmup_rounds, 1)):
            for _ in tqdm(range(config.round_actions), desc=f"warm-up {number}", disable=not sys.stderr.isatty()):
                self.play()
            if number == 0:
                met = self.round.arrays["critic_obs"][..., :OBS_SIZE]
                mean, scale = met.mean(axis=(0, 1)), np.maximum(met.std(axis=(0, 1)), _MIN_OBS_SCALE)
                arrays = ddpg.random_arrays(config.seed, mean, scale) if self.parent is None else arrays
                self.learner = Ddpg(config.ddpg, arrays, mean, scale, self.device)
            explained.append(self.explained())
            shown = []
            for task, share in zip(c.TASKS, explained[-1]):
                if has_ended := np.isfinite(share):
                    self.statistics.add(f"explained_{task}", share)
                shown.append(f"{task} {share:.0%}" if has_ended else f"{task} (no episode ended)")
            print(f"warm-up {number}: the critics explain of unseen episodes' returns: {', '.join(shown)}", flush=True)
            if config.warmup_rounds:
                self.learn(layers=())
            self.round.filled = 0
            known = np.nan_to_num(explained)
            if number > 1 and np.mean(known[-2:]) < np.max(np.mean(known[:-2], axis=1)) + _WORTHWHILE:
                break
        self.run.record(of_training(self.log(0.0)))
        # The same actor, with critics that know the official environments.
        arrays = self.learner.arrays()
        scores = self.validate(arrays, _VALIDATION)
        self.run.kept["start"] = Candidate(arrays, self.run.steps, scores.score)
        print(f"start policy in validation: {scores}", flush=True)

    def play(self) -> None:
        """One action of every lane, with exploration noise, into the round."""
        seen = self.critic_obs
        mean = self.learner.act(seen[:, :OBS_SIZE])
        noise = self.rng.standard_normal(mean.shape)
        action = np.clip(mean + self.config.ddpg.exploration_std * noise, -1.0, 1.0).astype(np.float32)
        self.lanes.send(action)
        after = self.lanes.receive()
        ended = after.terminated | after.truncated
        rewards = {"dense": after.dense, "score": after.score}
        ends = {"next_critic_obs": after.critic_obs, "terminated": after.terminated, "ended": ended}
        self.round.add(critic_obs=seen, mean=mean, noise=noise, **rewards, **ends)
        self.critic_obs = after.next_critic_obs
        for name, values in after.dense_terms.items():
            self.statistics.add(f"reward/{name}", values)
        self.statistics.add("reward/dense", after.dense)
        for name, field in (("physics_steps", "physics_steps"), ("fall_rate", "fell"), ("success", "success")):
            self.statistics.add(f"episode/{name}", getattr(after, field)[ended])
        for i, task in enumerate(self.lanes.tasks):
            self.statistics.add(f"episode/score_{task}", after.score[i][ended[i]])

    def returns(self, trace_decay: float) -> tuple[np.ndarray, np.ndarray]:
        """Advantages and values (T, B) of the round's actions, the reward mixed as it stands at this step."""
        played = self.round.arrays
        alpha, beta = anneal(self.run.steps, self.config.total_steps)
        value, next_value = (self.learner.value(played[name]) for name in ("critic_obs", "next_critic_obs"))
        reward = alpha * self.config.dense_scale * played["dense"] + beta * played["score"]
        ends = played["terminated"], played["ended"]
        return ddpg.lambda_advantages(reward, value, next_value, *ends, self.config.ddpg.discount, trace_decay), value

    def explained(self) -> np.ndarray:
        """Share (tasks,) of the variance of the round's Monte-Carlo returns that the critics explain.

        Of actions whose episode ended in the round; NaN for a task where none did.
        """
        advantage, value = self.returns(1.0)
        came_to_an_end = np.flip(np.maximum.accumulate(np.flip(self.round.arrays["ended"], 0)), 0) > 0
        of_task = np.array(self.lanes.tasks) == np.array(c.TASKS)[:, None]
        shares = [explained_variance((advantage + value)[rows], value[rows]) if rows.any() else np.nan
                  for rows in came_to_an_end & of_task[:, None]]  # fmt: skip
        return np.array(shares)

    def learn(self, layers: tuple[str, ...]) -> None:
        """From the round: the critics, and the actor's `layers`."""
        advantage, value = self.returns(self.config.ddpg.trace_decay)
        standard = np.zeros_like(advantage)
        for task in c.TASKS:  # in points of score they differ by a factor of five
            lanes = np.array(self.lanes.tasks) == task
            standard[:, lanes] = (advantage[:, lanes] - advantage[:, lanes].mean()) / (advantage[:, lanes].std() + 1e-6)
        rows = {name: self.round.arrays[name] for name in ("critic_obs", "mean", "noise")}
        rows |= {"returns": advantage + value, "advantage": standard.clip(-_MAX_ADVANTAGE, _MAX_ADVANTAGE)}
        flat = {name: self.learner.tensor(values.reshape(-1, *values.shape[2:])) for name, values in rows.items()}
        metrics = self.learner.learn(Batch(**flat), layers, self.rng)
        self.loss = metrics["critic_loss"]
        for name, number in (metrics | {"value": value.mean()}).items():
            self.statistics.add(name, np.array([number]))

    def advance(self) -> int:
        """One action in every lane; after the last one of a round, what is to be learned from it."""
        self.play()
        if self.round.full:
            self.learn(trainable_layers(self.run.steps, self.config.ddpg))
            self.round.filled = 0
        return self.config.num_lanes

    def diverged(self) -> bool:
        """Whether the critic's loss, or a network, is no longer finite."""
        arrays = self.learner.arrays().values()
        return not (np.isfinite(self.loss) and all(np.isfinite(values).all() for values in arrays))

    def log(self, steps_per_s: float) -> dict[str, float]:
        """One line to read, and its numbers."""
        line = self.statistics.take()
        alpha, beta = anneal(self.run.steps, self.config.total_steps)
        episodes = "no episode ended"
        if "episode/fall_rate" in line:
            scores = {task: line[f"episode/score_{task}"] for task in c.TASKS if f"episode/score_{task}" in line}
            episodes = " ".join(f"{task} {score:+.2f}" for task, score in scores.items())
            episodes += f", {line['episode/fall_rate']:.0%} fell, {line['episode/physics_steps']:.0f} physics steps"
        learning = ""
        if "value" in line:
            learning = f"value {line['value']:+.2f} loss {line['critic_loss']:.3f} moved {line['kl']:.4f}"
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
        """Score a policy on the seeds of a purpose in each task: on the twin, or at the end officially."""
        config = self.config
        episodes = config.validation_episodes if purpose == _VALIDATION else config.confirmation_episodes
        seeds = [episode_seed(config.seed, purpose, i) for i in range(episodes)]
        backend = "official" if purpose == _CONFIRMATION else "twin"
        return judge(policy_from_arrays(arrays), seeds, config.start_noise, backend)

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
            self.run.kept["best"] = Candidate(arrays, self.run.steps, scores.score)
        self.films.take(policy_from_arrays(arrays), self.run.steps, episode_seed(self.config.seed, _VALIDATION, 0))
        return scores.numbers("eval") | {"eval/gain": mean}

    def choose(self) -> tuple[Candidate, dict]:
        """The policy to hand on, and why: the candidate if it beats the start on fresh seeds, else the start.

        The candidate is the best in validation or the last policy, whichever scores more on seeds of their own: the
        best of many short validations is a lucky one.
        """
        verdict: dict = {"result": "start", "validation_start": float(self.start.scores.mean())}
        best = self.run.kept.get("best")
        if best is None:
            print(f"no candidate scored above the start in validation: the result is the start policy; {More.START}")
            return self.start, verdict
        if self.run.diverged_at is None and best.steps < self.run.steps:
            on_others = functools.partial(self.validate, purpose=_SELECTION)
            best = best_or_last(best, self.learner.arrays(), self.run.steps, on_others)
        start, candidate = (self.validate(policy.arrays, _CONFIRMATION) for policy in (self.start, best))
        mean, standard_error = gain(candidate.score, start.score)
        print(f"fresh seeds: start {start}; candidate of step {best.steps:,} {candidate}")
        verdict |= {
            "validation_candidate": float(best.scores.mean()),  # on the seeds of the last choice
            "candidate_step": best.steps,
            "confirmation": start.numbers("start") | candidate.numbers("candidate"),
            "gain": mean,
            "standard_error": standard_error,
        }
        of_gain = f"gain {mean:+.3f} +- {standard_error:.3f}"
        if mean > standard_error:
            print(f"{of_gain}: the result is the candidate")
            return best, verdict | {"result": "candidate"}
        print(f"{of_gain} is not above its standard error: the result is the start; {More.START}")
        return self.start, verdict

    # --- state --------------------------------------------------------------------------------------------

    def golden_obs(self) -> np.ndarray:
        """The parent's golden observations (16, 87), or present ones."""
        if self.parent is not None:
            return self.parent.golden_obs
        return np.resize(self.critic_obs[:, :OBS_SIZE], (checkpoints.GOLDEN_PAIRS, OBS_SIZE))

    def state(self) -> State:
        """Learner, lanes, random generator and statistics."""
        tables = {
            "learner": self.learner.state(),
            "lanes": self.lanes.state() | {"critic_obs": self.critic_obs, "rng": rng_array(self.rng)},
            "statistics": self.statistics.state(),
            "round": self.round.state(),
        }
        return State(self.learner.arrays(), self.golden_obs(), tables, None)

    def take_up(self, saved: Checkpoint, fill: Callable[[Replay], None]) -> None:  # there is no buffer
        """Go on from a saved state."""
        learner, lanes, statistics = (checkpoints.load_extra(saved, key) for key in ("learner", "lanes", "statistics"))
        what = f"{saved.path}: the saved state"
        now = {"critic_obs": np.zeros((len(self.lanes.tasks), CRITIC_OBS_SIZE), np.float32), "rng": rng_array(self.rng)}
        check_like(lanes, self.lanes.state() | now, what)
        lengths = lanes["lane_length"]
        if min(lanes["lane_episode"].min(), lengths.min()) < 0 or lengths.max() > c.EPISODE_ACTIONS:
            raise UserError(f"{what} holds impossible episodes: use an older one; {More.RUN}")
        if any(value.shape != (2,) or value.dtype != np.float64 for value in statistics.values()):
            raise UserError(f"{what}: its statistics are no sums: use the code that wrote it; {More.CHECKPOINT}")
        with _as_user_error(what):
            self.learner = Ddpg.restore(self.config.ddpg, saved.arrays, learner, self.device)
        self.round.restore(checkpoints.load_extra(saved, "round"), what)
        self.statistics = RoundStatistics(statistics)
        restore_rng(self.rng, lanes["rng"])
        self.critic_obs = self.lanes.restore({name: lanes[name] for name in lanes.keys() - now.keys()})
        if not np.array_equal(self.critic_obs, lanes["critic_obs"]):
            print("warning: the running episodes did not repeat exactly (another machine?): going on all the same")


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Arrays with wrong names or shapes, as PyTorch reports them, in one line."""
    try:
        yield
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
        message = f"{what} does not fit these networks ({errors.one_line(str(error))[:100]})"
        raise UserError(f"{message}: use the code that wrote it; {More.CHECKPOINT}") from error


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
                    with Watchdog("the critics' warm-up", LONG_S), stop.interrupting():
                        stage.warm_up()
                    run.save(stage)  # the warm-up is long
                run.train(stage, config.total_steps, stop)
                with Watchdog("the comparison at the end", LONG_S), stop.interrupting():
                    chosen, verdict = stage.choose()
                verdict |= {"finetune_steps": run.steps}
                path = run.finish(chosen, stage.golden_obs(), verdict)
                numbers = {f"result/{name}": verdict[name] for name in ("gain", "standard_error") if name in verdict}
                recorder.result(Result(numbers, [path, *stage_pages.of_run(path)], checkpoints.load(path)))
        except Stopped:
            where = f"--resume goes on from step {run.last['save']:,}" if run.resume_path.exists() else "start over"
            print(f"{stop.name}: {where}", flush=True)
            raise SystemExit(stop.status) from None
        return path


if __name__ == "__main__":
    errors.run(main, errors.run(parse, PRESETS, __doc__, "cpu"))
