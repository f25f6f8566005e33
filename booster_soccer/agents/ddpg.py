"""Fine-tuning's learner in PyTorch: networks, losses, update, and its state as arrays.

DDPG's parts (Lillicrap et al. 2016, arXiv 1509.02971): a deterministic actor, exploration noise on its actions, critics
of state and action. Two things differ from the textbook, for measured reasons (docs/experiments.md, 26 November):

- It learns in rounds: all lanes play some seconds with one policy, then critics and actor learn from just these
  actions. The critics fit lambda-returns, which reach to the episode's end, where the official score is paid.
- The actor follows what its noise has brought (`outcome_loss`), not the critics' slope (`slope_loss`, Lillicrap's
  eq. 6, to be had by `actor_gradient`): the critics rank the actions around a good policy hardly better than
  chance, while they predict well how an episode will go on, which is all that a baseline needs.

The networks are those of `agents/sac.py` after conversion, the observation normaliser folded into each first layer; the
critics see more than the policy (`preprocess/privileged.py`). The actor's layers thaw from the last to the first, and a
round moves the policy by a fixed Kullback-Leibler divergence. What is judged and shipped is its running average.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from booster_soccer.agents.policy import HIDDEN, LAYERS
from booster_soccer.arrays import named
from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE, mirror_critic_observation
from booster_soccer.preprocess.symmetry import mirror_action

NUM_CRITICS = 2
_AS_SAVED: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever a notebook's defaults are


@dataclass(frozen=True)
class DdpgConfig:
    """The learner; steps are policy actions in one lane."""

    actor_gradient: Literal["outcomes", "critics"] = "outcomes"  # what the noise brought, or the critics' slope
    exploration_std: float = 0.1  # of the noise on actions in [-1, 1]; twice as much costs a point of score
    discount: float = 0.995  # a score two seconds away counts 61 %
    trace_decay: float = 0.95  # lambda: how far returns trust what followed rather than the critics
    epochs: int = 4  # passes over a round
    batch_size: int = 2048  # actions of a gradient step
    critic_learning_rate: float = 5e-4  # Adam's
    actor_learning_rate: float = 3e-6  # of the first round; then what gives `kl_per_round`
    kl_per_round: float = 0.006  # how far a round moves the exploring policy; 0: the learning rate stays as it is
    ratio_clip: float = 0.2  # of the likelihood ratio
    policy_tau: float = 0.1  # a round's share in the average that is judged and shipped
    freeze_hidden_until: int = 20_000  # before this step only the last layer learns
    freeze_input_until: int = 50_000  # before this step only the last two


# --- networks -----------------------------------------------------------------------------------------


class Actor(nn.Module):
    """Deterministic policy: observation (B, 87) to action (B, 12) in [-1, 1]; the normaliser is folded in."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(OBS_SIZE, HIDDEN, **_AS_SAVED)
        self.hidden = nn.Linear(HIDDEN, HIDDEN, **_AS_SAVED)
        self.output = nn.Linear(HIDDEN, c.NUM_JOINTS, **_AS_SAVED)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.input(obs))
        x = F.silu(self.hidden(x))
        return torch.tanh(self.output(x))


class Critic(nn.Module):
    """Q(what critics see (B, 109), action (B, 12)) -> (B,), with layer norm before each SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(CRITIC_OBS_SIZE + c.NUM_JOINTS, HIDDEN, **_AS_SAVED)
        self.input_norm = nn.LayerNorm(HIDDEN, eps=1e-6, **_AS_SAVED)
        self.hidden = nn.Linear(HIDDEN, HIDDEN, **_AS_SAVED)
        self.hidden_norm = nn.LayerNorm(HIDDEN, eps=1e-6, **_AS_SAVED)
        self.output = nn.Linear(HIDDEN, 1, **_AS_SAVED)

    def forward(self, critic_obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.input_norm(self.input(torch.cat([critic_obs, action], dim=-1))))
        x = F.silu(self.hidden_norm(self.hidden(x)))
        return self.output(x).squeeze(-1)


def fold_normalizer(
    kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (out, in) and bias (out,) of a layer on raw inputs that equals `kernel` (in, out) on normalised ones.

    (x - mean) / std @ kernel + bias = x @ (kernel / std) + (bias - mean / std @ kernel). The first
    `len(mean)` inputs are normalised, the others (privileged numbers, an action) are not. Computed in float64.
    """
    rest = kernel.shape[0] - len(mean)
    mean = np.concatenate([mean, np.zeros(rest)]).astype(np.float64)
    std = np.concatenate([std, np.ones(rest)]).astype(np.float64)
    scaled = kernel.astype(np.float64) / std[:, None]
    return scaled.T.astype(np.float32), (bias.astype(np.float64) - mean @ scaled).astype(np.float32)


