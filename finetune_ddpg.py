"""Stage 3: DDPG fine-tuning in the official environments, from the dense reward to the official score.

    python finetune_ddpg.py --checkpoint runs/converted --out runs/finetuned [--preset demo|cpu|l4]
    python finetune_ddpg.py --from-scratch --out runs/scratch

Input: a "converted" checkpoint (or a "finetuned" one, to go on from it), or nothing with `--from-scratch`.
Output: a "finetuned" checkpoint; until it is there, `<out>.resume` and `<out>.replay`, from which `--resume`
goes on after a kill: on a CPU to the very bits of a run never killed. SIGTERM: the state is saved, and the
process ends within 10 s with status 143 (in the warm-up nothing is saved: it begins again). The environments are played by their twin (`envs/twin.py`, the same numbers to the bit) or, with
`--backend official`, by themselves, one process a lane.

Deep deterministic policy gradient (Lillicrap et al. 2016): a deterministic actor, exploration noise on its
actions, target networks. Two critics, of which targets take the minimum (Fujimoto et al. 2018: a policy
that is already good has more to lose from overestimates) and the actor's objective the mean. What keeps a
good policy from being unlearned: the pre-trained critics come along and first learn on roll-outs of the
frozen policy (WSRL, arXiv 2412.07762); the actor's layers thaw from the last to the first; and at the end
the best candidate must beat the start on episodes that no choice was made on, or the start is the result.

One step is one policy action (50 Hz) in one lane, counted after the critics' warm-up. Rewards are stored in
two parts, dense and official, and mixed when sampled: alpha * dense + beta * score, annealed over the whole
run (`rewards/annealing.py`). The score is paid when an episode ends, by its rules or by time, as on the
platform; only the first stops the bootstrap.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the lanes' processes need the cores

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from booster_soccer import errors
from booster_soccer.agents.policy import LAYERS, policy_from_arrays
from booster_soccer.agents.torch_networks import Actor, Critic
from booster_soccer.arrays import check_like, restore_rng, rng_array
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.symmetry import mirror_action, mirror_observation
from booster_soccer.rewards.annealing import anneal
from booster_soccer.rewards.finetune import FinetuneWeights, Reading, Transition, dense_reward, dense_terms
from booster_soccer.rollout.play import Episode, episode_seed, play_in_workers
from booster_soccer.rollout.workers import BACKENDS, LaneStep, WorkerLanes, check_num_lanes
from booster_soccer.store import checkpoints, resume
from booster_soccer.store.replay import Replay, Segments
from convert_jax2torch import check_new, critics_from_arrays, fold_normalizer, load_module

# One stream of episode seeds for each purpose; none is that of `evaluate.py`.
_TRAINING, _VALIDATION, _CONFIRMATION = 1, 2, 3
_MIN_OBS_SCALE = 0.1  # features that hardly vary in the warm-up must not get huge steps
# Of one transition: the two parts of its reward are kept apart, and mixed when sampled.
_ROW_SHAPES = {"obs": (OBS_SIZE,), "action": (c.NUM_JOINTS,), "dense": (), "score": (), "next_obs": (OBS_SIZE,),
               "terminated": ()}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. `None` takes the preset's value, or with `--from-scratch` its own."""

    out: Path  # new directory for the "finetuned" checkpoint
    checkpoint: Path | None = None  # "converted" or "finetuned" checkpoint to start from
    from_scratch: bool = False  # start from random networks instead
    preset: str = "cpu"  # demo, cpu or l4
    backend: str = "twin"  # twin or official; the same numbers, the twin about ten times faster
    seed: int = 0
    resume: bool = False  # go on from <out>.resume, if it is there

    # --- length; steps are policy actions in one lane
    total_steps: int | None = None
    num_lanes: int | None = None  # a multiple of three; with the official backend each is a process
    warmup_steps: int | None = None  # of the frozen policy, before the first update
    warmup_updates: int | None = None  # of the critics only, after these
    freeze_hidden_until: int | None = None  # before this step only the last layer learns
    freeze_input_until: int | None = None  # before this step only the last two

    # --- learning
    updates_per_round: int | None = None  # gradient steps per action of all lanes
    batch_size: int | None = None
    buffer_size: int | None = None
    exploration_std: float | None = None  # of the noise on actions in [-1, 1]
    actor_learning_rate: float | None = None
    critic_learning_rate: float = 3e-4
    actor_every: int = 2  # critic updates per actor update
    discount: float = 0.995  # a score two seconds away counts 61 %
    target_tau: float = 0.01
    mirror: bool = True  # mirror half of each batch
    weights: FinetuneWeights = field(default_factory=FinetuneWeights)
    device: str = "auto"  # auto: the GPU where there is one; only the CPU repeats bit for bit

    # --- validation and records
    start_noise: float = 0.02  # standard deviation of the noise on each joint's start position, rad
    validation_episodes: int | None = None  # per task, the same for the start and every candidate
    confirmation_episodes: int | None = None  # per task, for the last comparison, on other seeds
    validate_every: int | None = None  # steps
    log_every: int | None = None  # steps
    checkpoint_every: int = 200_000  # steps between saved states ...
    checkpoint_interval_s: float = 120.0  # ... and the least time between them
    keep_state: bool = False  # leave the last saved state there at the end


