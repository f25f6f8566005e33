"""PyTorch actor and critics: the same functions as `agents/sac_networks.py`, after conversion."""

import torch
from torch import nn
from torch.nn import functional as F

from booster_soccer.envs import constants as c
from booster_soccer.preprocess.observation import OBS_SIZE

HIDDEN = 256


class Actor(nn.Module):
    """Deterministic policy: observation (B, 87) to action (B, 12) in [-1, 1]; the normaliser is folded in."""

    def __init__(self, obs_size: int = OBS_SIZE):
        super().__init__()
        self.input = nn.Linear(obs_size, HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, c.NUM_JOINTS)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.input(obs))
        x = F.silu(self.hidden(x))
        return torch.tanh(self.output(x))


class Critic(nn.Module):
    """Q(observation (B, 87), action (B, 12)) -> (B,), with layer norm before each SiLU."""

    def __init__(self, obs_size: int = OBS_SIZE):
        super().__init__()
        self.input = nn.Linear(obs_size + c.NUM_JOINTS, HIDDEN)
        self.input_norm = nn.LayerNorm(HIDDEN, eps=1e-6)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.hidden_norm = nn.LayerNorm(HIDDEN, eps=1e-6)
        self.output = nn.Linear(HIDDEN, 1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.input_norm(self.input(torch.cat([obs, action], dim=-1))))
        x = F.silu(self.hidden_norm(self.hidden(x)))
        return self.output(x).squeeze(-1)