def load_module(module: nn.Module, prefix: str, arrays: dict[str, np.ndarray]) -> nn.Module:
    """`module` with the arrays named `prefix.*`."""
    state = {name: torch.from_numpy(arrays[f"{prefix}.{name}"].copy()) for name in module.state_dict()}
    module.load_state_dict(state)
    return module


def critics_from_arrays(arrays: dict[str, np.ndarray], prefix: str) -> nn.ModuleList:
    """The critics named `prefix.{0,1}.*`."""
    return nn.ModuleList(load_module(Critic(), f"{prefix}.{i}", arrays) for i in range(NUM_CRITICS))


def random_arrays(seed: int, obs_mean: np.ndarray, obs_scale: np.ndarray) -> dict[str, np.ndarray]:
    """Fresh networks for normalised observations, the normaliser folded in; the actor starts near zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor, critics = Actor(), nn.ModuleList(Critic() for _ in range(NUM_CRITICS))
    with torch.no_grad():
        actor.output.weight.mul_(0.01)
        actor.output.bias.zero_()
        for network in (actor, *critics):
            folded = fold_normalizer(network.input.weight.numpy().T, network.input.bias.numpy(), obs_mean, obs_scale)
            for parameter, value in zip((network.input.weight, network.input.bias), folded):
                parameter.copy_(torch.from_numpy(value))
    return network_arrays({"actor": actor, "critic": critics, "target_critic": critics})


def rescale_critics(arrays: dict[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    """Networks whose critics predict `factor` times as much: what came with another size of reward."""
    outputs = [name for name in arrays if "critic." in name and ".output." in name]
    return arrays | {name: (arrays[name] * factor).astype(np.float32) for name in outputs}


def network_arrays(networks: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    """Parameters as checkpoint arrays: `prefix.layer.weight`."""
    return {
        f"{prefix}.{name}": value.cpu().numpy().copy()
        for prefix, network in networks.items()
        for name, value in network.state_dict().items()
    }


# --- losses: one function each --------------------------------------------------------------------------


class Batch(NamedTuple):
    """Actions that were played, and what came of them."""

    critic_obs: torch.Tensor  # (B, 109) the policy's observation, then what only the critics see
    mean: torch.Tensor  # (B, 12) the actor's action then
    noise: torch.Tensor  # (B, 12) on top of it, in standard deviations
    returns: torch.Tensor  # (B,) lambda-returns
    advantage: torch.Tensor  # (B,) of the action over the actor's, standardised in each task


def lambda_advantages(
    reward: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    terminated: np.ndarray,
    ended: np.ndarray,
    discount: float,
    trace_decay: float,
) -> np.ndarray:
    """Advantages A_t = d_t + discount lambda A_t+1, d_t = r_t + discount V(s_t+1) - V(s_t); all (T, B).

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16. A + V are the lambda-returns. Nothing is bootstrapped where an
    episode `terminated`; no trace crosses the end of one, by its rules or by time.
    """
    surprise = reward + discount * (1.0 - terminated) * next_value - value
    advantage, following = np.zeros_like(surprise), np.zeros_like(surprise[0])
    for t in reversed(range(len(reward))):
        following = surprise[t] + discount * trace_decay * (1.0 - ended[t]) * following
        advantage[t] = following
    return advantage


def critic_loss(critics: nn.ModuleList, batch: Batch, exploration_std: float) -> torch.Tensor:
    """sum_i mean (Q_i(s, a) - G)^2 to the lambda-returns G."""
    action = (batch.mean + exploration_std * batch.noise).clamp(-1.0, 1.0)
    return sum(F.mse_loss(critic(batch.critic_obs, action), batch.returns) for critic in critics)


def outcome_loss(move: torch.Tensor, batch: Batch, ratio_clip: float) -> torch.Tensor:
    """-mean min(rho A, clip(rho) A): its gradient raises the actions whose noise did well. Schulman et al. 2017, eq. 7.

    `move` (B, 12) is how far the actor's action has moved since, in standard deviations of the noise. The likelihood
    ratio of the action is rho = exp(noise . move - |move|^2 / 2).
    """
    ratio = ((batch.noise * move).sum(-1) - 0.5 * (move**2).sum(-1)).exp()
    clipped = ratio.clamp(1.0 - ratio_clip, 1.0 + ratio_clip)
    return -torch.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()


def slope_loss(action: torch.Tensor, critics: nn.ModuleList, batch: Batch) -> torch.Tensor:
    """-mean_i Q_i(s, mu(s)): its gradient is the deterministic policy gradient. Lillicrap et al. 2016, eq. 6."""
    return -sum(critic(batch.critic_obs, action).mean() for critic in critics) / len(critics)


# --- update -----------------------------------------------------------------------------------------------


def trainable_layers(step: int, config: DdpgConfig) -> tuple[str, ...]:
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


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move target parameters the share `tau` of the way."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.lerp_(new, tau)


class Ddpg:
    """Actor, its running average, two critics, and optimisers."""

    def __init__(
        self,
        config: DdpgConfig,
        arrays: dict[str, np.ndarray],
        obs_mean: np.ndarray,
        obs_scale: np.ndarray,
        device: str = "cpu",
    ):
        """`arrays` as in a converted checkpoint; mean and scale (87,) of observations shape the steps only."""
        self.config = config
        self.device = torch.device(device)
        self.policy = load_module(Actor(), "actor", arrays).to(self.device)
        learning = "learning_actor" if "learning_actor.input.weight" in arrays else "actor"
        self.actor = load_module(Actor(), learning, arrays).to(self.device)
        self.critics = critics_from_arrays(arrays, "critic").to(self.device)
        self.actor_learning_rate = config.actor_learning_rate
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.actor_learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=config.critic_learning_rate)
        self.obs_mean, self.obs_scale = self.tensor(obs_mean), self.tensor(obs_scale)
        rest = torch.zeros(self.critics[0].input.in_features - OBS_SIZE, device=self.device)
        self._critic_mean = torch.cat([self.obs_mean, rest])
        self._critic_scale = torch.cat([self.obs_scale, rest + 1.0])

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """A float32 tensor on the learner's device."""
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions (..., 12) without noise for observations (..., 87)."""
        return self.actor(self.tensor(obs)).cpu().numpy()

    @torch.no_grad()
    def value(self, critic_obs: np.ndarray) -> np.ndarray:
        """mean_i Q_i(s, mu(s)) (...) of what critics see (..., 109)."""
        seen = self.tensor(critic_obs)
        action = self.actor(seen[..., :OBS_SIZE])
        return (sum(critic(seen, action) for critic in self.critics) / len(self.critics)).cpu().numpy()

    @torch.enable_grad()
    def learn(self, batch: Batch, layers: tuple[str, ...], rng: np.random.Generator) -> dict[str, float]:
        """Passes over a round (N, ...) and its mirror image: the critics, and the actor's `layers` if there are any.

        Each pass takes N of the 2 N. The actor stops early where it has moved four times too far.
        """
        config, both = self.config, self._with_mirror_image(batch)
        moves, sums, count = [0.0], 0.0, 0
        for _ in range(config.epochs):
            chosen = torch.as_tensor(rng.permutation(len(both.returns))[: len(batch.returns)], device=self.device)
            for rows in chosen.split(config.batch_size):
                part = Batch(*(values[rows] for values in both))
                sums, count = sums + self._critic_step(part), count + 1
                if layers and (not config.kl_per_round or moves[-1] < 4.0 * config.kl_per_round):
                    moves.append(self._actor_step(part, layers))
        kl = float(np.mean(moves[len(moves) // 2 :]))
        if layers:
            follow(self.policy, self.actor, config.policy_tau)
            if config.kl_per_round:
                self.actor_learning_rate *= float(np.clip(config.kl_per_round / max(kl, 1e-9), 0.67, 1.5))
        return {"critic_loss": sums / count, "kl": kl, "actor_learning_rate": self.actor_learning_rate}

    @torch.no_grad()
    def _with_mirror_image(self, batch: Batch) -> Batch:
        """A round, then itself with left and right exchanged (2 N, ...): the mirrored noise on the actor's action."""
        seen = self.tensor(mirror_critic_observation(batch.critic_obs.cpu().numpy()))
        noise = self.tensor(mirror_action(batch.noise.cpu().numpy()))
        image = Batch(seen, self.actor(seen[:, :OBS_SIZE]), noise, batch.returns, batch.advantage)
        return Batch(*(torch.cat(pair) for pair in zip(batch, image)))

    def _critic_step(self, part: Batch) -> float:
        loss = critic_loss(self.critics, part, self.config.exploration_std)
        self.critic_optimizer.zero_grad()
        loss.backward()
        first_layers = [critic.input for critic in self.critics]
        step_as_if_normalized(self.critic_optimizer, first_layers, self._critic_mean, self._critic_scale)
        return loss.item()

    def _actor_step(self, part: Batch, layers: tuple[str, ...]) -> float:
        """One step; how far the policy has moved since the round was played, as a Kullback-Leibler divergence."""
        config = self.config
        action = self.actor(part.critic_obs[:, :OBS_SIZE])
        move = (action - part.mean) / config.exploration_std
        if config.actor_gradient == "outcomes":
            loss = outcome_loss(move, part, config.ratio_clip)
        else:
            loss = slope_loss(action, self.critics, part)
        self.actor_optimizer.zero_grad()
        loss.backward(inputs=[parameter for layer in layers for parameter in getattr(self.actor, layer).parameters()])
        self.actor_optimizer.param_groups[0]["lr"] = self.actor_learning_rate
        step_as_if_normalized(self.actor_optimizer, [self.actor.input], self.obs_mean, self.obs_scale)
        return 0.5 * float((move.detach() ** 2).sum(-1).mean())

    # --- state to arrays and back ---------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """The policy, and critics, named as in a converted checkpoint."""
        return network_arrays({"actor": self.policy, "critic": self.critics, "target_critic": self.critics})

    def state(self) -> dict[str, np.ndarray]:
        """What `arrays` lacks to go on: learning actor, optimisers, observation statistics, learning rate."""
        state = network_arrays({"learning_actor": self.actor})
        for name, optimizer in self._optimizers().items():
            for index, entry in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{index}.{key}": value.cpu().float().numpy() for key, value in entry.items()}
        return state | {
            "obs_mean": self.obs_mean.cpu().numpy(),
            "obs_scale": self.obs_scale.cpu().numpy(),
            "actor_learning_rate": np.array(self.actor_learning_rate),
        }

    @classmethod
    def restore(
        cls, config: DdpgConfig, arrays: dict[str, np.ndarray], state: dict[str, np.ndarray], device: str
    ) -> "Ddpg":
        """The learner that gave `arrays` and `state`; a `ValueError` or the like where they do not fit."""
        mean, scale = (state[name].reshape(OBS_SIZE) for name in ("obs_mean", "obs_scale"))
        learner = cls(config, arrays | state, mean, scale, device)
        learner.actor_learning_rate = float(state["actor_learning_rate"])
        for name, optimizer in learner._optimizers().items():
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for path, value in named(state, f"{name}.").items():
                index, key = path.split(".")
                entries.setdefault(int(index), {})[key] = torch.as_tensor(value, device="cpu")
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for number, entry in entries.items():
                shape = parameters[number].shape
                shapes = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
                if {key: value.shape for key, value in entry.items()} != shapes:
                    raise ValueError(f"{name} {number} has other shapes")
            optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
        return learner

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: the lanes' processes need the cores, and networks of this size gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