# Measured times and scores: docs/experiments.md.
PRESETS: dict[str, dict] = {
    "demo": {
        "total_steps": 36_000, "num_lanes": 24, "warmup_steps": 3_000, "warmup_updates": 500,
        "freeze_hidden_until": 3_600, "freeze_input_until": 9_000, "updates_per_round": 2, "batch_size": 256,
        "buffer_size": 40_000, "validation_episodes": 4, "confirmation_episodes": 8, "validate_every": 12_000,
        "log_every": 6_000,
    },
    "cpu": {
        "total_steps": 1_200_000, "num_lanes": 24, "warmup_steps": 12_000, "warmup_updates": 4_000,
        "freeze_hidden_until": 20_000, "freeze_input_until": 50_000, "updates_per_round": 2, "batch_size": 256,
        "buffer_size": 400_000, "validation_episodes": 20, "confirmation_episodes": 50,
        "validate_every": 100_000, "log_every": 20_000,
    },
    "l4": {
        "total_steps": 5_000_000, "num_lanes": 96, "warmup_steps": 30_000, "warmup_updates": 10_000,
        "freeze_hidden_until": 20_000, "freeze_input_until": 50_000, "updates_per_round": 4, "batch_size": 1024,
        "buffer_size": 1_000_000, "validation_episodes": 20, "confirmation_episodes": 100,
        "validate_every": 250_000, "log_every": 50_000,
    },
}  # fmt: skip
# From scratch there is nothing to protect: no freezing, no critics to keep, wide noise.
_FROM_SCRATCH = {
    "exploration_std": 0.3,
    "actor_learning_rate": 3e-4,
    "freeze_hidden_until": 0,
    "freeze_input_until": 0,
}
_FROM_CHECKPOINT = {"exploration_std": 0.05, "actor_learning_rate": 3e-5}


def resolve(config: Config) -> Config:
    """Fill in the preset and check what can be checked without running."""
    if (config.checkpoint is None) != config.from_scratch:
        raise UserError("give either --checkpoint DIR or --from-scratch")
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset} is unknown: use one of {', '.join(PRESETS)}")
    if config.backend not in BACKENDS:
        raise UserError(f"--backend {config.backend} is unknown: use one of {', '.join(BACKENDS)}")
    defaults = PRESETS[config.preset] | (_FROM_SCRATCH if config.from_scratch else _FROM_CHECKPOINT)
    config = replace(config, **{name: v for name, v in defaults.items() if getattr(config, name) is None})
    check_num_lanes(config.num_lanes)
    at_least = {
        0: ("seed", "warmup_updates", "freeze_hidden_until", "freeze_input_until", "updates_per_round", "start_noise",
            "exploration_std"),
        1: ("total_steps", "batch_size", "actor_every", "validate_every", "log_every", "warmup_steps"),
        2: ("validation_episodes", "confirmation_episodes"),  # a spread needs two
    }  # fmt: skip
    for least, names in at_least.items():
        for name in names:
            if getattr(config, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
    for name, least in (("warmup_steps", "batch_size"), ("buffer_size", "warmup_steps")):
        if getattr(config, name) < getattr(config, least):
            raise UserError(f"--{name.replace('_', '-')} must be at least {least} ({getattr(config, least)})")
    if not 0.0 < config.discount < 1.0:
        raise UserError(f"--discount must lie between 0 and 1, got {config.discount}")
    if config.device == "auto":
        config = replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
    return config


# --- the learner --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions."""

    obs: torch.Tensor  # (B, 87)
    action: torch.Tensor  # (B, 12)
    reward: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, 87) the true next observation, also at an episode's end
    terminated: torch.Tensor  # (B,) 1.0 where no bootstrap may happen


def trainable_layers(step: int, config: Config) -> tuple[str, ...]:
    """The actor's layers that learn at `step`: the last, then the last two, then all."""
    if step < config.freeze_hidden_until:
        return LAYERS[2:]
    return LAYERS[1:] if step < config.freeze_input_until else LAYERS


