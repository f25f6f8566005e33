"""Rows P3, P5, P7 and P8 of `bench.py`: the twin, fine-tuning, what past runs took, and the submitted policy."""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import finetune_ddpg
import submit
from benchmarks import twin  # sets the threads of NumPy's BLAS
from benchmarks.competition_loop import CompetitionLoop
from benchmarks.learning import first_reached, read_judgements
from benchmarks.pairs import Line, compare, in_turn, per_s, rate
from booster_soccer.agents.ddpg import Ddpg, one_thread
from booster_soccer.agents.submission_model import scripted
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.envs.twin import TwinEnv
from booster_soccer.preprocess.observation import OBS_SIZE
from booster_soccer.preprocess.submission import Preprocessor
from booster_soccer.rollout.workers import WorkerLanes
from booster_soccer.store import checkpoints

_COMPETITION_STEPS = 2_000  # physics steps of the competition's loop in one measurement
_TRACE_STEPS = 500  # physics steps whose observations the submitted policy is asked about
_ROOT = Path(__file__).resolve().parents[1]
RUNS = (_ROOT / "assets/policies/pretrained.metrics.jsonl", _ROOT / "assets/training/m1.metrics.jsonl")
GOALS = {4.0: "15 min", 8.0: "35 min"}  # score: wall time to reach


# --- P3: the twin -----------------------------------------------------------------------------------------


def twin_speed(config) -> list[Line]:
    """P3: `TwinEnv.step_torque` against one official environment's `step`, both 500 Hz, per second of CPU time."""
    steps, lines = twin.PIECES * twin.PIECE_STEPS, []
    for task in c.TASKS:
        env, lanes = official.make(task), TwinEnv(task, config.twin_lanes)
        pairs = []
        for _ in range(config.repeats + 1):
            seconds = twin.measure({"official": twin.play_official(env), "twin": twin.play_torque(lanes)})
            official_s, twin_s = (seconds[name][0].sum() for name in ("official", "twin"))
            pairs.append((steps * config.twin_lanes / twin_s, steps / official_s))
        env.close()
        lanes.close()
        said = f"twin, {task}, {config.twin_lanes} lanes, one core, physics steps/s of CPU time"
        lines.append(compare("P3", said, pairs[1:], "steps/s", "official environment", ">= 8"))
    return lines


# --- P5: fine-tuning ----------------------------------------------------------------------------------------


def _finetuning(config, lanes: WorkerLanes) -> Callable[[], None]:
    """What plays one round of fine-tuning and learns from it, all layers thawed; preset `cpu` but for the lanes."""
    checkpoint = checkpoints.load(config.checkpoint, ("converted", "finetuned"))
    settings = finetune_ddpg.PRESETS["cpu"]
    settings = replace(settings, checkpoint=config.checkpoint, num_lanes=config.finetune_lanes)
    run = SimpleNamespace(steps=settings.ddpg.freeze_input_until)
    stage = finetune_ddpg.Finetuning(settings, run, lanes, checkpoint)
    unit = np.zeros(OBS_SIZE, np.float32), np.ones(OBS_SIZE, np.float32)
    stage.learner = Ddpg(settings.ddpg, checkpoint.arrays, *unit, stage.device)
    stage.critic_obs = lanes.start()

    def play() -> None:
        for _ in range(settings.round_actions):
            stage.advance()

    return play


def finetuning_loop(config) -> list[Line]:
    """P5: `Finetuning.advance` on the twin against the competition's loop; physics steps, updates included in both.

    One measurement is a round: 80 actions of ten physics steps in every lane, and what is learned from them.
    """
    settings = finetune_ddpg.PRESETS["cpu"]
    count = config.finetune_lanes
    physics_steps = settings.round_actions * count * c.PHYSICS_STEPS_PER_ACTION
    lanes = WorkerLanes(settings.backend, count, settings.seed, settings.start_noise, settings.weights)
    competition = CompetitionLoop("goalie")
    with lanes, one_thread():
        play = _finetuning(config, lanes)
        pairs = in_turn(
            lambda: per_s(physics_steps, play),
            lambda: per_s(_COMPETITION_STEPS, lambda: competition.play(_COMPETITION_STEPS)),
            config.repeats,
        )
    competition.close()
    said = f"fine-tuning, {count} lanes, updates included, physics steps/s"
    peer = "one official environment in the competition's loop (`benchmarks/competition_loop.py`)"
    return [compare("P5", said, pairs, "steps/s", peer, ">= 10")]


