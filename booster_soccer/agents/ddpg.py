"""Deep deterministic policy gradient in PyTorch: networks, losses, update, and the learner's state as arrays.

Lillicrap et al. 2016 (arXiv 1509.02971): a deterministic actor, exploration noise on its actions, target networks.
Two critics, of which targets take the minimum (Fujimoto et al. 2018, arXiv 1802.09477: a good policy has more to lose
from overestimates) and the actor's objective the mean. The networks are those of `agents/sac.py` after
conversion, the observation normaliser folded into each first layer; the critics see more than the policy
(`preprocess/privileged.py`). The actor's layers thaw from the last to the first.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from booster_soccer.agents.policy import HIDDEN, LAYERS
from booster_soccer.arrays import named
from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.privileged import CRITIC_OBS_SIZE

NUM_CRITICS = 2
_AS_SAVED: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever a notebook's defaults are


@dataclass(frozen=True)
class DdpgConfig:
    """The learner; steps are policy actions in one lane."""

    actor_learning_rate: float = 3e-5
    critic_learning_rate: float = 3e-4
    actor_every: int = 2  # critic updates per actor update
    discount: float = 0.995  # a score two seconds away counts 61 %
    target_tau: float = 0.01
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


def network_arrays(networks: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    """Parameters as checkpoint arrays: `prefix.layer.weight`."""
    return {
        f"{prefix}.{name}": value.cpu().numpy().copy()
        for prefix, network in networks.items()
        for name, value in network.state_dict().items()
    }


# --- losses: one function each --------------------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions."""

    critic_obs: torch.Tensor  # (B, 109) the policy's observation, then what only the critics see
    action: torch.Tensor  # (B, 12)
    reward: torch.Tensor  # (B,)
    next_critic_obs: torch.Tensor  # (B, 109) what truly came next, also at an episode's end
    terminated: torch.Tensor  # (B,) 1.0 where no bootstrap may happen


@torch.no_grad()
def critic_target(target_actor: Actor, target_critics: nn.ModuleList, batch: Batch, discount: float) -> torch.Tensor:
    """y = r + discount (1 - terminated) min_i Q'_i(s', mu'(s')); (B,). Fujimoto et al. 2018, eq. 10."""
    next_action = target_actor(batch.next_critic_obs[:, :OBS_SIZE])
    next_value = torch.minimum(*(critic(batch.next_critic_obs, next_action) for critic in target_critics))
    return batch.reward + discount * (1.0 - batch.terminated) * next_value


def critic_loss(critics: nn.ModuleList, batch: Batch, target: torch.Tensor) -> torch.Tensor:
    """sum_i mean (Q_i(s, a) - y)^2."""
    return sum(F.mse_loss(critic(batch.critic_obs, batch.action), target) for critic in critics)


def actor_loss(actor: Actor, critics: nn.ModuleList, batch: Batch) -> torch.Tensor:
    """-mean_i Q_i(s, mu(s)): its gradient is the deterministic policy gradient. Lillicrap et al. 2016, eq. 6."""
    action = actor(batch.critic_obs[:, :OBS_SIZE])
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
    """Actor, two critics, their targets and optimisers."""

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
        self.actor = load_module(Actor(), "actor", arrays).to(self.device)
        target_actor = "target_actor" if "target_actor.input.weight" in arrays else "actor"
        self.target_actor = load_module(Actor(), target_actor, arrays).to(self.device)
        self.critics = critics_from_arrays(arrays, "critic").to(self.device)
        self.target_critics = critics_from_arrays(arrays, "target_critic").to(self.device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.actor_learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=config.critic_learning_rate)
        self.obs_mean, self.obs_scale = self.tensor(obs_mean), self.tensor(obs_scale)
        rest = self.tensor(np.zeros(self.critics[0].input.in_features - OBS_SIZE))
        self._critic_mean = torch.cat([self.obs_mean, rest])
        self._critic_scale = torch.cat([self.obs_scale, rest + 1.0])
        self.updates = 0

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """A float32 tensor on the learner's device."""
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions (B, 12) without noise for observations (B, 87)."""
        return self.actor(self.tensor(obs)).cpu().numpy()

    @torch.enable_grad()
    def update(self, batch: Batch, layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """One gradient step of the critics, and at every `actor_every`-th of the actor's `layers`."""
        config = self.config
        target = critic_target(self.target_actor, self.target_critics, batch, config.discount)
        loss = critic_loss(self.critics, batch, target)
        self.critic_optimizer.zero_grad()
        loss.backward()
        first_layers = [critic.input for critic in self.critics]
        step_as_if_normalized(self.critic_optimizer, first_layers, self._critic_mean, self._critic_scale)
        self.updates += 1
        if layers and self.updates % config.actor_every == 0:
            self.actor_optimizer.zero_grad()
            trained = [parameter for layer in layers for parameter in getattr(self.actor, layer).parameters()]
            actor_loss(self.actor, self.critics, batch).backward(inputs=trained)
            step_as_if_normalized(self.actor_optimizer, [self.actor.input], self.obs_mean, self.obs_scale)
            follow(self.target_actor, self.actor, config.target_tau)
        follow(self.target_critics, self.critics, config.target_tau)
        return {"critic_loss": loss.detach(), "value": target.mean()}

    # --- state to arrays and back ---------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Actor, critics and target critics, named as in a converted checkpoint."""
        return network_arrays({"actor": self.actor, "critic": self.critics, "target_critic": self.target_critics})

    def state(self) -> dict[str, np.ndarray]:
        """What `arrays` lacks to go on: target actor, optimisers, observation statistics, counter."""
        state = network_arrays({"target_actor": self.target_actor})
        for name, optimizer in self._optimizers().items():
            for index, entry in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{index}.{key}": value.cpu().float().numpy() for key, value in entry.items()}
        return state | {
            "obs_mean": self.obs_mean.cpu().numpy(),
            "obs_scale": self.obs_scale.cpu().numpy(),
            "updates": np.array(self.updates),
        }

    @classmethod
    def restore(
        cls, config: DdpgConfig, arrays: dict[str, np.ndarray], state: dict[str, np.ndarray], device: str
    ) -> "Ddpg":
        """The learner that gave `arrays` and `state`; a `ValueError` or the like where they do not fit."""
        mean, scale = (state[name].reshape(OBS_SIZE) for name in ("obs_mean", "obs_scale"))
        learner = cls(config, arrays | state, mean, scale, device)
        learner.updates = int(state["updates"])
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