def step_as_if_normalized(
    optimizer: torch.optim.Optimizer, layers: list[nn.Linear], mean: torch.Tensor, scale: torch.Tensor
) -> None:
    """One optimiser step that moves `layers`, on raw inputs, as if their inputs were (x - mean) / scale.

    The normaliser is folded into them, and Adam's steps are equally long in every weight: without this, a
    weight on a distance of 17 m would change the function a hundred times more than one on a joint angle.
    With W' = W scale and b' = b + W mean the function is W' (x - mean) / scale + b'; the gradient is taken
    there, and the step that the optimiser makes there is carried back.
    """
    layers = [layer for layer in layers if layer.weight.grad is not None]
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight.grad.sub_(torch.outer(layer.bias.grad, mean)).div_(scale)
        optimizer.step()
        for layer, old in zip(layers, before):
            moved = (layer.weight - old) / scale
            layer.weight.copy_(old + moved)
            layer.bias.sub_(moved @ mean)


class Learner:
    """Actor, two critics, their targets and optimisers."""

    def __init__(self, config: Config, arrays: dict[str, np.ndarray], obs_mean: np.ndarray, obs_scale: np.ndarray):
        """`arrays` as in a converted checkpoint; mean and scale (87,) of observations shape the steps only."""
        self.config = config
        self.device = torch.device(config.device)
        self.actor = load_module(Actor(), "actor", arrays).to(self.device)
        target_actor = "target_actor" if "target_actor.input.weight" in arrays else "actor"
        self.target_actor = load_module(Actor(), target_actor, arrays).to(self.device)
        self.critics = critics_from_arrays(arrays, "critic").to(self.device)
        self.target_critics = critics_from_arrays(arrays, "target_critic").to(self.device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.actor_learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=config.critic_learning_rate)
        self.obs_mean, self.obs_scale = self.tensor(obs_mean), self.tensor(obs_scale)
        actions = torch.zeros(c.NUM_JOINTS, device=self.device)
        self._critic_mean = torch.cat([self.obs_mean, actions])
        self._critic_scale = torch.cat([self.obs_scale, actions + 1.0])
        self.updates = 0

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """A float32 tensor on the learner's device."""
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions (B, 12) without noise for observations (B, 87)."""
        return self.actor(self.tensor(obs)).cpu().numpy()

    def update(self, batch: Batch, layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """One gradient step of the critics, and at every `actor_every`-th of the actor's `layers`."""
        config = self.config
        with torch.no_grad():
            next_action = self.target_actor(batch.next_obs)
            next_value = torch.minimum(*(critic(batch.next_obs, next_action) for critic in self.target_critics))
            target = batch.reward + config.discount * (1.0 - batch.terminated) * next_value
        critic_loss = sum(F.mse_loss(critic(batch.obs, batch.action), target) for critic in self.critics)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        first_layers = [critic.input for critic in self.critics]
        step_as_if_normalized(self.critic_optimizer, first_layers, self._critic_mean, self._critic_scale)
        self.updates += 1
        if layers and self.updates % config.actor_every == 0:
            self._update_actor(batch, layers)
            _follow(self.target_actor, self.actor, config.target_tau)
        _follow(self.target_critics, self.critics, config.target_tau)
        return {"critic_loss": critic_loss.detach(), "value": target.mean()}

    def _update_actor(self, batch: Batch, layers: tuple[str, ...]) -> None:
        action = self.actor(batch.obs)
        loss = -sum(critic(batch.obs, action).mean() for critic in self.critics) / len(self.critics)
        self.actor_optimizer.zero_grad()
        loss.backward(inputs=[p for layer in layers for p in getattr(self.actor, layer).parameters()])
        step_as_if_normalized(self.actor_optimizer, [self.actor.input], self.obs_mean, self.obs_scale)

    def arrays(self) -> dict[str, np.ndarray]:
        """Actor, critics and target critics, named as in a converted checkpoint."""
        networks = {"actor": self.actor, "critic": self.critics, "target_critic": self.target_critics}
        return _named_arrays(networks)

    def state(self) -> dict[str, np.ndarray]:
        """What `arrays` lacks to go on: target actor, optimisers, observation statistics, counter."""
        state = _named_arrays({"target_actor": self.target_actor})
        for name, optimizer in self._optimizers().items():
            for index, entry in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{index}.{key}": value.cpu().numpy() for key, value in entry.items()}
        return state | {
            "obs_mean": self.obs_mean.cpu().numpy(),
            "obs_scale": self.obs_scale.cpu().numpy(),
            "updates": np.array(self.updates),
        }

    def restore_optimizers(self, state: dict[str, np.ndarray]) -> None:
        """Optimisers and counter from `state`; the networks come with the constructor's `arrays`."""
        self.updates = int(state["updates"])
        for name, optimizer in self._optimizers().items():
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for path, value in state.items():
                if path.startswith(f"{name}."):
                    index, key = path.removeprefix(f"{name}.").split(".")
                    entries.setdefault(int(index), {})[key] = torch.as_tensor(value)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, entry in entries.items():
                shape = parameters[index].shape
                shapes = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
                if {key: value.shape for key, value in entry.items()} != shapes:
                    raise ValueError(f"{name} {index} has other shapes")
            optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer}


