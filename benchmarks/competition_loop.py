"""The competition's own way of training, for row P5 of `bench.py`: what its public starter repository does, once more.

One official environment, a torque from the actor at every 500 Hz physics step, and after every fourth one a DDPG update
on 64 transitions out of a list of tuples: actor and critic of 24, 12 and 6 units, Adam at 1e-4, gradients clipped to
norm 1, targets that follow by 0.001. Written anew from that description (`ArenaX-Labs/booster_soccer_showdown`). One
thing is cheaper here: the actor sees the environment's arrays laid end to end, without the preprocessor's arithmetic.
"""

import random
from collections import deque

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from booster_soccer.agents.ddpg import follow
from booster_soccer.envs import official

_UNITS = (24, 12, 6)
_BATCH, _UPDATE_EVERY, _BUFFER = 64, 4, 100_000
_NOISE_NM, _DISCOUNT, _TAU, _LEARNING_RATE = 0.1, 0.99, 0.001, 1e-4


def _network(inputs: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    sizes = (inputs, *_UNITS)
    layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(_UNITS[-1], outputs), *last)


def _see(obs: np.ndarray, info: dict) -> np.ndarray:
    arrays = [value.ravel() for value in info.values() if isinstance(value, np.ndarray)]
    return np.concatenate([obs, *arrays]).astype(np.float32)


class CompetitionLoop:
    """One official environment of a task, and the learner that plays it."""

    def __init__(self, task: str, seed: int = 0):
        torch.manual_seed(seed)
        self.env, self._rng, self._random = official.make(task), np.random.default_rng(seed), random.Random(seed)
        self._buffer: deque[tuple] = deque(maxlen=_BUFFER)
        self._steps = 0
        self._seen = _see(*self.env.reset(seed=seed))
        self._limit_nm = self.env.action_space.high.astype(np.float32)
        width, actions = len(self._seen), len(self._limit_nm)
        self._actor, self._target_actor = (_network(width, actions, nn.Tanh()) for _ in range(2))
        self._critic, self._target_critic = (_network(width + actions, 1) for _ in range(2))
        self._target_actor.load_state_dict(self._actor.state_dict())
        self._target_critic.load_state_dict(self._critic.state_dict())
        self._optimizers = [
            torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE) for net in (self._actor, self._critic)
        ]

    def play(self, physics_steps: int) -> None:
        """Physics steps, with the updates that belong to them."""
        for _ in range(physics_steps):
            with torch.no_grad():
                unit = self._actor(torch.from_numpy(self._seen[None]))[0].numpy()
            noise_nm = self._rng.normal(0.0, _NOISE_NM, unit.shape)
            torque_nm = np.clip(self._limit_nm * unit + noise_nm, -1.0, 1.0)  # so in the original: 1 N m at most
            obs, reward, terminated, truncated, info = self.env.step(torque_nm)
            after, ended = _see(obs, info), terminated or truncated
            self._buffer.append((self._seen, torque_nm.astype(np.float32), reward, after, ended))
            self._seen = _see(*self.env.reset()) if ended else after
            self._steps += 1
            if self._steps % _UPDATE_EVERY == 0 and len(self._buffer) >= _BATCH:
                self._update()

    def _update(self) -> None:
        columns = zip(*self._random.sample(self._buffer, _BATCH))
        seen, action, reward, after, ended = (torch.as_tensor(np.array(column), dtype=torch.float32)
                                              for column in columns)  # fmt: skip
        with torch.no_grad():
            following = self._target_critic(torch.cat([after, self._target_actor(after)], 1))
            returns = reward[:, None] + _DISCOUNT * (1.0 - ended[:, None]) * following
        of_actor, of_critic = self._optimizers
        self._step(of_critic, F.mse_loss(self._critic(torch.cat([seen, action], 1)), returns))
        self._step(of_actor, -self._critic(torch.cat([seen, self._actor(seen)], 1)).mean())
        for target, network in ((self._target_actor, self._actor), (self._target_critic, self._critic)):
            follow(target, network, _TAU)

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()

    def close(self) -> None:
        """Give back the environment."""
        self.env.close()