# --- P7: wall time to a score ---------------------------------------------------------------------------------


def wall_time(config, runs: Sequence[Path] = RUNS) -> list[Line]:
    """P7: read, not measured: the first judgement at or above +4.0 and +8.0 in the metrics of past runs."""
    lines = []
    for file in runs:
        judgements = read_judgements(file)
        for score, goal in GOALS.items():
            row = first_reached(judgements, score)
            ours = f"{row['wall_s'] / 60:.1f} min, {row['step'] / 1e6:.2f} M steps" if row else "not reached"
            source = f"read from `{file.parent.name}/{file.name}`"
            lines.append(Line("P7", f"from nothing to {score:+.1f}", ours, source, "", f"<= {goal}"))
    return lines


# --- P8: the submitted policy -----------------------------------------------------------------------------------


def _sdk_policy(config, env):
    """The SDK's manager of the two files that would be submitted, loaded as the platform loads them."""
    sdk = submit._import_sdk()
    with tempfile.TemporaryDirectory() as place:
        model, preprocessor = Path(place, submit.MODEL), Path(place, submit.PREPROCESSOR)
        torch.jit.save(scripted(submit.actor_from_checkpoint(checkpoints.load(config.checkpoint))), str(model))
        preprocessor.write_text(inspect.getsource(Preprocessor))
        return sdk.ModelManager(env, str(model), "pytorch", preprocessor_class=str(preprocessor))


def submitted_policy(config) -> list[Line]:
    """P8: milliseconds for one physics step, batch 1, mean over 500 of a played episode, of which 50 ask the actor.

    The ratio is how often it fits into the 2 ms of a physics step.
    """
    env = official.make("goalie")
    manager = _sdk_policy(config, env)
    trace, now = [], env.reset(seed=0)
    for _ in range(_TRACE_STEPS):
        trace.append(now)
        obs, _, terminated, truncated, info = env.step(manager.get_action(*now)[0])
        now = env.reset() if terminated or truncated else (obs, info)
    env.close()
    preprocess, policy = manager._preprocess_manager.modify_state, manager._handler.get_policy
    seen = [preprocess(obs, info) for obs, info in trace]

    def ask(call: Callable, arguments: Sequence[tuple]) -> Callable[[], None]:
        return lambda: [call(*one) for one in arguments]

    parts = {
        "the SDK's whole path, `get_action`": (ask(manager.get_action, trace), ""),
        "of it the model, `get_policy`": (ask(policy, [(manager.model, obs) for obs in seen]), "<= 0.1 ms"),
        "of it the preprocessor": (ask(preprocess, trace), ""),
    }
    per_step_ms: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(config.repeats + 1):
        for name, (play, _) in parts.items():
            ms = 1e3 / per_s(_TRACE_STEPS, play)
            if repeat:  # the first is uncounted
                per_step_ms[name].append(ms)
    return [_against_real_time(name, per_step_ms[name], reach) for name, (_, reach) in parts.items()]


def _against_real_time(name: str, ms: Sequence[float], reach: str) -> Line:
    step_ms = 1e3 * c.PHYSICS_DT_S
    line = compare("P8", "", [(step_ms / one, 1.0) for one in ms], "", "", reach)
    said = f"submitted policy, batch 1, per physics step: {name}"
    return line._replace(measured=said, ours=rate(ms, "ms"), against=f"{step_ms:.0f} ms, real time")