def _named_arrays(networks: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.{name}": value.cpu().numpy().copy()
        for prefix, network in networks.items()
        for name, value in network.state_dict().items()
    }


@torch.no_grad()
def _follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move target parameters the share `tau` of the way."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.lerp_(new, tau)


def random_arrays(seed: int, obs_mean: np.ndarray, obs_scale: np.ndarray) -> dict[str, np.ndarray]:
    """Fresh networks for normalised observations, the normaliser folded in; the actor starts near zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor, critics = Actor(), nn.ModuleList([Critic(), Critic()])
    with torch.no_grad():
        actor.output.weight.mul_(0.01)
        actor.output.bias.zero_()
        for network in (actor, *critics):
            folded = fold_normalizer(network.input.weight.numpy().T, network.input.bias.numpy(), obs_mean, obs_scale)
            for parameter, value in zip((network.input.weight, network.input.bias), folded):
                parameter.copy_(torch.from_numpy(value))
    return _named_arrays({"actor": actor, "critic": critics, "target_critic": critics})


def sample(
    replay: Replay, rng: np.random.Generator, count: int, alpha: float, beta: float, mirror: bool
) -> dict[str, np.ndarray]:
    """`count` transitions, as arrays named like `Batch`; half of them mirrored if `mirror`."""
    rows = replay.sample(rng, count)
    if mirror:
        half = slice(count // 2)
        for name in ("obs", "next_obs"):
            rows[name][half] = mirror_observation(rows[name][half])
        rows["action"][half] = mirror_action(rows["action"][half])
    rows["reward"] = alpha * rows.pop("dense") + beta * rows.pop("score")
    return rows


# --- judging ------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Official scores on one set of seeds."""

    scores: np.ndarray  # (3, N) by task and seed
    steps: np.ndarray  # (3, N) physics steps
    fell: np.ndarray  # (3, N)
    success: np.ndarray  # (3, N)

    @property
    def mean(self) -> float:
        """The mean of the tasks' means."""
        return float(self.scores.mean())

    def summary(self) -> dict:
        """Per task, for the manifest."""
        return {"mean": self.mean} | {
            task: {name: float(values[i].mean()) for name, values in self._asdict().items()}
            for i, task in enumerate(c.TASKS)
        }


def validate(config: Config, arrays: dict[str, np.ndarray], purpose: int) -> Scores:
    """Score a policy on the seeds of a purpose in each task."""
    episodes = config.validation_episodes if purpose == _VALIDATION else config.confirmation_episodes
    seeds = [episode_seed(config.seed, purpose, i) for i in range(episodes)]
    to_play = [Episode(task, seed) for task in c.TASKS for seed in seeds]
    results = play_in_workers(config.backend, policy_from_arrays(arrays), to_play, config.start_noise)

    def table(name: str) -> np.ndarray:
        return np.array([float(getattr(result, name)) for result in results]).reshape(c.NUM_TASKS, episodes)

    return Scores(table("score"), table("steps"), table("fell"), table("success"))


def gain(candidate: np.ndarray, start: np.ndarray) -> tuple[float, float]:
    """Mean gain of scores (3, N) over others on the same seeds, and its standard error."""
    difference = candidate - start
    standard_error = np.sqrt((difference.var(axis=1, ddof=1) / difference.shape[1]).sum()) / len(difference)
    return float(difference.mean()), float(standard_error)


def is_better(candidate: np.ndarray, start: np.ndarray) -> bool:
    """Whether scores (3, N) beat others on the same seeds by more than one standard error."""
    mean, standard_error = gain(candidate, start)
    return mean > standard_error


# --- the run ------------------------------------------------------------------------------------------


class Statistics:
    """Means since the last line of the log."""

    def __init__(self, state: dict[str, np.ndarray] | None = None):
        """Empty, or what `state` gave."""
        state = state or {}
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
        self.__init__()
        return means


