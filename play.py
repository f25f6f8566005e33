"""A policy that plays, in a browser: push the robot, start again, choose the task, and see what each step would score.

    python play.py --checkpoint assets/policies/final
    python play.py --policy zero|hold|random

Input: a checkpoint of any stage, or a baseline, which shows whether environment and viewer are what they should be:
with zero torque the robot crumples. Output: a page at http://127.0.0.1:8080 until Ctrl-C (`--seconds` ends it earlier).
It plays in the twin of the official environments, in real time where the machine keeps up; needs the extra `viewer`,
no GPU and no OpenGL.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import numpy as np
import tyro

from booster_soccer import errors
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.rewards.official import score_terms
from booster_soccer.rollout.lanes import TwinLanes
from booster_soccer.rollout.play import Policy, reference_policy
from booster_soccer.store import checkpoints
from booster_soccer.store.entry import guarded
from booster_soccer.tracking.viewer import Viewer

_PAUSE_S = 1.5  # at the end of an episode
_BEHIND_M, _ABOVE_M = 3.5, 1.8  # the camera, of the robot's start
_SHOW_EVERY = 2  # actions: 25 pictures a second


@dataclass(frozen=True)
class Config:
    """Give either a checkpoint or a baseline policy."""

    checkpoint: Path | None = None  # checkpoint directory, of any stage
    policy: Literal["zero", "hold", "random"] | None = None  # zero torque, the default pose, or actions at random
    task: c.Task = "goalie"  # to begin with
    seed: int = 0  # of the first episode; the next ones count on
    start_noise: float = c.START_NOISE_RAD  # standard deviation of the noise on each joint's start position, rad
    port: int = 8080  # of the page
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines look
    seconds: float = 0.0  # end after this much wall time; 0: never


def random_policy(seed: int) -> Policy:
    """Actions drawn from [-1, 1]."""
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1.0, 1.0, c.NUM_JOINTS).astype(np.float32)


def policy_of(config: Config) -> Policy:
    """What plays."""
    if (config.checkpoint is None) == (config.policy is None):
        raise UserError("give either --checkpoint DIR or --policy zero|hold|random")
    if config.checkpoint is not None:
        return policy_from_arrays(checkpoints.load(config.checkpoint).arrays)
    return random_policy(config.seed) if config.policy == "random" else reference_policy(str(config.policy))


class Game:
    """One lane of the twin, an episode after another."""

    def __init__(self, policy: Policy, start_noise_rad: float):
        self.policy, self._start_noise_rad = policy, start_noise_rad
        self._lanes = {task: TwinLanes(task, 1) for task in c.TASKS}

    def start(self, task: str, seed: int) -> None:
        """Begin an episode."""
        self.task, self.seed, self.ended = task, seed, False
        self.lane = self._lanes[task]
        self.lane.reset([0], [seed], self._start_noise_rad)
        self.terms: dict[str, float] = {}
        self.model = self.lane.env.physics.model_of(0)

    def step(self) -> None:
        """One action."""
        action = None if self.policy is None else np.asarray(self.policy(self.lane.observe()[0]))[None]
        self.ended = bool(np.logical_or(*self.lane.hold(action))[0])
        raw = {name: values[0] for name, values in self.lane.raw_terms.items()}
        self.terms = score_terms(self.task, raw)

    def push(self, speed_m_s: float) -> None:
        """Give the robot a sudden velocity to its left; negative to its right."""
        forward_w = self.lane.env.forward_w[0]
        left_w = np.array([-forward_w[1], forward_w[0], 0.0])
        self.lane.env.root_velocity_w[0] += speed_m_s * left_w

    @property
    def time_s(self) -> float:
        """Of the episode."""
        return float(self.lane.env.steps[0]) * c.PHYSICS_DT_S

    def words(self) -> str:
        """Where the episode stands, in Markdown."""
        total = sum(self.terms.values())
        lines = [f"**{self.task}**, seed {self.seed}, {self.time_s:.2f} s{', **ended**' if self.ended else ''}",
                 f"score {'' if self.ended else 'if it ended now '}**{total:+.2f}**", ""]  # fmt: skip
        return "  \n".join(lines) + "\n".join(f"- {name} {value:+.2f}" for name, value in self.terms.items())


class Controls:
    """Buttons in the page; what they ask for waits until the loop takes it."""

    def __init__(self, viewer: Viewer, config: Config):
        gui, self.asked = viewer.server.gui, SimpleQueue[Callable[[Game], None]]()
        self.task = gui.add_dropdown("task", c.TASKS, initial_value=config.task)
        self.speed = gui.add_slider("speed", 0.1, 2.0, 0.1, 1.0, hint="of real time")
        push = gui.add_slider("push, m/s", 0.1, 2.0, 0.1, 0.5, hint="sudden velocity of the trunk")
        left, right = gui.add_button("push to its left"), gui.add_button("push to its right")
        again, following = gui.add_button("the same start again"), gui.add_button("new start")
        self.paused = gui.add_checkbox("pause", False)
        self.text = gui.add_markdown("")
        self._seeds = itertools.count(config.seed + 1)
        left.on_click(lambda _: self.asked.put(lambda game: game.push(push.value)))
        right.on_click(lambda _: self.asked.put(lambda game: game.push(-push.value)))
        again.on_click(lambda _: self.asked.put(lambda game: game.start(game.task, game.seed)))
        following.on_click(lambda _: self.asked.put(self.next_start))
        self.task.on_update(lambda _: self.asked.put(self.next_start))

    def next_start(self, game: Game) -> None:
        """A start from the next seed, of the chosen task."""
        game.start(self.task.value, next(self._seeds))


def play(game: Game, viewer: Viewer, controls: Controls, seconds: float) -> None:
    """Play until the time is up (0: for ever)."""
    until = time.monotonic() + seconds if seconds > 0 else np.inf
    shown, restart_at, due = None, np.inf, time.monotonic()
    for number in itertools.count():
        while not controls.asked.empty():
            controls.asked.get()(game)
            restart_at = np.inf
        if game.model is not shown:
            shown = game.model
            viewer.set_model(shown)
            behind(viewer, game)
        if not (controls.paused.value or game.ended):
            game.step()
            restart_at = time.monotonic() + _PAUSE_S if game.ended else np.inf
        if number % _SHOW_EVERY == 0 or game.ended:
            viewer.show(game.lane.env.qpos[0])
            controls.text.content = game.words()
        if time.monotonic() >= restart_at:
            controls.next_start(game)
            restart_at = np.inf
        if time.monotonic() >= until:
            return
        due = max(due + c.ACTION_DT_S / controls.speed.value, time.monotonic())  # what was late is not made up for
        time.sleep(max(0.0, due - time.monotonic()))


def behind(viewer: Viewer, game: Game) -> None:
    """Put the camera behind the robot."""
    robot_w, ahead_w = game.lane.env.imu_pos_w[0], np.append(game.lane.env.forward_w[0], 0.0)
    viewer.look(robot_w - _BEHIND_M * ahead_w + [0.0, 0.0, _ABOVE_M], robot_w + 2.0 * ahead_w)


@guarded()
def main(config: Config) -> None:
    """Serve the page and play until Ctrl-C."""
    if not 0 <= config.seed < 2**63 or config.start_noise < 0.0 or not 0 <= config.port < 2**16:
        raise UserError(
            f"--seed {config.seed}, --start-noise {config.start_noise}, --port {config.port}: need a seed from 0, "
            "a noise from 0, and a port below 65536"
        )
    game = Game(policy_of(config), config.start_noise)
    viewer = Viewer(config.port, config.host)
    try:
        game.start(config.task, config.seed)
        print(f"open {viewer.address} in a browser; Ctrl-C ends it", flush=True)
        play(game, viewer, Controls(viewer, config), config.seconds)
    except KeyboardInterrupt:
        print()
    finally:
        viewer.close()


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__))