_COUNTERS = ("step", "best_step", "logged", "validated", "saved")  # of `Run`


class Run:
    """What one fine-tuning run carries from step to step."""

    def __init__(self, config: Config, lanes: WorkerLanes):
        self.config, self.lanes = config, lanes
        self.rng = np.random.default_rng(config.seed)
        self.replay = Replay(config.buffer_size, _ROW_SHAPES)
        self.segments = Segments(config.out.with_name(f"{config.out.name}.replay"))
        self.statistics = Statistics()
        self.step = 0
        self.logged = self.validated = self.saved = 0  # the steps at which that was done last
        self.history: list[dict] = []  # one entry per line of the log
        self.learner: Learner
        self.start_arrays: dict[str, np.ndarray]
        self.start_scores: Scores
        self.best_arrays: dict[str, np.ndarray] | None = None  # of the best candidate above the start
        self.best_scores: Scores | None = None
        self.best_step = 0
        self.previous_action = np.zeros((config.num_lanes, c.NUM_JOINTS), np.float32)
        self.obs: np.ndarray  # (lanes, 87)
        self.reading: Reading

    def send_actions(self, mean_action: np.ndarray) -> np.ndarray:
        """Add exploration noise, set the lanes going; returns the actions (B, 12)."""
        noise = self.config.exploration_std * self.rng.standard_normal(mean_action.shape)
        action = np.clip(mean_action + noise, -1.0, 1.0).astype(np.float32)
        self.lanes.send(action)
        return action

    def receive(self, action: np.ndarray) -> LaneStep:
        """Wait for the lanes and store what they bring."""
        after = self.lanes.receive()
        raw = dense_terms(Transition(self.reading, after.reading, after.obs, action, self.previous_action, after.fell))
        dense = dense_reward(raw, self.config.weights)
        self.replay.add(
            obs=self.obs,
            action=action,
            dense=dense,
            score=after.score,
            next_obs=after.obs,
            terminated=after.terminated,
        )
        ended = after.terminated | after.truncated
        self.previous_action = np.where(ended[:, None], np.float32(0.0), action)
        self.obs, self.reading = after.next_obs, after.next_reading
        for name, values in raw.items():
            self.statistics.add(f"reward/{name}", values)
        self.statistics.add("reward/dense", dense)
        for name in ("physics_steps", "fell", "success"):
            self.statistics.add(f"episode/{name}", getattr(after, name)[ended])
        for i, task in enumerate(self.lanes.tasks):
            self.statistics.add(f"episode/score_{task}", after.score[i][ended[i]])
        return after

    def update(self, updates: int, layers: tuple[str, ...]) -> None:
        """Gradient steps on the buffer, the reward mixed as it stands at this step."""
        config = self.config
        alpha, beta = anneal(self.step, config.total_steps)
        metrics = {}
        for _ in range(updates):
            rows = sample(self.replay, self.rng, config.batch_size, alpha, beta, config.mirror)
            batch = Batch(**{name: self.learner.tensor(values) for name, values in rows.items()})
            metrics = self.learner.update(batch, layers)
        for name, value in metrics.items():  # of the last one: reading a value makes a GPU wait
            self.statistics.add(name, value.item())

    def log(self) -> dict[str, float]:
        """One line of the log: the means since the last one, kept in the history."""
        self.logged = self.step
        line = {"step": self.step} | self.statistics.take()
        self.history.append(line)
        alpha, beta = anneal(self.step, self.config.total_steps)
        episodes = "no episode ended"
        if "episode/fell" in line:
            scores = {task: line[f"episode/score_{task}"] for task in c.TASKS if f"episode/score_{task}" in line}
            episodes = " ".join(f"{task} {score:+.2f}" for task, score in scores.items())
            episodes += f", {line['episode/fell']:.0%} fell, {line['episode/physics_steps']:.0f} physics steps"
        learning = f"value {line['value']:+.2f} loss {line['critic_loss']:.3f}" if "value" in line else ""
        tqdm.write(
            f"step {self.step:>7,} alpha {alpha:.2f} beta {beta:.2f} | {episodes} | "
            f"dense {line['reward/dense']:+.3f} {learning}"
        )
        return line

    # --- resuming -------------------------------------------------------------------------------------

    def save(
        self, path: Path, parent: checkpoints.Checkpoint | None, lanes: dict[str, np.ndarray] | None = None
    ) -> None:
        """Write all that `restore` needs, as a checkpoint of the present policy; `lanes` if they cannot be asked."""
        self.saved = self.step
        networks = {f"start.{name}": value for name, value in self.start_arrays.items()}
        if self.best_arrays is not None:
            networks |= {f"best.{name}": value for name, value in self.best_arrays.items()}
        scores = {f"start_scores.{name}": value for name, value in self.start_scores._asdict().items()}
        if self.best_scores is not None:
            scores |= {f"best_scores.{name}": value for name, value in self.best_scores._asdict().items()}
        lanes = self.lanes.state() if lanes is None else lanes
        table = self.segments.write(self.replay)
        extra = {
            "learner": self.learner.state(),
            "replay": table,
            "kept": networks | scores,
            "lanes": lanes | {"obs": self.obs, "previous_action": self.previous_action},
            "progress": self._progress(),
            "statistics": self.statistics.state(),
        }
        write(path, self, self.learner.arrays(), parent, {"history": self.history}, extra, overwrite=True)
        tables = [table]
        with contextlib.suppress(UserError):  # there is none before, or none that can be read
            previous = checkpoints.load(checkpoints.places(path)[1], ("finetuned",), verify=False)
            tables.append(checkpoints.load_extra(previous, "replay"))
        self.segments.delete_all_but(*tables)

    def _progress(self) -> dict[str, np.ndarray]:
        counters = {name: np.array(getattr(self, name)) for name in _COUNTERS}
        return counters | {"added": np.array(self.replay.added), "rng": rng_array(self.rng)}

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Take up the run where `save` left it."""
        tables = {name: checkpoints.load_extra(checkpoint, name)
                  for name in ("kept", "learner", "lanes", "progress", "statistics", "replay")}  # fmt: skip
        kept, learner, lanes, progress = (tables[name] for name in ("kept", "learner", "lanes", "progress"))
        what = f"{checkpoint.path}: the saved state"
        check_like(progress, self._progress(), what)
        state = self.lanes.state() | {"obs": np.zeros((len(self.lanes.tasks), OBS_SIZE), np.float32)}
        check_like(lanes, state | {"previous_action": self.previous_action}, what)

        def named(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}

        def scores(prefix: str) -> Scores:
            table = np.zeros((c.NUM_TASKS, self.config.validation_episodes))
            check_like(named(prefix), dict.fromkeys(Scores._fields, table), what)
            return Scores(**named(prefix))

        lengths = lanes["lane_length"]
        if min(lanes["lane_episode"].min(), lengths.min()) < 0 or lengths.max() > c.EPISODE_ACTIONS:
            raise UserError(f"{what} holds impossible episodes: use an older one")
        if any(value.shape != (2,) or value.dtype != np.float64 for value in tables["statistics"].values()):
            raise UserError(f"{what}: its statistics are no sums: use the code that wrote it")
        if not isinstance(checkpoint.manifest["metrics"].get("history"), list):
            raise UserError(f"{what} has no history: use the code that wrote it")
        self.replay = Replay(self.config.buffer_size, _ROW_SHAPES)
        self.segments.read(tables["replay"], self.replay, int(progress["added"]))
        self.start_arrays, self.start_scores = named("start."), scores("start_scores.")
        if best := named("best."):
            self.best_arrays, self.best_scores = best, scores("best_scores.")
        with _as_user_error(what):
            mean, scale = (learner[name].reshape(OBS_SIZE) for name in ("obs_mean", "obs_scale"))
            for arrays in (self.start_arrays, best, checkpoint.arrays | learner):
                if arrays:
                    self.learner = Learner(self.config, arrays, mean, scale)  # refuses other networks
            self.learner.restore_optimizers(learner)
        for name in _COUNTERS:
            setattr(self, name, int(progress[name]))
        restore_rng(self.rng, progress["rng"])
        self.history = checkpoint.manifest["metrics"]["history"]
        self.statistics = Statistics(tables["statistics"])
        self.previous_action = lanes["previous_action"]
        self.obs, self.reading = self.lanes.restore(lanes)
        if not np.array_equal(self.obs, lanes["obs"]):
            print("warning: the running episodes did not repeat exactly (another machine?): going on all the same")


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Arrays with wrong names or shapes, as PyTorch reports them, in one line."""
    try:
        yield
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
        message = str(error).replace("\n", " ")[:100]
        raise UserError(f"{what} does not fit these networks ({message}): use the code that wrote it") from error


def write(
    path: Path,
    run: Run,
    arrays: dict[str, np.ndarray],
    parent: checkpoints.Checkpoint | None,
    metrics: dict,
    extra: dict | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a "finetuned" checkpoint with the given networks."""
    golden_obs = run.replay.arrays["obs"][: checkpoints.GOLDEN_PAIRS] if parent is None else parent.golden_obs
    actions = policy_from_arrays(arrays)(golden_obs).astype(np.float32)
    steps = run.step + (0 if parent is None else parent.manifest["steps"])
    return checkpoints.save(
        path,
        "finetuned",
        arrays,
        golden_obs,
        actions,
        asdict(run.config),
        run.config.seed,
        steps,
        parent,
        metrics,
        extra,
        overwrite,
    )


def warm_up(run: Run, arrays: dict[str, np.ndarray] | None) -> None:
    """Fill the buffer with the frozen start policy (random networks if None), then train the critics on it."""
    config = run.config
    run.obs, run.reading = run.lanes.start()
    nothing = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
    policy = policy_from_arrays(random_arrays(config.seed, *nothing) if arrays is None else arrays)
    rounds = -(-config.warmup_steps // config.num_lanes)
    for _ in tqdm(range(rounds), desc="warm-up", unit="round", disable=not sys.stderr.isatty()):
        run.receive(run.send_actions(policy(run.obs)))
    met = run.replay.arrays["obs"][: len(run.replay)]
    mean, scale = met.mean(axis=0), np.maximum(met.std(axis=0), _MIN_OBS_SCALE)
    run.start_arrays = random_arrays(config.seed, mean, scale) if arrays is None else arrays
    run.learner = Learner(config, run.start_arrays, mean, scale)
    for _ in tqdm(range(config.warmup_updates), desc="critics", unit="update", disable=not sys.stderr.isatty()):
        run.update(1, layers=())
    run.start_arrays = run.learner.arrays()  # the same actor, with critics that know the official environments
    run.log()


def train(run: Run, save_path: Path, parent: checkpoints.Checkpoint | None, stop: resume.StopSignal) -> None:
    """Fine-tune to the last step; the best candidate stays in `run`. On SIGTERM the state is saved, then `Stopped`."""
    config = run.config
    last_save_s = time.monotonic()
    bar = tqdm(total=config.total_steps, initial=run.step, unit="step", disable=not sys.stderr.isatty())
    with bar:
        while True:
            # First what is due at this step, so that a run which goes on finds it due as well.
            finished = run.step >= config.total_steps
            if run.step > run.validated and (finished or _passes(run, config.validate_every)):
                lanes = run.lanes.state()  # they cannot be asked while they validate
                try:
                    consider(run, stop)
                except resume.Stopped:
                    run.save(save_path, parent, lanes)
                    raise
            if run.step > run.logged and (finished or _passes(run, config.log_every)):
                line = run.log()
                if not np.isfinite(line.get("critic_loss", 0.0)):
                    tqdm.write(f"warning: training diverged before step {run.step}; only what came before counts")
                    return
            since_s = time.monotonic() - last_save_s
            due = run.step - run.saved >= config.checkpoint_every and since_s >= config.checkpoint_interval_s
            if stop.received or due or (finished and run.step > run.saved):
                run.save(save_path, parent)
                last_save_s = time.monotonic()
            if stop.received:
                raise resume.Stopped
            if finished:
                return
            action = run.send_actions(run.learner.act(run.obs))
            run.update(config.updates_per_round, trainable_layers(run.step, config))  # while the lanes move
            run.receive(action)
            run.step += config.num_lanes
            bar.update(config.num_lanes)


def _passes(run: Run, every: int) -> bool:
    """Whether the last round of all lanes reached a multiple of `every` steps."""
    return run.step // every > (run.step - run.config.num_lanes) // every


def consider(run: Run, stop: resume.StopSignal) -> None:
    """Validate the present policy; keep it if it is the best so far and above the start."""
    arrays = run.learner.arrays()
    if all(np.isfinite(value).all() for value in arrays.values()):
        with stop.interrupting():
            scores = validate(run.config, arrays, _VALIDATION)
        _judge(run, arrays, scores)
    run.validated = run.step


def _judge(run: Run, arrays: dict[str, np.ndarray], scores: Scores) -> None:
    mean, standard_error = gain(scores.scores, run.start_scores.scores)
    tqdm.write(
        f"  validation at {run.step:,}: {_text(scores)} | start {run.start_scores.mean:+.3f}, "
        f"gain {mean:+.3f} +- {standard_error:.3f}"
    )
    run.history.append({"step": run.step, "validation": scores.summary(), "gain": mean})
    if scores.mean > (run.best_scores or run.start_scores).mean:
        run.best_arrays, run.best_scores, run.best_step = arrays, scores, run.step


def _text(scores: Scores) -> str:
    of_tasks = ", ".join(f"{task} {row.mean():+.2f}" for task, row in zip(c.TASKS, scores.scores))
    return f"{scores.mean:+.3f} ({of_tasks})"


def choose(run: Run) -> tuple[dict[str, np.ndarray], dict]:
    """The networks to hand on, and why: the best candidate if it beats the start on fresh seeds, else the start."""
    verdict: dict = {"result": "start", "validation": {"start": run.start_scores.summary()}}
    if run.best_arrays is None:
        print("no candidate scored above the start in validation: the result is the start policy")
        return run.start_arrays, verdict
    verdict["validation"]["candidate"] = run.best_scores.summary()
    start, candidate = (validate(run.config, arrays, _CONFIRMATION) for arrays in (run.start_arrays, run.best_arrays))
    mean, standard_error = gain(candidate.scores, start.scores)
    verdict["confirmation"] = {
        "start": start.summary(),
        "candidate": candidate.summary(),
        "gain": mean,
        "standard_error": standard_error,
    }
    print(f"fresh seeds: start {_text(start)}; candidate of step {run.best_step:,} {_text(candidate)}")
    if is_better(candidate.scores, start.scores):
        print(f"gain {mean:+.3f} +- {standard_error:.3f}: the result is the candidate")
        return run.best_arrays, verdict | {"result": "candidate", "candidate_step": run.best_step}
    print(f"gain {mean:+.3f} +- {standard_error:.3f} is not above its standard error: the result is the start policy")
    return run.start_arrays, verdict


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The lanes' processes need the cores; networks of this size gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# What may differ between a run and its continuation; everything else decides the numbers.
_FREE = ("out", "checkpoint", "preset", "resume", "device", "log_every", "checkpoint_every", "checkpoint_interval_s",
         "keep_state")  # fmt: skip


def check_start(config: Config, path: Path) -> bool:
    """Whether there is a saved state to go on from; a new run never goes over an old one."""
    if not any(place.exists() for place in checkpoints.places(path)):
        if config.resume:
            print(f"{path} is not there: starting from the beginning", flush=True)
        return False
    if not config.resume:
        raise UserError(f"{path} holds an unfinished run: give --resume to go on with it, or move it away")
    return True


def resume_run(run: Run, path: Path, parent: checkpoints.Checkpoint | None) -> None:
    """Go on from the newest state that is whole."""

    def take_up(saved: checkpoints.Checkpoint) -> None:
        resume.check_parent(saved, parent)
        resume.check_settings(saved, asdict(run.config), _FREE)
        run.restore(saved)

    checkpoints.load_latest(path, ("finetuned",), accept=take_up)
    print(f"resuming at step {run.step:,}", flush=True)


def main(config: Config) -> Path:
    """Fine-tune; returns the output directory."""
    config = resolve(config)
    started = time.monotonic()
    resume_path = config.out.with_name(f"{config.out.name}.resume")
    if config.resume and (config.out / checkpoints.MANIFEST).exists():
        checkpoints.load(config.out, ("finetuned",))
        print(f"{config.out} is finished already")
        print(config.out)
        return config.out
    check_new(config.out)
    checkpoints.check_output_dir(resume_path)
    parent = None
    if config.checkpoint is not None:
        parent = checkpoints.load(config.checkpoint, ("converted", "finetuned"))
    goes_on = check_start(config, resume_path)

    lanes = WorkerLanes(config.backend, config.num_lanes, episode_seed(config.seed, _TRAINING), config.start_noise)
    with resume.StopSignal() as stop, lanes, _one_torch_thread():
        run = Run(config, lanes)
        try:
            if goes_on:
                resume_run(run, resume_path, parent)
            else:
                with stop.interrupting():
                    warm_up(run, None if parent is None else parent.arrays)
                    run.start_scores = validate(config, run.start_arrays, _VALIDATION)
                print(f"start policy in validation: {_text(run.start_scores)}", flush=True)
                run.save(resume_path, parent)  # the warm-up is long
            train(run, resume_path, parent, stop)
            with stop.interrupting():
                arrays, verdict = choose(run)
        except resume.Stopped:
            where = f"--resume goes on from step {run.saved:,}" if resume_path.exists() else "--resume starts over"
            print(f"SIGTERM: {where}", flush=True)
            raise SystemExit(resume.STOPPED) from None
    metrics = verdict | {
        "finetune_steps": run.step,
        "warmup_steps": config.warmup_steps,
        "seconds": round(time.monotonic() - started, 1),  # since the last resume
        "history": run.history,
    }
    path = write(config.out, run, arrays, parent, metrics)
    if not config.keep_state:
        for leftover in checkpoints.places(resume_path):
            if (leftover / checkpoints.MANIFEST).exists():
                shutil.rmtree(leftover)
        run.segments.delete_all_but()
    print(path)
    return path


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
